"""Where the stock layers are wrong, and the block is right: float64 says what right is.

What may damage memory runs in a process of its own. Each test skips where the torch or the machine
at hand does not have the fault; docs/compatibility.md lists them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, over, over_dtypes, step
from geometries import Block, by_name
from reference import GRADS, integer_operands, stock_result, with_layout
from torch import Tensor


def apart(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """What became of a program that sees the tests' modules."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def assert_block_is_right(block: Block, dtype: torch.dtype, layout: str = "contiguous") -> None:
    """Output and gradients on integers are those of float64, to the bit."""
    operands = integer_operands(block, dtype)
    right = stock_result(block, operands.map(Tensor.double))
    tensors = with_layout(operands.input, layout), *operands[1:3]
    expected = [getattr(right, name).to(dtype) for name in ("output", *GRADS)]
    assert_equal(step(block.fused, tensors, operands.grad_output), expected)


# ---- windows wholly in padding -------------------------------------------------------------------

over_windows_of_padding = over(["pool_of_padding", "pool_of_padding16"])


@over_dtypes
@over_windows_of_padding
def test_windows_wholly_in_padding(block, dtype):
    """The maximum of nothing is -inf, and no gradient flows."""
    assert_block_is_right(block, dtype)
    output, grad_input, *_ = step(block.fused, integer_operands(block, dtype)[:3])
    assert output.isneginf().all()
    assert grad_input.eq(0).all()


@over_windows_of_padding
def test_windows_wholly_in_padding_under_transforms(block):
    """What the stock layers compute for us is right, too."""
    operands = integer_operands(block, torch.float64)[:3]
    grads = torch.func.grad(lambda *t: block.fused(*t).sum(), argnums=(0, 1, 2))(*operands)
    assert all(grad.eq(0).all() for grad in grads)
    primal, tangent = torch.func.jvp(block.fused, operands, operands)
    assert primal.isneginf().all()
    assert tangent.eq(0).all()


STOCK_MODULES = """
import sys, fusedcnn, torch
from geometries import by_name
from reference import integer_operands
block = by_name(sys.argv[1])
pool = torch.nn.MaxPool2d(*block.pool_arguments[:4], ceil_mode=block.ceil_mode)
channels = block.input[-3], block.out_channels
conv = torch.nn.Conv2d(*channels, block.kernel, *block.conv_arguments)
norm = torch.nn.BatchNorm2d(block.out_channels)
folded = fusedcnn.fuse(torch.nn.Sequential(conv, norm, torch.nn.ReLU(), pool).eval()).train()
unfused = fusedcnn.unfuse(fusedcnn.ConvReLUMaxPool2d.from_modules(conv, pool))
for model in (folded, unfused):
    input = integer_operands(block, torch.float32).input.requires_grad_()
    output = model(input)
    assert output.isneginf().all()
    output.sum().backward()
    assert all(t.grad.eq(0).all() for t in (input, conv.weight, conv.bias))
torch.fx.symbolic_trace(unfused)  # which cannot ask for sizes
print(list(fusedcnn.build_info()["stock_calls"]), type(unfused).__name__)
"""


@pytest.mark.parametrize("name", ["pool_of_padding", "pool_of_padding16"])
def test_windows_wholly_in_padding_in_modules_of_stock_layers(name):
    """Of a normalisation in training mode, which is fused, and of an unfused block."""
    process = apart(STOCK_MODULES, name)
    assert process.returncode == 0, process.stderr
    ran = "[] StockConvReLUMaxPool2d"
    assert process.stdout.strip() == ran


@over_dtypes
def test_stock_index_of_a_window_wholly_in_padding(dtype):
    """The stock backward adds the gradient there; it must not run in this process."""
    block = by_name("pool_of_padding")
    plane = block.conv(*integer_operands(block, torch.float32)[:3]).to(dtype)
    _, index = F.max_pool2d(plane, *block.pool_arguments, return_indices=True)
    if index.max() < plane[0, 0].numel():
        pytest.skip(f"the stock pool of torch {torch.__version__} finds a place inside of the map")


# ---- one column of outputs under a stride, in bfloat16 -------------------------------------------

ONE_COLUMN = [
    by_name("one_column"),
    Block("one_column_one_group", (3, 2, 23, 8), 16, (2, 4), 3, dilation=(3, 2), pool=1),
    Block("one_column_3x3", (2, 16, 14, 3), 16, 3, (1, 2), pool=1),
]
STOCK_ERRORS = """
import torch
from reference import integer_operands
from test_stock_faults import ONE_COLUMN
for block in ONE_COLUMN:
    operands = integer_operands(block, torch.bfloat16)[:3]
    right = block.conv(*(t.double() for t in operands))
    print(((block.conv(*operands) - right).abs().max() / right.abs().max()).item())
"""


@over_dtypes
@over(ONE_COLUMN)
def test_one_column_of_outputs(block, dtype):
    assert_block_is_right(block, dtype)


def test_stock_one_column_of_outputs():
    """Off by as much as the results' own size, where the CPU has AMX."""
    process = apart(STOCK_ERRORS)
    assert process.returncode == 0, process.stderr
    errors = [float(line) for line in process.stdout.split()]
    if max(errors) < torch.finfo(torch.bfloat16).eps:
        pytest.skip("the stock convolution is right here: wrong results need a CPU with AMX")
    assert min(errors) > 0.1, errors


# ---- dilated 1x1 convolutions over padding, in channels_last -------------------------------------

POINTWISE = Block("pointwise", (2, 5, 18, 1), 2, 1, 4, (1, 2), dilation=(2, 3), pool=1)
STOCK_POINTWISE = """
import sys, torch
from reference import integer_operands
from test_stock_faults import POINTWISE
input, weight, bias, _ = integer_operands(POINTWISE, getattr(torch, sys.argv[1]))
input = input.contiguous(memory_format=torch.channels_last)
for _ in range(3):
    plane = POINTWISE.conv(input, weight, bias)
right = POINTWISE.conv(*(t.double() for t in (input, weight, bias)))
print((plane - right).abs().max().item())
"""


@over_dtypes
def test_dilated_pointwise_convolutions(dtype):
    assert_block_is_right(POINTWISE, dtype, "channels_last")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stock_dilated_pointwise_convolutions(dtype):
    process = apart(STOCK_POINTWISE, dtype)
    if process.returncode == 0:
        if float(process.stdout) == 0:
            pytest.skip(f"the stock convolution of torch {torch.__version__} is right here")
        return
    assert process.returncode < 0, process.stderr  # killed by a signal
