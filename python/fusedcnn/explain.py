"""What selection chooses for a call, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedcnn import _cuda, _first_use
from fusedcnn._geometry import pack_geometry
from fusedcnn._ops import explain_op
from fusedcnn.functional import operands, why_stock

STOCK = "stock layers"


@dataclass(frozen=True)
class Choice:
    """What computes one pass.

    Attributes:
        kernel: its name, or ``"stock layers"``.
        why_not: the reason for every other, in selection's order.
        state: of a CUDA kernel, whether it has been checked on the device: "checked on ...",
            "not checked: ..." or "failed: ..."; otherwise empty.
    """

    kernel: str
    why_not: dict[str, str]
    state: str = ""


class Explanation(dict[str, Choice]):
    """By pass (``"forward"``, ``"grad_weight"``, ``"grad_input"``); its ``str`` is for people."""

    def __str__(self) -> str:
        lines = []
        for name, choice in self.items():
            lines.append(f"{name}: {choice.kernel}" + (choice.state and f" ({choice.state})"))
            lines.extend(f"    not {other}: {why}" for other, why in choice.why_not.items())
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Explanation:
    """Which kernel each pass of :func:`conv_relu_max_pool2d` takes for these arguments, and why.

    The arguments are those of :func:`conv_relu_max_pool2d`; nothing is computed, but a device's
    first use checks its kernels (see ``fusedcnn.backends.cuda``). With
    ``fusedcnn.backends.benchmark`` on, the call itself may take another kernel that covers it.

    Returns:
        For each pass the kernel, and for every other the reason why it does not serve.

    Raises:
        TypeError, RuntimeError: what :func:`conv_relu_max_pool2d` raises for these arguments.
    """
    input, weight, bias = operands(input, weight, bias)
    geometry = pack_geometry(
        weight.shape[2:], stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip
    explanation = Explanation()
    reason = why_stock(input, weight, geometry, compiling=False)
    if reason is not None:
        for name in ("forward", "grad_weight", "grad_input"):
            explanation[name] = Choice(STOCK, {"any kernel": reason})
        return explanation
    if not input.is_cpu:
        _cuda.follow_torch()
    chosen: dict[str, str] = {}
    why_not: dict[str, dict[str, str]] = {}
    with torch.no_grad():
        rows = explain_op(input, weight, bias, geometry).splitlines()
    for row in rows:
        name, kernel, because = row.split("\t")
        if because:
            why_not.setdefault(name, {})[kernel] = because
        else:
            chosen[name] = kernel
    for name, kernel in chosen.items():
        state = "" if input.is_cpu else _first_use.state_of(input.device.index, f"{name} {kernel}")
        explanation[name] = Choice(kernel, why_not.get(name, {}), state)
    return explanation
