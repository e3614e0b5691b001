"""Checkpoint files: written whole or not at all, checked before anything in them is believed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from atomic import write_atomically

CHECKPOINT = "checkpoint.pt"  # its name in a run's folder

FORMAT = "fusedcnn examples/train_cifar10.py, version 1"

# What a checkpoint holds, besides "format"; train_cifar10.Run.state_dict writes it.
CONTENTS: dict[str, type] = {
    "settings": dict,
    "data": dict,
    "environment": dict,
    "model": dict,
    "optimizer": dict,
    "random": dict,
    "epoch": int,
    "step": int,
    "loss_sum": float,
    "correct": int,
    "seconds": float,
    "history": list,
}


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this format; the message is one line."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically.

    Raises:
        OSError: it cannot be written; what stood at ``path`` before still stands there.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running any code that the file may carry.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        # torch.load does not look at the checksums that torch.save has written.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: expected tensors and plain values, got others") from error
    except Exception as error:  # zipfile, pickle and torch raise a dozen classes on damaged files
        raise CheckpointError(
            f"{path} is no checkpoint, or damaged: {first_line(error)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format", "no format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT!r}, got {got!r}")
    for key, kind in CONTENTS.items():
        if not isinstance(state.get(key), kind):
            got = type(state[key]).__name__ if key in state else "nothing"
            raise CheckpointError(f"{path}: expected {key!r} to be a {kind.__name__}, got {got}")
    return state


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
