"""Memory that is not there: storages released under their tensors, and allocations that fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from checks import assert_equal, over_dtypes
from fusedcnn import ConvReLUMaxPool2d, conv_relu_max_pool2d
from fusedcnn.functional import pack_geometry
from torch import Tensor

GEOMETRY = pack_geometry((3, 3), padding=1)

# ---- released storages ---------------------------------------------------------------------------
#
# Sharding (FSDP) and offloading call untyped_storage().resize_(0) and keep the tensor.


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"input": (2, 3, 8, 8), "weight": (16, 3, 3, 3), "bias": (16,)}
    return {name: torch.randn(s).to(dtype).requires_grad_() for name, s in shapes.items()}


def release(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def cut(tensor: Tensor) -> None:
    """All but the last byte."""
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)


taken_away = pytest.mark.parametrize("take_away", [release, cut])


def refused(argument: str):
    return pytest.raises(RuntimeError, match=f"^{argument}: expected")


@taken_away
@over_dtypes
@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
def test_before_the_forward(argument, dtype, take_away):
    tensors = operands(dtype)
    take_away(tensors[argument])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), refused(argument):
            conv_relu_max_pool2d(**tensors, padding=1)


@taken_away
@over_dtypes
@pytest.mark.parametrize("argument", ["input", "weight"])
def test_between_forward_and_backward(argument, dtype, take_away):
    tensors = operands(dtype)
    output = conv_relu_max_pool2d(**tensors, padding=1)
    take_away(tensors[argument])
    with refused(argument):
        output.sum().backward()


@taken_away
@pytest.mark.parametrize("argument", ["grad_output", "input", "weight", "code"])
def test_the_backward_operator(argument, take_away):
    tensors = [t.detach() for t in operands().values()]
    ops = torch.ops.fusedcnn
    output, code = ops.conv_relu_max_pool2d(*tensors, GEOMETRY, True)
    names = ("grad_output", "input", "weight", "code")
    arguments = dict(zip(names, (output.clone(), *tensors[:2], code), strict=True))
    take_away(arguments[argument])
    with refused(argument):
        ops.conv_relu_max_pool2d_backward(*arguments.values(), GEOMETRY, 7)


def test_views_into_a_released_storage():
    """A view has an offset, and so an address that is not null."""
    whole = torch.randn(3, 3, 8, 8)
    view, weight = whole[1:], torch.randn(16, 3, 3, 3)
    conv_relu_max_pool2d(view, weight)
    release(whole)
    with pytest.raises(RuntimeError, match=r"^input: expected .* released"):
        conv_relu_max_pool2d(view, weight)


def test_what_is_not_read_may_be_gone():
    """The input's gradient needs no input, the weight's no weight."""
    tensors = operands()
    tensors["weight"].requires_grad_(False)
    output = conv_relu_max_pool2d(**tensors, padding=1)
    expected = torch.autograd.grad(output.sum(), tensors["input"], retain_graph=True)
    release(tensors["input"])
    assert_equal(torch.autograd.grad(output.sum(), tensors["input"]), expected)


def test_a_released_storage_that_comes_back():
    """As FSDP has it: gone between the passes, there again for each."""
    block = ConvReLUMaxPool2d(3, 16, 3)
    images, kept = torch.randn(2, 3, 8, 8), block.weight.detach().clone()
    output = block(images)
    output.sum().backward()
    expected, block.weight.grad = block.weight.grad, None
    release(block.weight)
    with refused("weight"):
        block(images)
    block.weight.untyped_storage().resize_(kept.untyped_storage().nbytes())
    with torch.no_grad():
        block.weight.copy_(kept)
    again = block(images)
    assert torch.equal(again, output)
    again.sum().backward()
    assert torch.equal(block.weight.grad, expected)


# ---- allocations that fail -----------------------------------------------------------------------

# Runs `call` with 200 MB of address space left, then again without a limit: the first must say how
# much it wanted, in the words of torch's allocator, and the second be right.
SCRIPT = """
import re, resource, torch
from fusedcnn import conv_relu_max_pool2d

torch.set_num_threads({threads})
one = torch.ones(1)
small = conv_relu_max_pool2d(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3))  # loads all there is

def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))

{setup}
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used() + (200 << 20), unlimited[1]))
try:
    {call}
except BaseException as error:
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    print(type(error).__name__, error)
    wanted = re.search(r"can't allocate memory: you tried to allocate (\\d+) bytes", str(error))
    assert type(error) is RuntimeError and wanted and int(wanted[1]) > 50 << 20
else:
    raise SystemExit("computed")
assert torch.equal(conv_relu_max_pool2d(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3)), small)
{call}
"""

# Inputs of one element, expanded, take no memory of their own.
SHORTAGES = {
    "output": (
        "image, weight = one.expand(1, 1, 8192, 8192), one.expand(4, 1, 1, 1)",
        "conv_relu_max_pool2d(image, weight)",
    ),
    "weights of the kernel": (
        "image, weight = one.expand(1, 4096, 3, 3), one.expand(4096, 4096, 3, 3)",
        "conv_relu_max_pool2d(image, weight, pool_kernel_size=1)",
    ),
    "padded image of the backward": (
        "image = one.expand(2, 16, 2048, 2048)\n"
        "weight = torch.ones(2, 16, 1, 1, requires_grad=True)\n"
        "output = conv_relu_max_pool2d(image, weight, pool_kernel_size=32)",
        "torch.autograd.grad(output.sum(), weight, retain_graph=True)",
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shortage", SHORTAGES)
def test_out_of_memory(shortage, threads):
    setup, call = SHORTAGES[shortage]
    script = SCRIPT.format(threads=threads, setup=setup, call=textwrap.indent(call, "    ").strip())
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
