"""A device's kernels are checked at its first use: what follows from it. On a device that is none,
whose library computes on the CPU, but for what a test does to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fusedcnn
import pytest
import torch
from checked_device import (
    BACKWARD,
    CHECKED,
    FORWARD,
    KEYS,
    LISTED,
    NORM,
    NORM_BACKWARD,
    ON_GPU,
    OPERATORS,
    Library,
    another_process,
    break_kernel,
    cached_files,
    fail_kernel,
    wrap,
)
from fusedcnn import _cuda, _device_check, _first_use, _ops
from fusedcnn.__main__ import main
from fusedcnn._geometry import pack_geometry
from fusedcnn.functional import why_stock
from torch import Tensor
from torch._subclasses import FakeTensorMode

quiet = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _one_thread(restore_threads):
    """Operands are so small that threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def library(monkeypatch, tmp_path) -> Iterator[Library]:
    """That of a process in which torch has a GPU, and nobody has used a block on it."""
    library = Library()
    file = tmp_path / "library.so"
    file.write_bytes(b"code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_cuda, "_library", library)
    monkeypatch.setattr(_cuda, "_PATH", file)
    monkeypatch.setattr(_cuda, "reason", None)
    monkeypatch.setattr(_first_use, "switch", "auto")
    monkeypatch.setattr(_first_use, "_findings", {})
    monkeypatch.setattr(_first_use, "_lost", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    for name, answer in {
        "_device": torch.device("cpu"), "_name": "A GPU", "_capturing": False, "_driver": "1.2",
        "_on_a_stream": contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(_first_use, name, lambda index=0, answer=answer: answer)
    for operator in OPERATORS:
        wrap(monkeypatch, operator, lambda *_: library.ran.append(library.tried))
    with _ops.force(kernel="general"):
        yield library


# ---- what follows from its findings --------------------------------------------------------------


@quiet
def test_a_right_device_is_checked_once(library):
    assert _first_use.why_stock(ON_GPU) is None
    assert _first_use.why_stock_batch_norm(ON_GPU) is None
    assert set(library.ran) == {*(kernel.name for kernel in LISTED), ""}
    assert library.settled == {0: [None] * len(KEYS)}
    assert library.tried == ""
    count = len(library.ran)
    assert _first_use.why_stock(ON_GPU) is None
    assert len(library.ran) == count
    assert {_first_use.state_of(0, key) for key in KEYS} == {CHECKED}
    (row,) = fusedcnn.build_info()["cuda"]["devices"]
    json.dumps(row)
    assert (row["index"], row["state"], row["failed"], row["stock"]) == (0, CHECKED, {}, None)


@pytest.mark.parametrize(
    ("operator", "kernel"), [(FORWARD, "cuda_cores_3x3"), (BACKWARD, "winners_3x3")]
)
def test_a_wrong_kernel_is_not_used(library, monkeypatch, operator, kernel):
    """The others are, and nobody needs the stock layers."""
    break_kernel(monkeypatch, library, operator, kernel)
    key = next(key for key in KEYS if key.endswith(kernel))
    with pytest.warns(RuntimeWarning, match=rf"A GPU \(sm_120\), and others .*: {key}: \w+ of \["):
        assert _first_use.why_stock(ON_GPU) is None
    assert _first_use.why_stock_batch_norm(ON_GPU) is None
    for name, reason in zip(KEYS, library.settled[0], strict=True):
        assert (reason is None) == (name != key)
        assert _first_use.state_of(0, name).startswith("failed: " if name == key else CHECKED)
        assert reason is None or reason.startswith("failed its check on A GPU (sm_120): ")


def test_without_a_kernel_for_everything_the_stock_layers_compute(library, monkeypatch):
    break_kernel(monkeypatch, library, BACKWARD, "library")
    with FakeTensorMode():
        input = torch.empty(1, 3, 4, 4, device="cuda:0")
        weight = torch.empty(2, 3, 3, 3, device="cuda:0")
    with pytest.warns(RuntimeWarning, match="and the stock layers compute in their place"):
        reason = why_stock(input, weight, pack_geometry((3, 3)), False)
    assert reason.startswith("grad_weight library: failed its check on A GPU (sm_120): grad_")
    assert _first_use.why_stock_batch_norm(ON_GPU) == reason
    said = fusedcnn.explain(input, weight)["grad_input"]
    assert (said.kernel, said.why_not) == ("stock layers", {"any kernel": reason})


@pytest.mark.parametrize("operator", [NORM, NORM_BACKWARD])
def test_a_wrong_batch_norm_concerns_nobody_else(library, monkeypatch, operator):
    break_kernel(monkeypatch, library, operator, "")
    with pytest.warns(RuntimeWarning, match=r"batch_norm: \w+ of \["):
        assert _first_use.why_stock(ON_GPU) is None
    assert _first_use.why_stock_batch_norm(ON_GPU).startswith("batch_norm: failed its check on ")
    assert [reason is None for reason in library.settled[0]] == [True] * 6 + [False]


def test_a_kernel_that_cannot_be_launched_is_not_used(library, monkeypatch):
    error = RuntimeError("fusedcnn: launching CUDA kernel x: cudaErrorInvalidValue: no\nMore")
    fail_kernel(monkeypatch, library, "cuda_cores_3x3", error)
    with pytest.warns(RuntimeWarning, match="forward cuda_cores_3x3: float32, contiguous: launch"):
        assert _first_use.why_stock(ON_GPU) is None
    assert "cudaErrorInvalidValue: no" in library.settled[0][0]
    assert library.settled[0][1:] == [None] * 6


def test_a_fault_that_takes_the_device_away(library, monkeypatch):
    """It is named at every call, and the next process has learned of it."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    fail_kernel(monkeypatch, library, "cuda_cores_3x3", error)

    def synchronize(key: str, device: torch.device) -> None:
        raise _device_check.LostError(key)

    monkeypatch.setattr(_device_check, "_synchronize", synchronize)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="forward cuda_cores_3x3, a CUDA kernel, faulted on"):
            _first_use.why_stock(ON_GPU)
    assert set(library.ran) == set()
    assert not library.settled
    assert "The next one will not run it." in fusedcnn.build_info()["cuda"]["devices"][0]["state"]
    another_process(library)
    with pytest.warns(RuntimeWarning, match="forward cuda_cores_3x3: it faulted"):
        assert _first_use.why_stock(ON_GPU) is None
    assert "cuda_cores_3x3" not in library.ran
    assert [reason is None for reason in library.settled[0]] == [False] + [True] * 6


@quiet
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("fusedcnn: no forward kernel covers this call: x: the GPU is older"),
    ],
    ids=["memory", "capture", "refused"],
)
def test_what_could_not_be_checked_is_not_used_and_not_kept(library, monkeypatch, error):
    fail_kernel(monkeypatch, library, "cuda_cores_3x3", error)
    assert _first_use.why_stock(ON_GPU) is None
    assert _first_use.state_of(0, KEYS[0]).startswith("not checked: ")
    assert library.settled[0][0].startswith("not checked on A GPU (sm_120): ")
    assert library.settled[0][1:] == [None] * 6
    (file,) = cached_files()
    assert list(json.loads(file.read_text())["kernels"]) == KEYS[1:]


def test_what_the_check_itself_cannot_do_leaves_the_stock_layers(library, monkeypatch):
    monkeypatch.setattr(_device_check, "check_batch_norm", None)
    with pytest.warns(RuntimeWarning, match="the stock layers compute on device 0: .*TypeError"):
        assert "could not be checked: TypeError" in _first_use.why_stock(ON_GPU)
    assert _first_use.why_stock(ON_GPU) == _first_use.why_stock_batch_norm(ON_GPU)
    assert not library.settled


# ---- where there is no check ---------------------------------------------------------------------


@quiet
def test_a_device_without_code_has_the_stock_layers(library):
    library.answer = b"fusedcnn: using CUDA device 0: no kernel image is available"
    reason = "CUDA kernels do not run on A GPU: using CUDA device 0: no kernel image is available"
    assert _first_use.why_stock(ON_GPU) == _first_use.why_stock_batch_norm(ON_GPU) == reason
    assert not library.ran
    assert not library.settled


@quiet
def test_a_tested_architecture_is_checked_where_that_is_asked_for(library):
    library.answer = b"90 90 1"
    assert _first_use.why_stock(ON_GPU) is None
    assert not library.ran
    assert library.settled == {0: [None] * len(KEYS)}
    assert _first_use.state_of(0, KEYS[0]) == "not checked: all kernels are tested on sm_90"
    fusedcnn.backends.cuda.check = "always"
    assert library.settled == {0: None}
    assert _first_use.why_stock(ON_GPU) is None
    assert library.ran
    assert _first_use.state_of(0, KEYS[0]) == "checked on A GPU (sm_90)"


@quiet
def test_the_check_can_be_turned_off(library, monkeypatch):
    break_kernel(monkeypatch, library, FORWARD, "library")
    fusedcnn.backends.cuda.check = "never"
    assert _first_use.why_stock(ON_GPU) is None
    assert not library.ran
    assert library.settled == {0: [None] * len(KEYS)}
    assert _first_use.state_of(0, KEYS[0]) == "not checked: switched off"


def test_the_switch_names_what_is_wrong():
    with pytest.raises(ValueError, match="check: expected one of 'auto', 'always', 'never', got 1"):
        fusedcnn.backends.cuda.check = 1
    process = subprocess.run(
        [sys.executable, "-c", "import fusedcnn"], capture_output=True, text=True,
        env={**os.environ, "FUSEDCNN_CUDA_CHECK": "sometimes"}, cwd=Path.home(),
    )  # fmt: skip
    assert "ImportError: FUSEDCNN_CUDA_CHECK: expected one of auto, always" in process.stderr


def test_nothing_is_checked_while_a_graph_is_captured(library, monkeypatch):
    """The stock layers are in that graph; the next call finds out."""
    monkeypatch.setattr(_first_use, "_capturing", lambda index: True)
    assert "captured before" in _first_use.why_stock(ON_GPU)
    assert "captured before" in _first_use.why_stock_batch_norm(ON_GPU)
    assert not library.ran
    assert not library.settled
    monkeypatch.setattr(_first_use, "_capturing", lambda index: False)
    assert _first_use.why_stock(ON_GPU) is None
    assert library.ran


@quiet
@pytest.mark.parametrize("capability", [(9, 0), (8, 6), (12, 0)])
def test_a_capture_waits_for_no_check_that_nobody_needs(library, monkeypatch, capability):
    """Where all kernels are tested in code for the device, or the check is off."""
    monkeypatch.setattr(_first_use, "_capturing", lambda index: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    library.architectures, library.measured = "75-virtual 80-real 90-real 120", "86 90 "
    for switch in ("auto", "always", "never"):
        fusedcnn.backends.cuda.check = switch
        needless = switch == "never" or (switch == "auto" and capability == (9, 0))
        assert (_first_use.why_stock(ON_GPU) is None) == needless, switch
    assert not library.ran
    assert not _first_use._findings


def test_a_fake_tensor_begins_nothing(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert _first_use.why_stock(ON_GPU) is None
    assert not library.ran
    assert _first_use.state_of(0, KEYS[0]) == "not checked: not used yet"


# ---- what the check leaves alone -----------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@quiet
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad, torch.inference_mode, FakeTensorMode, deterministic,
        lambda: torch.autocast("cpu", torch.bfloat16), lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"), lambda: torch.autograd.graph.saved_tensors_hooks(id, id),
    ],
    ids=["no_grad", "inference", "fake", "deterministic", "autocast", "dtype", "device", "hooks"],
)  # fmt: skip
def test_the_callers_modes_and_random_numbers_play_no_part(library, mode):
    _device_check.forget_cases()
    state = torch.get_rng_state()
    with mode():
        assert _first_use.why_stock(ON_GPU) is None
    assert library.settled == {0: [None] * len(KEYS)}
    assert torch.equal(torch.get_rng_state(), state)


@quiet
def test_under_a_transform(library):
    def function(x: Tensor) -> Tensor:
        assert _first_use.why_stock(ON_GPU) is None
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))
    assert library.settled == {0: [None] * len(KEYS)}


@quiet
@pytest.mark.parametrize("wrong", [False, True])
def test_while_a_graph_is_compiled(library, monkeypatch, wrong):
    """Tracing asks once, and takes the answer for a constant: no break, no second graph."""
    if wrong:
        library.answer = b"fusedcnn: no code"
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def function(x: Tensor) -> Tensor:
        reasons = _first_use.why_stock(ON_GPU), _first_use.why_stock_batch_norm(ON_GPU)
        return x + 1 if reasons == (None, None) else x - 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == ([0, 0] if wrong else [2, 2])
    assert len(graphs) == 1
    assert bool(library.ran) != wrong
    torch._dynamo.reset()


@quiet
def test_threads_wait_for_one_check(library):
    devices = [torch.device("cuda", i % 2) for i in range(8)]
    with ThreadPoolExecutor(len(devices)) as pool:
        assert list(pool.map(_first_use.why_stock, devices)) == [None] * 8
    assert set(library.settled) == {0, 1}
    assert library.ran.count("cuda_cores_3x3") == 4 * 4 * 2  # blocks, types, layouts
    # The second device has the first's name, and its verdicts are on disk.


# ---- what is kept on disk ------------------------------------------------------------------------


@quiet
def test_another_process_need_not_run_it_again(library):
    _first_use.why_stock(ON_GPU)
    (file,) = cached_files()
    assert json.loads(file.read_text()) == {
        "device": "A GPU (sm_120)", "driver": "1.2", "kernels": dict.fromkeys(KEYS),
    }  # fmt: skip
    another_process(library)
    assert _first_use.why_stock(ON_GPU) is None
    assert not library.ran
    assert library.settled == {0: [None] * len(KEYS)}
    assert _first_use.state_of(0, KEYS[0]) == CHECKED


def test_another_process_warns_of_what_one_has_found(library, monkeypatch):
    break_kernel(monkeypatch, library, FORWARD, "cuda_cores_3x3")
    with pytest.warns(RuntimeWarning, match="forward cuda_cores_3x3: output of "):
        _first_use.why_stock(ON_GPU)
    another_process(library)
    with pytest.warns(RuntimeWarning, match="forward cuda_cores_3x3: output of "):
        _first_use.why_stock(ON_GPU)
    assert not library.ran


@quiet
@pytest.mark.parametrize("what", ["library", "driver", "device", "code"])
def test_another_library_driver_or_device_is_checked(library, monkeypatch, what):
    _first_use.why_stock(ON_GPU)
    another_process(library)
    if what == "library":
        _cuda._PATH.write_bytes(b"other code")
    elif what == "code":
        library.answer = b"120 120 0"
    else:
        monkeypatch.setattr(_first_use, {"driver": "_driver", "device": "_name"}[what],
                            lambda index=0: "another")  # fmt: skip
    assert _first_use.why_stock(ON_GPU) is None
    assert library.ran
    assert len(cached_files()) == 2


@quiet
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"kernels": []}', '{"kernels": {"forward library": 1}}']
)
def test_a_file_that_says_nothing_is_written_anew(library, content):
    _first_use.why_stock(ON_GPU)
    (file,) = cached_files()
    text = file.read_text()
    file.write_text(content)
    another_process(library)
    assert _first_use.why_stock(ON_GPU) is None
    assert library.ran
    assert file.read_text() == text
    assert cached_files() == [file]  # no temporary one is left


@quiet
def test_nowhere_to_write_is_no_error(library, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert _first_use.why_stock(ON_GPU) is None
    assert library.settled == {0: [None] * len(KEYS)}


@quiet
def test_a_relative_cache_folder_is_the_users_own(library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    _first_use.why_stock(ON_GPU)
    assert len(list(tmp_path.glob(".cache/fusedcnn/cuda_*.json"))) == 1


# ---- what people see -----------------------------------------------------------------------------


def test_the_command_line_tells(library, monkeypatch, capsys):
    break_kernel(monkeypatch, library, FORWARD, "cuda_cores_3x3")
    error = RuntimeError("fusedcnn: no forward kernel covers this call")
    fail_kernel(monkeypatch, library, "library", error)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_cuda, "info", lambda found=_cuda.info: {**found(), "toolkit": "13.0"})
    with pytest.warns(RuntimeWarning, match="the stock layers compute in their place"):
        assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"gpu      cuda:0    A GPU (sm_120): {CHECKED}" in said
    assert "           forward cuda_cores_3x3: failed: output of [2, 3, 12, 12] to 16" in said
    assert "           forward library: not checked: it covers no problem" in said
    assert "           stock layers: forward library: not checked on A GPU" in said
