"""A progress bar where tqdm is installed, plain lines where it is not. Both on stderr."""

from __future__ import annotations

import sys


class Progress:
    """Counts up to a known number of steps.

    Args:
        total: steps.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, unit="turn", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Tell what comes next."""
        if self._bar is not None:
            self._bar.set_description(text)
        else:
            percent = 100 * self.done // self.total
            # On a terminal one line that changes, in a log file one line each.
            start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
            print(f"{start}[{percent:3d} %] {text}", end=end, file=sys.stderr, flush=True)

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)

    def close(self) -> None:
        """Leave the line."""
        if self._bar is not None:
            self._bar.close()
        elif sys.stderr.isatty():
            print(file=sys.stderr)
