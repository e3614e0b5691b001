"""The same bits whatever the threads, the batch and the run, from every kernel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import assert_equal, over, step
from forcing import KERNELS, PASSES, run_pass
from fusedcnn import _ops
from geometries import Block
from reference import normal_operands

# Enough work that the operator spreads it over threads, and sizes that no thread count divides.
LARGE = [
    Block("large_specialised", (7, 3, 33, 31), 17, padding=1),
    Block("large_deep", (5, 19, 18, 15), 33, padding=1),
    Block("large_general", (5, 6, 31, 29), 12, 5, 1, 2, groups=2, pool=3, pool_stride=2),
    Block("large_image", (1, 3, 131, 127), 16, padding=1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over(LARGE)
def test_threads_and_runs(block, dtype, restore_threads):
    """1, 2 and 3 threads, and a second run: equal to the bit."""
    operands = normal_operands(block, dtype)
    _, code = _ops.forward_op(*operands[:3], block.pack(), True)
    exercised = set()
    for forced in KERNELS:
        torch.set_num_threads(1)
        expected = run_pass(forced, block, operands, code)
        if expected is None:
            continue
        exercised.add(forced.pass_name)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, result in run_pass(forced, block, operands, code).items():
                assert torch.equal(result, expected[name]), (str(forced), threads, name)
    assert exercised == set(PASSES)


@over(LARGE[:3])
def test_an_image_alone_and_in_a_batch(block):
    """An image's output and gradient do not depend on its company."""
    operands = normal_operands(block, torch.float32)
    _, code = _ops.forward_op(*operands[:3], block.pack(), True)
    for forced in KERNELS:
        if forced.pass_name == "grad_weight":
            continue  # sums over the batch
        batch = run_pass(forced, block, operands, code)
        if batch is None:
            continue
        for n in range(block.input[0]):
            for image in (slice(n, n + 1), n):  # [1, C, H, W] and [C, H, W]
                alone = operands._replace(
                    input=operands.input[image], grad_output=operands.grad_output[image]
                )
                for name, result in run_pass(forced, block, alone, code[image]).items():
                    assert torch.equal(result, batch[name][image]), (str(forced), name, n)


# Batches of this size and images are not cut into the bands that one image alone is cut into.
CUT = [
    Block("cut_deep", (8, 16, 36, 36), 32, padding=1),
    Block("cut_wide", (8, 32, 40, 40), 64, padding=1),
    Block("cut_odd", (8, 8, 61, 61), 32),
    Block("cut_shallow", (8, 3, 85, 85), 32),
    Block("cut_direct", (8, 24, 41, 41), 32, 5, 1, 2, pool=3, pool_stride=2),
]


@pytest.mark.parametrize("unreached", [False, True], ids=["", "nan_in_the_last_row"])
@over(CUT)
def test_a_large_image_alone_and_in_a_batch(block, unreached):
    """Also where values that no window reaches would change which kernel computes an image."""
    operands = normal_operands(block, torch.float32)
    if unreached:
        operands.input[:, :, -1] = float("nan")
    exercised = 0
    for forced in (f for f in KERNELS if f.pass_name == "forward"):
        batch = run_pass(forced, block, operands)
        if batch is None:
            continue
        for n in (0, 5):
            image = operands._replace(input=operands.input[n : n + 1])
            for name, result in run_pass(forced, block, image).items():
                together = batch[name][n : n + 1].nan_to_num(nan=-1)
                assert torch.equal(result.nan_to_num(nan=-1), together), (str(forced), name, n)
        exercised += 1
    assert exercised >= 2


def test_from_many_threads_at_once():
    """Calls from several Python threads do not disturb each other's scratch memory."""

    def whole(block):
        *tensors, grad_output = normal_operands(block, torch.float32)
        return step(block.fused, tensors, grad_output)

    expected = [whole(block) for block in LARGE]
    with ThreadPoolExecutor(4) as pool:
        assert_equal(list(pool.map(whole, LARGE * 4)), expected * 4)
