"""Weights in a kernel's own layout are kept from call to call: never beyond their values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forcing import KERNELS
from fusedcnn import _ops
from geometries import Block

# One kernel covers few input channels only, another many only.
SHALLOW = Block("shallow", (2, 6, 12, 12), 32, padding=1)
DEEP = Block("deep", (2, 16, 12, 12), 32, padding=1)
FORWARDS = [f for f in KERNELS if f.pass_name == "forward"]
over_kernels = pytest.mark.parametrize("forced", FORWARDS, ids=str)


def block_for(forced) -> Block:
    return SHALLOW if forced.kernel == "winograd_f2x2_few_channels" else DEEP


def dtype_of(forced) -> torch.dtype:
    return torch.bfloat16 if forced.kernel == "tiles" else torch.float32


def operands(forced):
    torch.manual_seed(0)
    block = block_for(forced)
    dtype = dtype_of(forced)
    return tuple(torch.randn(shape).to(dtype) for shape in (block.input, block.weight, 32))


def forward(forced, input, weight, bias):
    with _ops.force(forced.isa, forced.kernel):
        return _ops.forward_op(input, weight, bias, block_for(forced).pack(), True)[0]


def fresh(forced, input, weight, bias):
    """The result with the same values at an address that no earlier call has seen."""
    return forward(forced, input, weight.clone(), bias)


def through_numpy(weight):
    """Half or double of each; numpy has no bfloat16."""
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    weight.detach().view(bits).numpy()[...] ^= 1 << (23 if bits == torch.int32 else 7)


CHANGES = {
    "through_data": lambda weight: weight.data.mul_(2),  # leaves the version counter alone
    "through_numpy": through_numpy,  # torch does not see it at all
    "last_element": lambda weight: weight[-1, -1, -1, -1].add_(1),  # the last byte to compare
    "swapped_channels": lambda weight: weight.copy_(weight.flip(0)),  # the same values elsewhere
    "through_storage": lambda weight: weight.untyped_storage().fill_(0),
}


@over_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_changed_in_place(forced, change):
    input, weight, bias = operands(forced)
    before = forward(forced, input, weight, bias)
    assert torch.equal(forward(forced, input, weight, bias), before)
    CHANGES[change](weight)
    after = forward(forced, input, weight, bias)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(forced, input, weight, bias))


@over_kernels
def test_another_weight_at_the_same_address(forced):
    """One piece of memory read as other shapes and layouts, in turn."""
    input, weight, bias = operands(forced)
    channels, memory = weight.shape[1], weight.flatten()
    views = [
        memory.view(32, channels, 3, 3),
        memory.view(32, 3, 3, channels).permute(0, 3, 1, 2),  # channels_last
        memory.view(channels, 32, 3, 3).transpose(0, 1),
        memory[: 16 * channels * 9].view(16, channels, 3, 3),
    ]
    for view in views * 2:
        result = forward(forced, input, view, bias[: len(view)])
        assert torch.equal(result, fresh(forced, input, view, bias[: len(view)]))


@over_kernels
def test_other_kernel_sizes_over_the_same_memory(forced):
    """3x3 and 9x1 taps with the same strides are the same bytes in another order."""
    dtype = dtype_of(forced)
    memory, input = torch.randn(16 * 4 * 9).to(dtype), torch.randn(2, 4, 12, 12).to(dtype)
    weights = [memory.as_strided((16, 4, *kernel), (36, 9, 1, 3)) for kernel in ((3, 3), (9, 1))]
    exercised = 0
    for weight in weights * 2:
        kernel = tuple(weight.shape[2:])
        geometry = Block("taps", (2, 4, 12, 12), 16, kernel, pool=3, pool_stride=3).pack()
        with _ops.force(forced.isa, forced.kernel):
            try:
                result = _ops.forward_op(input, weight, None, geometry, True)[0]
            except RuntimeError:  # the kernel does not cover it
                continue
            copy = _ops.forward_op(input, weight.clone(), None, geometry, True)[0]
        assert torch.equal(result, copy)
        exercised += 1
    assert exercised or forced.kernel.startswith("winograd")


@over_kernels
def test_an_infinite_weight_comes_and_goes(forced):
    """What a kernel remarks about the values is not kept beyond them either."""
    input, weight, bias = operands(forced)
    before = forward(forced, input, weight, bias)
    kept = weight[0, 0, 0, 0].clone()
    weight[0, 0, 0, 0] = float("inf")
    results = (run(forced, input, weight, bias).nan_to_num(nan=-1) for run in (forward, fresh))
    assert torch.equal(*results)
    weight[0, 0, 0, 0] = kept
    assert torch.equal(forward(forced, input, weight, bias), before)


def test_threads_that_share_weights_and_replace_them():
    """Calls at the same time, some of the same weight, some of weights that come and go."""
    forced = next(f for f in FORWARDS if f.kernel == "winograd_f4x4")
    input, weight, bias = operands(forced)
    expected = fresh(forced, input, weight, bias)

    def run(weight):
        return _ops.forward_op(input, weight, bias, DEEP.pack(), True)[0]

    def failures(_thread: int) -> list[tuple[int, str]]:
        own, found = weight.clone(), []
        for i in range(50):
            if not torch.equal(run(weight), expected):
                found.append((i, "shared"))
            own.mul_(-1)
            if not torch.equal(run(own), run(own.clone())):
                found.append((i, "own"))
        return found

    # Forcing is process-wide: set once, around all threads.
    with _ops.force(forced.isa, forced.kernel), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(failures, range(4))) == [[]] * 4
