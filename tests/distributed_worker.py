"""What test_parallel.py starts with torchrun: a check of gradients in two processes.

torchrun --nproc-per-node 2 tests/distributed_worker.py ddp|ddp_compiled|fsdp|dtensor|batch_norm
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import fusedcnn
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_cifar10 import RANK, WORLD_SIZE, joined, train_step

# Gradients of 7 images in float64: sums of at most 7 * 1,024 terms in two orders.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def check_dtensor() -> None:
    """A batch sharded over the processes, parameters on both, as distribute_module leaves them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    block = fusedcnn.ConvReLUMaxPool2d(3, 4, 3, padding=1).double()
    sharded = distribute_module(copy.deepcopy(block), mesh)
    images = torch.randn(6, 3, 8, 8).double()
    ours = sharded(distribute_tensor(images, mesh, [Shard(0)]))
    theirs = block(images)
    torch.testing.assert_close(ours.full_tensor(), theirs, **CLOSE)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for one, other in zip(sharded.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad, **CLOSE)
    assert any("DTensor" in reason for reason in fusedcnn.build_info()["stock_calls"])


def check_batch_norm() -> None:
    """Stock and fused in lock-step: gradients are averaged, running statistics are rank 0's."""
    torch.manual_seed(0)
    block = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    stock = nn.Sequential(*block, nn.Flatten(), nn.Linear(36, 10)).double()
    models = stock, fusedcnn.fuse(copy.deepcopy(stock))
    parallel = [DistributedDataParallel(model) for model in models]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    for _ in range(3):
        images, labels = torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))
        batch = images[RANK::WORLD_SIZE], labels[RANK::WORLD_SIZE]
        for model, optimizer in zip(parallel, optimizers, strict=True):
            fusedcnn.train_step(model, F.cross_entropy, optimizer, *batch)
        states = [model.state_dict() for model in models]
        torch.testing.assert_close(*states, **CLOSE)
    assert not fusedcnn.build_info()["stock_calls"]


def check(kind: str) -> None:
    """Compare with one process on the whole batch, over three steps of SGD with momentum."""
    torch.manual_seed(0)
    model = fusedcnn.FusedSimpleCNN().double()
    model.classifier[3] = nn.Identity()
    alone = copy.deepcopy(model)
    if kind == "fsdp":
        # Imported here: early imports of such modules hide what joined() has to import itself.
        from torch.distributed.fsdp import fully_shard

        for block in (model.features[0], model.features[3], model.classifier):
            fully_shard(block)
        parallel = fully_shard(model)
    else:
        parallel = DistributedDataParallel(model)
    if kind == "ddp_compiled":
        parallel = torch.compile(parallel, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, alone)]
    for n in (7, 4, 1):  # an odd batch, an even one, and one that leaves a process without images
        images, labels = torch.randn(n, 3, 32, 32).double(), torch.randint(10, (n,))
        share = slice(RANK, None, WORLD_SIZE)
        sums = train_step(parallel, optimizers[0], images[share], labels[share], n)
        dist.all_reduce(sums)
        loss = fusedcnn.train_step(alone, F.cross_entropy, optimizers[1], images, labels)
        torch.testing.assert_close(sums[0] / n, loss, **CLOSE)
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            for one, other in ((ours, theirs), (ours.grad, theirs.grad)):
                whole = one.full_tensor() if kind == "fsdp" else one
                torch.testing.assert_close(whole.detach(), other.detach(), **CLOSE, msg=name)


def gloo_threads() -> list[str]:
    """Names of this process's threads that belong to gloo, where the system tells (Linux)."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    kind = sys.argv[1]
    with joined(torch.device("cpu")):
        if sys.platform == "linux" and torch.__version__ >= (2, 11):  # 2.10 names none
            assert gloo_threads()
        if kind == "dtensor":
            check_dtensor()
        elif kind == "batch_norm":
            check_batch_norm()
        else:
            check(kind)
        who = f"rank {dist.get_rank()} of {dist.get_world_size()}"
        print(f"{who}: {kind} agrees", file=sys.stderr)
    sys.stderr.flush()
    if kind in ("fsdp", "dtensor"):
        # Device meshes keep the group, and a thread of it that is still busy now and then aborts
        # the interpreter's own way out, after all is checked.
        os._exit(0)
    left = gloo_threads()
    assert not left, f"expected no thread of the process group after joined(), got {left}"
