"""Finds the torch package whose headers the extension is compiled against.

``python torch_location.py`` prints its folder, or says in one line on stderr what is missing.
CMakeLists.txt and the build backend both ask here, so they cannot disagree. ``FUSEDCNN_TORCH_DIR``
overrides the search: the folder of a torch package (the one that holds ``include/`` and ``lib/``).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

_HEADER = Path("include/torch/csrc/stable/library.h")
# `headeronly/util/shim_utils.h` came with 2.10, the oldest torch whose headers this builds against.
_HEADER_2_10 = Path("include/torch/headeronly/util/shim_utils.h")


def torch_dir() -> Path | None:
    """Folder of the torch package to compile against, or None when there is none.

    Raises:
        RuntimeError: ``FUSEDCNN_TORCH_DIR`` names a folder without torch 2.10's stable-ABI headers.
    """
    override = os.environ.get("FUSEDCNN_TORCH_DIR")
    if override:
        if not _has_headers(Path(override)):
            raise RuntimeError(
                f"FUSEDCNN_TORCH_DIR: expected a torch >= 2.10 package folder, holding {_HEADER} "
                f"and {_HEADER_2_10}, got {override!r}"
            )
        return Path(override)
    return next(filter(_has_headers, _candidates()), None)


def why_none() -> str:
    """One line for a build that finds no torch to compile against."""
    found = "none"
    if version := next(filter(Path.is_file, (f / "version.py" for f in _candidates())), None):
        number = re.search(r"^__version__ = '(.+)'", version.read_text(), re.M)
        found = f"{number[1] if number else 'an unknown version'} in {version.parent}"
    return f"Building fusedcnn needs torch >= 2.10 installed for {sys.executable}, found {found}"


def _candidates() -> list[Path]:
    folders = []
    spec = importlib.util.find_spec("torch")  # build requirement, or no isolation
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    for scheme_path in ("purelib", "platlib"):  # the target environment, hidden by isolation
        folders.append(Path(sysconfig.get_path(scheme_path)) / "torch")
    return folders


def _has_headers(folder: Path) -> bool:
    return (folder / _HEADER).is_file() and (folder / _HEADER_2_10).is_file()


if __name__ == "__main__":
    try:
        print(torch_dir() or sys.exit(why_none()))
    except RuntimeError as error:
        sys.exit(str(error))
