"""Tools of others that know layers by their type: errors where they would be silently wrong.

A block is a Conv2d, and such a tool takes it for one that computes no ReLU and no pool. None asks
before; but each calls some method of the module that it is about to replace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# What calls named_children of the module, and __reduce_ex__ for copy.deepcopy.
_REPLACING = {"m_fn_rec": "torch.utils.mkldnn.to_mkldnn"}
_COPYING = {"fuse_conv_bn_eval": "torch.nn.utils.fusion.fuse_conv_bn_eval"}
_CONVERTING = {
    name: f"{name}, which puts a SyncBatchNorm in the place of a folded BatchNorm2d,"
    for name in ("convert_sync_batchnorm", "convert_syncbn_model")  # torch and timm, apex
}


def _refuse(module: nn.Module, tool: str | None) -> None:
    if tool is not None:
        raise RuntimeError(
            f"{type(module).__name__}: {tool} does not know what is fused in this module, and the "
            "result would be wrong; call fusedcnn.unfuse first"
        )


class KnownByItsType(nn.Module):
    """Base of the blocks, for which a tool may take them to be convolutions."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; an error for tools that would replace a convolution."""
        _refuse(self, _REPLACING.get(sys._getframe(1).f_code.co_name))
        return super().named_children()

    def __reduce_ex__(self, protocol: Any) -> Any:
        copying = sys._getframe(1).f_back  # None where pickle is called by the program itself
        _refuse(self, copying and _COPYING.get(copying.f_code.co_name))
        return super().__reduce_ex__(protocol)

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        """As of any module; an error for captum, whose rules are by type (ReLU, MaxPool2d)."""
        if (getattr(fn, "__module__", None) or "").startswith("captum."):
            _refuse(self, f"captum ({getattr(fn, '__qualname__', fn)})")
        return super().apply(fn)


class FoldedByItsType(nn.Module):
    """Base of a normalisation that passes its input on, for which a tool may put one that works."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; an error for tools that would put another normalisation here."""
        _refuse(self, (_CONVERTING | _REPLACING).get(sys._getframe(1).f_code.co_name))
        return super().named_children()
