"""Every kernel of every ISA, one by one."""

from __future__ import annotations

from typing import NamedTuple

from fusedcnn import _cuda, _ops, build_info
from geometries import Block
from reference import BIAS, GRADS, INPUT, WEIGHT, Operands
from torch import Tensor

PASSES = ("forward", "grad_weight", "grad_input")


class Forced(NamedTuple):
    """One kernel of one ISA, for one pass."""

    isa: str
    pass_name: str
    kernel: str
    exact: bool  # on small integers; Winograd's larger transforms round
    error: int  # at most, in errors of the stock layers

    def __str__(self) -> str:
        return f"{self.isa}-{self.pass_name}-{self.kernel}"


# One list feeds selection, build_info and the tests: a listed kernel cannot go untested.
KERNELS = [
    Forced(row["isa"], row["pass"], row["name"], row["exact"], row["error"])
    for row in build_info()["kernels"]
    # "dense" serves convolutions on their own, which this operator has none of.
    if row["supported"] and row["name"] != "dense"
]
ISAS = list(dict.fromkeys(forced.isa for forced in KERNELS))
CUDA_KERNELS = [
    Forced("cuda", row["pass"], row["name"], row["exact"], row["error"])
    for row in build_info()["cuda"]["kernels"]
]


def run_pass(
    forced: Forced, block: Block, operands: Operands, code: Tensor | None = None
) -> dict[str, Tensor] | None:
    """The pass's results by name, or None if the kernel says that it does not cover the block."""
    input, weight, bias, grad_output = operands
    geometry = block.pack()
    on_cuda = forced.isa == "cuda"
    with _cuda.force(forced.kernel) if on_cuda else _ops.force(forced.isa, forced.kernel):
        try:
            if forced.pass_name == "forward":
                results = _ops.forward_op(input, weight, bias, geometry, True)
                return dict(zip(("output", "code"), results, strict=True))
            mask = INPUT if forced.pass_name == "grad_input" else WEIGHT | BIAS
            grads = _ops.backward_op(grad_output, input, weight, code, geometry, mask)
        except RuntimeError as error:
            # One covers everything; of the others, only what they claim is tested.
            refused = f"no {forced.pass_name} kernel covers" in str(error)
            if forced.kernel != ("library" if on_cuda else "general") and refused:
                return None
            raise
    grads = dict(zip(GRADS, grads, strict=True))
    if mask == INPUT:
        return {"grad_input": grads["grad_input"]}
    return {"grad_weight": grads["grad_weight"], "grad_bias": grads["grad_bias"]}


def run_everywhere(
    block: Block, operands: Operands, exact_only: bool = True
) -> list[tuple[str, dict[str, Tensor]]]:
    """Forward by each kernel that covers the block, and from its code each backward kernel.

    Returns (what ran, its results by name); `exact_only` leaves out kernels that round integers.
    """
    results = []
    for isa in ISAS:
        kernels = [f for f in KERNELS if f.isa == isa and (f.exact or not exact_only)]
        for forward in (f for f in kernels if f.pass_name == "forward"):
            outputs = run_pass(forward, block, operands)
            if outputs is None:
                continue
            results.append((str(forward), outputs))
            for backward in (f for f in kernels if f.pass_name != "forward"):
                grads = run_pass(backward, block, operands, outputs["code"])
                if grads is not None:
                    results.append((f"{backward} after {forward.kernel}", grads))
    return results
