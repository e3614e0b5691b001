"""What all tests share."""

from __future__ import annotations

import importlib

import fusedcnn
import pytest
import torch
from bench_scripts import BENCHMARKS


def pytest_configure(config: pytest.Config) -> None:
    # A remark on the stock layer's own speed, not on ours.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out unless -m says which to run."""
    if not config.getoption("-m"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def restore_threads():
    """Give torch its number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact():
    """Only kernels whose results on small integers are exact."""
    with fusedcnn.backends.winograd.flags(enabled=False):
        yield


@pytest.fixture
def module(monkeypatch, restore_threads):
    """Imports one of the benchmarks' modules by name; what they set is put back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = kept
