"""One training run in several processes: what torchrun starts, and nothing where it did not."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """One process among those of the run.

    Attributes:
        rank: 0 to size - 1; rank 0 alone speaks and writes files.
        size: how many there are.
        local_rank: which one it is on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """The process's part of a batch; empty where there are fewer images than processes."""
        return index[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over all processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, which all have to ask for."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def described_by_environment() -> Processes:
    """What torchrun's variables say; a process alone where there are none."""
    environ = os.environ
    return Processes(
        int(environ.get("RANK", 0)),
        int(environ.get("WORLD_SIZE", 1)),
        int(environ.get("LOCAL_RANK", 0)),
    )


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the others, by nccl on GPUs and gloo elsewhere; all but the first fall silent."""
    processes = described_by_environment()
    if processes.size == 1:
        yield processes
        return
    # This module's functions take the default process group as a default argument, evaluated once.
    # If it were first imported later, as DistributedDataParallel does, they would keep the group
    # and its threads past destroy_process_group; a thread that then drops a Python object while
    # the interpreter finalizes aborts the process.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        silent = contextlib.redirect_stdout(io.StringIO())
        with contextlib.nullcontext() if processes.first else silent:
            yield processes
    finally:
        dist.destroy_process_group()
