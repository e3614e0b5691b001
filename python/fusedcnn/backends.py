"""Switches of selection, in the manner of :mod:`torch.backends`.

``fusedcnn.backends.benchmark = True``: on the CPU, each pass of a problem is timed with every
kernel that covers it, at its first call with these sizes, layout and number of threads, and the
quickest computes it from then on. Off at the start: then the choice depends on the problem and the
machine alone. Results may differ from run to run by the rounding of one kernel or another. A
compiled graph times at its own first call, never while it is traced. Process-wide. On a GPU
``torch.backends.cudnn.benchmark`` does the same, for these kernels as for torch's.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator

from fusedcnn import _first_use
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


class _Cuda:
    """``fusedcnn.backends.cuda``: are CUDA kernels checked where they have not been tested?

    The first call of a block on a GPU of another architecture runs each kernel on problems with
    known answers, and those that fail are not used (docs/cuda.md). Process-wide.
    """

    __slots__ = ()

    @property
    def check(self) -> str:
        """``"auto"`` at the start; ``"always"``, on any GPU; or ``"never"``.

        ``FUSEDCNN_CUDA_CHECK`` in the environment sets another start. Setting it makes the next
        call on each device look again.
        """
        return _first_use.switch

    @check.setter
    def check(self, value: str) -> None:
        if value not in _first_use.SWITCHES:
            expected = ", ".join(map(repr, _first_use.SWITCHES))
            raise ValueError(f"check: expected one of {expected}, got {value!r}")
        _first_use.switch = value
        _first_use.forget()


cuda = _Cuda()


class _Backends(types.ModuleType):
    """A module that can be assigned to with effect, as torch's own switches can."""

    @property
    def benchmark(self) -> bool:
        """Whether kernels are chosen by timing them; False at the start."""
        return _C.benchmarking()

    @benchmark.setter
    def benchmark(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"benchmark: expected a bool, got {value!r}")
        _C.benchmark(value)


sys.modules[__name__].__class__ = _Backends
