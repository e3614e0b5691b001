"""What fuse says of what it has done."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fusedcnn.chains import name_of
from fusedcnn.modules import ConvReLUMaxPool2d

_SHOWN = 8  # rows in a warning


class FuseResult(NamedTuple):
    """What became of one chain, or of a module that could not be looked into.

    Attributes:
        name: path of the convolution, or of the module.
        steps: what was to be fused, in order; empty for a module.
        fused: whether it is.
        reason: why not; empty where it is.
    """

    name: str
    steps: tuple[str, ...]
    fused: bool
    reason: str

    def __str__(self) -> str:
        what = " -> ".join(self.steps) or name_of(self.name)
        return f"{what}: fused" if self.fused else f"{what}: left alone: {self.reason}"


class FuseReport(list[FuseResult]):
    """A list of :class:`FuseResult` that prints as one line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no Conv2d with a ReLU and a MaxPool2d behind it"


def why_nothing(model: nn.Module, results: FuseReport) -> str:
    """The warning of a call that has fused nothing."""
    why = str(FuseReport(results[:_SHOWN]))
    if len(results) > _SHOWN:
        why += f"\nand {len(results) - _SHOWN} more: see fuse(model, report=True)"
    if not results and any(isinstance(m, ConvReLUMaxPool2d) for m in model.modules()):
        why = "its blocks are fused already"
    return f"fuse has replaced nothing in {type(model).__name__}:\n{why}"
