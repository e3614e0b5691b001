"""How precisely everybody computes: one setting for all contenders of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """A type of parameters and images, and what may be done to its operands.

    Attributes:
        name: on the command line and in the JSON.
        dtype: of parameters and images.
        tf32: float32 operands of convolutions and matrix products may be rounded to tf32; on a
            CUDA device alone.
        note: what it means, for people.
        capability: the oldest CUDA device that computes so, as (major, minor).
    """

    name: str
    dtype: torch.dtype
    note: str
    tf32: bool = False
    capability: tuple[int, int] = (0, 0)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", torch.float32, "float32, tf32 allowed to nobody"),
        Precision(
            "tf32", torch.float32, "float32, tf32 allowed to all", tf32=True, capability=(8, 0)
        ),
        Precision("float64", torch.float64, "float64"),
        Precision("bfloat16", torch.bfloat16, "bfloat16", capability=(8, 0)),
        Precision("float16", torch.float16, "float16"),
    )
}


def of_dtype(dtype: torch.dtype) -> Precision:
    """The precision that has the dtype and allows no rounding."""
    return PRECISIONS[str(dtype).removeprefix("torch.")]


def use_device(device: torch.device) -> None:
    """Make it the current one: streams, graphs and waiting are of the current CUDA device."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def set_precision(precision: Precision) -> None:
    """Make torch compute so from now on, in this process."""
    # The older switches: they set the newer ones (fp32_precision) too, and Inductor reads both.
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32


def describe_settings(device: torch.device) -> dict[str, Any]:
    """The settings that decide how precisely and by which algorithms the device computes."""
    if device.type != "cuda":
        return {}
    return {
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
    }


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Round float32 to the 10 explicit significand bits of tf32, ties to even; infinities stay."""
    bits = tensor.contiguous().view(torch.int32)
    dropped = 13  # of float32's 23
    rounded = bits + (bits >> dropped & 1) + (1 << dropped - 1) - 1 >> dropped << dropped
    return torch.where(tensor.isfinite(), rounded.view(torch.float32), tensor)


class RoundToTf32(torch.autograd.Function):
    """:func:`round_to_tf32`, whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Round."""
        return round_to_tf32(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Pass the gradient on as it is."""
        return grad


def with_tf32_operands(module: nn.Module) -> nn.Module:
    """Make a module's convolutions and linear layers round weight and input to tf32; in place.

    What stock layers computed so are off by is what tf32 costs, on any device, whichever algorithm
    a library would have chosen for them.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                layer.weight.copy_(round_to_tf32(layer.weight))
            layer.register_forward_pre_hook(lambda _layer, args: (RoundToTf32.apply(args[0]),))
    return module
