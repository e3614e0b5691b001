"""The check of a device's first use on a GPU: that it passes there, and disturbs nothing."""

from __future__ import annotations

import contextlib

import fusedcnn
import pytest
import torch
from checked_device import FORWARD, cached_files, wrap
from fusedcnn import _cuda, _first_use, _ops, conv_relu_max_pool2d
from fusedcnn._geometry import pack_geometry
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch, tmp_path):
    """A GPU on which nobody has used a block yet, to be checked whatever it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.cuda.init()
    fusedcnn.backends.cuda.check = "always"
    yield
    fusedcnn.backends.cuda.check = "auto"


def images() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 3, 12, 12, device="cuda"), torch.ones(16, 3, 3, 3, device="cuda")


@pytest.mark.filterwarnings("error:fusedcnn")
def test_a_gpus_kernels_are_right():
    said = fusedcnn.explain(*images(), padding=1)
    assert all(choice.state.startswith("checked on ") for choice in said.values()), said
    (row, *_) = fusedcnn.build_info()["cuda"]["devices"]
    assert (row["failed"], row["skipped"], row["stock"]) == ({}, {}, None)


def test_a_gpus_wrong_kernel_is_not_chosen(monkeypatch):
    """The trial's switch is this thread's, and its kernel the one that ran."""
    before = fusedcnn.explain(*images(), padding=1)["forward"].kernel
    fusedcnn.backends.cuda.check = "always"
    for file in cached_files():
        file.unlink()

    @contextlib.contextmanager
    def trial(name: str, tf32: bool, right=_cuda.trial):
        with right(name, tf32), monkeypatch.context() as patch:
            if name == before:
                wrap(patch, FORWARD, lambda results, _: results[0].view(-1)[:1].add_(1))
            yield

    monkeypatch.setattr(_cuda, "trial", trial)
    with pytest.warns(RuntimeWarning, match=f"forward {before}: output of "):
        output = conv_relu_max_pool2d(*images(), padding=1)
    assert output.amax() == 27
    said = fusedcnn.explain(*images(), padding=1)["forward"]
    assert said.kernel == "library"
    assert said.why_not[before].startswith("failed its check on ")
    with _cuda.force(before):
        assert conv_relu_max_pool2d(*images(), padding=1).amax() == 27
    with fusedcnn._ops.below_autograd():
        output = _ops.forward_op(*images(), None, pack_geometry((3, 3), padding=1), True)[0]
    assert output.amax() == 27


@pytest.mark.filterwarnings("error:fusedcnn")
def test_a_capture_ahead_of_the_check_has_the_stock_layers():
    input, weight = images()
    torch.relu(torch.nn.functional.conv2d(input, weight, padding=1))  # warms cuDNN
    torch.cuda.synchronize()
    fusedcnn._stock.calls.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = conv_relu_max_pool2d(input, weight, padding=1)
    graph.replay()
    assert output.amax() == 27
    assert not _first_use._findings
    assert list(fusedcnn._stock.calls) == [_first_use._TOO_EARLY]
    conv_relu_max_pool2d(input, weight, padding=1)
    assert _first_use._findings[0].state.startswith("checked on ")


def test_the_check_leaves_a_gpu_as_it_was():
    """Current device and stream, random numbers, and all memory but what it briefly needs."""
    input, weight = images()
    torch.cuda.synchronize()
    state, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            assert _first_use.why_stock(input.device) is None
            assert torch.cuda.current_stream() == stream
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _first_use._findings[0].state.startswith("checked on ")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.cuda.memory_allocated() == allocated
    assert weight.amax() == 1


@pytest.mark.filterwarnings("error:fusedcnn")
def test_a_compiled_call_is_checked_while_it_is_traced():
    input, weight = images()
    compiled = torch.compile(conv_relu_max_pool2d, fullgraph=True)
    assert compiled(input, weight, padding=1).amax() == 27
    assert _first_use._findings[0].state.startswith("checked on ")
    torch._dynamo.reset()
