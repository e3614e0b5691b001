"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file ``path``; a reader finds, at any moment, the old or the new one whole.

    That holds when the process is killed, when the disk is full, and when the power fails. The
    temporary file has a fixed name, so that killed processes leave one behind at most and the next
    write takes it away; a file is therefore to be written by one process at a time.

    Raises:
        OSError: the old file still stands (the new one, where it was only the folder that could not
            be synchronised), and no temporary file is left.
    """
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # Without this, a rename can reach the disk before the bytes do.
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # it bears the temporary's name, or none
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    if os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
