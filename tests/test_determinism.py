"""The same bits whatever the threads, the batch and the run, from every kernel."""

from __future__ import annotations

import fusedcnn
import pytest
import torch
from fusedcnn import _ops
from geometries import Block
from reference import BIAS, INPUT, WEIGHT, Operands, normal_operands

KERNELS = sorted(
    {(row["isa"], row["pass"], row["name"]) for row in _ops.build_info()["kernels"]
     if row["supported"]}
)  # fmt: skip

# Enough work that the operator spreads it over threads, and sizes that no thread count divides.
LARGE = [
    Block("large_specialised", (7, 3, 33, 31), 17, padding=1),
    Block("large_deep", (5, 19, 18, 15), 33, padding=1),
    Block("large_general", (5, 6, 31, 29), 12, 5, 1, 2, groups=2, pool=3, pool_stride=2),
    Block("large_image", (1, 3, 131, 127), 16, padding=1),
]


def run(kernel: tuple[str, str, str], block: Block, operands: Operands, code):
    """The results of one pass, forced; None where the kernel does not cover the block."""
    isa, pass_name, name = kernel
    geometry = block.pack()
    with _ops.force(isa, name):
        try:
            if pass_name == "forward":
                return _ops.forward_op(*operands[:3], geometry, True)
            mask = INPUT if pass_name == "grad_input" else WEIGHT | BIAS
            return _ops.backward_op(operands.grad_output, *operands[:2], code, geometry, mask)
        except RuntimeError as error:
            if name == "general" or f"no {pass_name} kernel covers" not in str(error):
                raise
            return None


def same_bits(results, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", LARGE, ids=lambda block: block.name)
def test_threads_and_runs(block, dtype, restore_threads):
    """1, 2 and 3 threads, and a second run: equal to the bit."""
    operands = normal_operands(block, dtype)
    _, code = _ops.forward_op(*operands[:3], block.pack(), True)
    exercised = set()
    for kernel in KERNELS:
        torch.set_num_threads(1)
        expected = run(kernel, block, operands, code)
        if expected is None:
            continue
        exercised.add(kernel[1])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(run(kernel, block, operands, code), expected), (kernel, threads)
    assert exercised == {"forward", "grad_weight", "grad_input"}


@pytest.mark.parametrize("block", LARGE[:3], ids=lambda block: block.name)
def test_an_image_alone_and_in_a_batch(block):
    """An image's output and gradient do not depend on its company."""
    operands = normal_operands(block, torch.float32)
    _, code = _ops.forward_op(*operands[:3], block.pack(), True)
    for kernel in KERNELS:
        if kernel[1] == "grad_weight":
            continue  # sums over the batch
        batch = run(kernel, block, operands, code)
        if batch is None:
            continue
        for n in range(block.input[0]):
            alone = operands._replace(
                input=operands.input[n : n + 1], grad_output=operands.grad_output[n : n + 1]
            )
            results = run(kernel, block, alone, code[n : n + 1])
            if kernel[1] == "grad_input":
                assert torch.equal(results[0][0], batch[0][n]), (kernel, n)
            else:
                assert torch.equal(results[0][0], batch[0][n]), (kernel, n)
                assert torch.equal(results[1][0], batch[1][n]), (kernel, n)
            unbatched = alone._replace(input=operands.input[n], grad_output=operands.grad_output[n])
            results = run(kernel, block, unbatched, code[n])
            assert torch.equal(results[0], batch[0][n]), (kernel, n)


def test_from_many_threads_at_once():
    """Calls from several Python threads do not disturb each other's scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    blocks = LARGE * 4

    def whole(block):
        operands = normal_operands(block, torch.float32)
        leaves = [t.detach().requires_grad_() for t in operands[:3]]
        output = fusedcnn.conv_relu_max_pool2d(
            *leaves, *block.conv_arguments, **block.fused_keywords
        )
        output.backward(operands.grad_output)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    expected = [whole(block) for block in LARGE]
    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(whole, blocks)):
            assert same_bits(results, expected[i % len(LARGE)])
