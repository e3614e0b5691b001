"""Many processes and many threads: DDP, FSDP2, DataLoader workers, fork, Python threads."""

from __future__ import annotations

import concurrent.futures
import csv
import functools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
import torch.distributed
from checks import step
from fusedcnn import conv_relu_max_pool2d
from geometries import stock
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)


@pytest.fixture
def example() -> Path:
    """The example, where what it needs is installed."""
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    return ROOT / "examples/train_cifar10.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)


# Two processes on this machine; at a free port, and ended with the test.
torchrun = functools.partial(
    run, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
)


@needs_gloo
@pytest.mark.parametrize("kind", ["ddp", "ddp_compiled", "fsdp", "dtensor", "batch_norm"])
def test_gradients_are_those_of_one_process_on_the_whole_batch(kind, example):
    if kind == "dtensor" and torch.__version__ < (2, 11):
        pytest.skip("torch 2.10 has no max_pool2d for DTensors")
    done = torchrun(ROOT / "tests/distributed_worker.py", kind)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2: {kind} agrees" in done.stderr


@needs_gloo
def test_train_cifar10_under_torchrun(tmp_path, example):
    """The example as it is: both train, one speaks and writes; resumed by one process alone."""
    output = tmp_path / "run"
    small = ["--train-images", 61, "--test-images", 20, "--batch-size", 16, "--output", output]
    done = torchrun(example, *small, "--epochs", 2, "--checkpoint-steps", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 1/2") == 1
    assert done.stdout.count("processes 2") == 1
    files = {"checkpoint.pt", "metrics.csv", "curves.png", "predictions.png"}
    assert {path.name for path in output.iterdir()} == files
    with open(output / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:  # means over all 61 images: counts are whole numbers
        correct = float(row["train_accuracy"]) * 61
        assert abs(correct - round(correct)) < 1e-4
        assert 2 < float(row["train_loss"]) < 2.7  # near ln 10 at first

    bad = torchrun(example, *small)
    assert bad.returncode != 0
    assert "holds a run already" in bad.stderr

    alone = run(example, "--resume", output, "--epochs", 3, "--threads", 1)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "note: was" in alone.stdout
    assert "processes 2" in alone.stdout


# ---- fork ----------------------------------------------------------------------------------------


def results(function, seed: int) -> list[torch.Tensor]:
    """On operands of different sizes; integers, so that every kernel's result is exact."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = 3 + seed % 5, 8 + 3 * (seed % 7)
    shapes = ((1 + seed % 4, channels, size, size + 1), (16, channels, 3, 3), (16,))
    tensors = [torch.randint(-2, 3, s, generator=generator).float() for s in shapes]
    return step(functools.partial(function, padding=1), tensors)


def agrees(seed: int, expected: list[torch.Tensor] | None = None) -> bool:
    expected = expected or results(stock, seed)
    pairs = zip(results(conv_relu_max_pool2d, seed), expected, strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


class Features(Dataset):
    """Computes with the fused block in the worker."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, seed: int) -> torch.Tensor:
        return torch.tensor([seed, agrees(seed)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method, exact):
    """Workers of a parent that has used the block already, and its threads."""
    assert all(agrees(seed) for seed in range(3))
    loader = DataLoader(
        Features(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=120,
        worker_init_fn=_without_winograd,
    )  # fmt: skip
    rows = torch.cat(list(loader))
    assert rows.tolist() == [[seed, 1] for seed in range(12)]
    assert agrees(5)


def _without_winograd(_worker: int) -> None:
    fusedcnn.backends.winograd.enabled = False


def _in_child(queue) -> None:
    torch.set_num_threads(1)  # GNU OpenMP's threads do not survive a fork; see torch's notes
    queue.put([agrees(seed) for seed in range(6)])


def test_fork(exact):
    """A forked child computes right; the parent goes on."""
    assert agrees(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=120) == [True] * 6
    child.join(60)
    assert child.exitcode == 0
    assert agrees(1)


# ---- threads -------------------------------------------------------------------------------------


def test_python_threads(exact):
    """Eight threads at once, each with sizes of its own, forward and backward."""
    expected = [results(stock, seed) for seed in range(16)]

    def wrong(thread: int) -> int:
        seeds = ((thread * 3 + turn) % 16 for turn in range(20))
        return sum(not agrees(seed, expected[seed]) for seed in seeds)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(wrong, range(8))) == [0] * 8


def test_python_threads_share_a_model():
    """Hogwild: one model, eight threads; every output is that of a call alone, to the bit."""
    model = fusedcnn.FusedSimpleCNN().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        alone = {count: model(images[:count]) for count in (1, 4)}

    @torch.no_grad()
    def right(thread: int) -> bool:
        count = 4 if thread % 2 else 1
        return all(torch.equal(model(images[:count]), alone[count]) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(8)))
