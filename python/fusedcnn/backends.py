"""Switches that trade speed for exactness, in the manner of :mod:`torch.backends`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fusedcnn._ops import _C  # which imports torch first


class _Winograd:
    """``fusedcnn.backends.winograd``: may Winograd kernels be chosen on the CPU?

    They are as accurate as the stock layers within a small factor (docs/accuracy.md), but the
    largest of them decides windows whose outputs are exactly equal by its rounding. Process-wide.
    """

    __slots__ = ()  # setting another name is an error, not a switch without effect

    @property
    def enabled(self) -> bool:
        """Whether they may be chosen; True at the start."""
        return _C.winograd_allowed()

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"enabled: expected a bool, got {value!r}")
        _C.allow_winograd(value)

    @contextlib.contextmanager
    def flags(self, enabled: bool) -> Iterator[None]:
        """Set ``enabled`` for a ``with`` block and put it back after."""
        before = self.enabled
        self.enabled = enabled
        try:
            yield
        finally:
            self.enabled = before


winograd = _Winograd()
