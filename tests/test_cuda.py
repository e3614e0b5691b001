"""The CUDA kernels on a GPU. Without one: what can be seen of them (the kernels themselves run in
the torch-free self-test of tests/cuda_on_cpu).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
from checks import over, over_dtypes
from forcing import CUDA_KERNELS, PASSES, Forced, run_pass
from fusedcnn import _cuda, _stock, conv_relu_max_pool2d
from fusedcnn.functional import pack_geometry, why_stock
from geometries import BLOCKS
from reference import (
    GRADS,
    LAYOUTS,
    exact_case,
    float_case,
    gradients_of_winners,
    largest_error,
    with_layout,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
BUILT = _cuda._PATH.is_file()


def gpu(function):
    """Marks a test that needs a GPU."""
    there = torch.cuda.is_available()
    return pytest.mark.cuda(pytest.mark.skipif(not there, reason="needs a CUDA device")(function))


# The lowest decorator varies slowest, so that a block's reference is computed once.
over_blocks = over(BLOCKS)


# ---- without a GPU ------------------------------------------------------------------------------


def test_build_info_says_why_not():
    info = fusedcnn.build_info()["cuda"]
    assert set(info) == {
        "built", "loaded", "reason", "toolkit", "architectures", "measured", "kernels", "devices",
    }  # fmt: skip
    assert info["built"] == BUILT
    assert info["loaded"] == (info["reason"] is None) == bool(info["kernels"])
    device = fusedcnn.build_info()["devices"]["cuda"]
    assert device == ("fused kernels" if info["loaded"] else f"stock layers: {info['reason']}")
    if torch.version.cuda is None:
        assert not info["loaded"]
        assert "CUDA" in info["reason"]


def test_force_names_what_is_wrong():
    if _cuda.reason is None:
        with pytest.raises(ValueError, match="kernel: expected one of "):
            _cuda.force("fastest").__enter__()
    else:
        with pytest.raises(RuntimeError, match="CUDA kernels are not loaded"):
            _cuda.force("library").__enter__()


def test_routing(monkeypatch):
    """Tensors on CUDA go to the fused kernels exactly where these are loaded; by fake tensors."""
    with FakeTensorMode():
        input = torch.empty(1, 1, 4, 4, device="cuda")
        wide = torch.empty(1, 1, 2**14, 2**14, device="cuda")
    geometry = pack_geometry((1, 1))
    monkeypatch.setattr(_cuda, "reason", "for a test")
    reason = why_stock(input, input, geometry, False)
    assert reason == "no fused kernel for device type 'cuda': for a test"
    monkeypatch.setattr(_cuda, "reason", None)
    assert why_stock(input, input, geometry, False) is None
    assert "pixels" in why_stock(wide, input, geometry, False)


def test_switches_follow_torch(monkeypatch):
    """The library hears of torch's settings for convolutions when they change, and only then."""
    told, benchmarks = [], []

    class Library:
        fusedcnn_cuda_allow_tf32 = staticmethod(told.append)
        fusedcnn_cuda_benchmark = staticmethod(benchmarks.append)

    monkeypatch.setattr(_cuda, "_library", Library)
    monkeypatch.setattr(_cuda, "_tf32", False)
    monkeypatch.setattr(_cuda, "_benchmark", False)
    precision = torch.backends.cudnn.conv.fp32_precision
    try:
        for value in ("ieee", "ieee", "tf32", "tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = value
            _cuda.follow_torch()
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    assert told == [1, 0]
    for value in (False, True, True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", value)
        _cuda.follow_torch()
    assert benchmarks == [1, 0]


def printed_by(program: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.home()
    )
    return process.stdout or process.stderr


@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "text"])
def test_import_works_when_the_library_cannot_be_loaded(tmp_path, content):
    """A broken file instead of the library, in a torch that says it has CUDA."""
    program = f"""
import torch
torch.version.cuda = "13.0"
from pathlib import Path
broken = Path({str(tmp_path)!r}) / "libfusedcnn_cuda.so"
with_name = Path.with_name
Path.with_name = lambda self, name: broken if "cuda" in name else with_name(self, name)
import fusedcnn
info = fusedcnn.build_info()["cuda"]
assert info["built"] and not info["loaded"], info
assert "libfusedcnn_cuda.so cannot be loaded" in info["reason"], info
weight = torch.ones(1, 1, 3, 3)
assert fusedcnn.conv_relu_max_pool2d(torch.ones(1, 1, 4, 4), weight).item() == 9
print("imported")
"""
    (tmp_path / "libfusedcnn_cuda.so").write_bytes(content)
    assert printed_by(program) == "imported\n"


@pytest.mark.skipif(not BUILT, reason="built without CUDA kernels")
def test_the_library_loads_in_any_torch():
    """It depends on no CUDA library: even here it loads, registers, and lists its kernels."""
    program = f"""
import ctypes, json, torch, fusedcnn
torch.ops.load_library({str(_cuda._PATH)!r})
library = ctypes.CDLL({str(_cuda._PATH)!r})
library.fusedcnn_cuda_info.restype = ctypes.c_char_p
info = json.loads(library.fusedcnn_cuda_info())
for pass_name in ("forward", "grad_weight", "grad_input"):
    names = [k["name"] for k in info["kernels"] if k["pass"] == pass_name]
    assert names[-1] == "library" and len(set(names)) == len(names), info
assert info["architectures"] and info["toolkit"]
for name in ("", "_backward"):
    operator = f"fusedcnn::conv_relu_max_pool2d{{name}}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
print("loaded")
"""
    assert printed_by(program) == "loaded\n"


def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """CMake on a machine without nvcc."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "make", "sh", "nm"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", "Unix Makefiles", *options,
         "-DCMAKE_IGNORE_PATH=/usr/local/cuda/bin;/usr/local/bin;/usr/bin"],
        capture_output=True, text=True, env={"PATH": str(tools), **environment},
    )  # fmt: skip


def test_asking_for_cuda_without_a_compiler_fails(tmp_path):
    """FUSEDCNN_CUDA=ON and no nvcc: an error that names the switch."""
    process = configure(tmp_path, "-DFUSEDCNN_KERNELS_ONLY=ON", "-DFUSEDCNN_CUDA=ON")
    assert process.returncode != 0, process.stdout
    assert "FUSEDCNN_CUDA=ON asks for the CUDA kernels" in " ".join(process.stderr.split())


@pytest.mark.parametrize(
    ("library", "why_not"),
    [
        ("libtorch_cpu.so", "this torch has no CUDA (FUSEDCNN_CUDA=ON builds them)"),
        ("libtorch_cuda.so", "no working CUDA compiler (nvcc) was found"),
    ],
)
def test_by_default_cuda_kernels_are_for_a_torch_with_cuda(tmp_path, library, why_not):
    """Beside one without, nobody asks whether there is nvcc."""
    torch_folder = tmp_path / "torch"
    for file in (
        "include/torch/csrc/stable/library.h",
        "include/torch/headeronly/util/shim_utils.h",
        f"lib/{library}",
    ):
        (torch_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (torch_folder / file).touch()
    process = configure(
        tmp_path, f"-DPython_EXECUTABLE={sys.executable}", FUSEDCNN_TORCH_DIR=str(torch_folder)
    )
    said = [line for line in process.stdout.splitlines() if "CUDA kernels" in line]
    assert said == [f"-- CUDA kernels: not built, {why_not}"], process.stdout + process.stderr


# ---- agreement ----------------------------------------------------------------------------------


def kernels() -> list[Forced]:
    assert {f.pass_name for f in CUDA_KERNELS} == set(PASSES)
    return CUDA_KERNELS


def to_gpu(tensor: Tensor, layout: str) -> Tensor:
    """On the GPU with the strides that `with_layout` gives it here."""
    here = with_layout(tensor, layout)
    there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="cuda")
    return there.copy_(here)


@gpu
@over_dtypes
@over_blocks
def test_integers_are_exact(block, dtype):
    """Where all sums are exact, so is the result: in any layout, ties included."""
    operands, expected = exact_case(block.name, dtype)
    wrong = []
    for layout in LAYOUTS:
        # A copy to the GPU keeps dense strides only: lay it out there.
        laid_out = operands.map(lambda t, layout=layout: to_gpu(t, layout))
        code = to_gpu(expected.code, layout)
        for forced in (f for f in kernels() if f.exact):
            results = run_pass(forced, block, laid_out, code) or {}
            for name, result in results.items():
                if not torch.equal(result.cpu(), getattr(expected, name)):
                    differ = (result.cpu() != getattr(expected, name)).sum().item()
                    wrong.append(f"{name}, {layout}, {forced}: {differ} of {result.numel()} differ")
    assert not wrong, "\n".join(wrong)


@gpu
@over_dtypes
def test_the_clock_chooses_where_torch_lets_it(dtype, monkeypatch):
    """Whichever kernel is the quickest, in a captured graph, too: on integers all agree."""
    block = BLOCKS[0]
    operands, expected = exact_case(block.name, dtype)
    given = operands.map(Tensor.cuda)

    def results() -> dict[str, Tensor]:
        tensors = [t.clone().requires_grad_() for t in (given.input, given.weight, given.bias)]
        output = conv_relu_max_pool2d(*tensors, *block.conv_arguments, **block.fused_keywords)
        output.backward(given.grad_output)
        return dict(zip(("output", *GRADS), (output.detach(), *(t.grad for t in tensors)),
                        strict=True))  # fmt: skip

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    measured, again = results(), results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    graph.replay()
    for name, result in measured.items():
        for same in (result, again[name], captured[name]):
            assert torch.equal(same.cpu(), getattr(expected, name)), name


@gpu
@over_dtypes
@over_blocks
def test_floats_are_as_close_as_the_stock_layers(block, dtype, monkeypatch):
    """The rule of reference.py, for each result of each kernel, against the stock layers' error on
    the CPU; for a gradient by cuDNN, which computes float32 by other algorithms, on the GPU.
    """
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # tf32 errs by more
    _cuda.follow_torch()  # which operators called by themselves do not
    case = float_case(block.name, dtype)
    operands, code = case.operands.map(Tensor.cuda), case.code.cuda()
    wrong = []
    for forced in kernels():
        results = run_pass(forced, block, operands, code) or {}
        results.pop("code", None)
        for name, result in results.items():
            bound = getattr(case, name)
            error = largest_error(result.cpu(), bound.reference)
            allowed = bound.allowed(forced.error)
            if error > allowed and forced.kernel == "library" and name in GRADS:
                by_cudnn = gradients_of_winners(block, operands, code, dtype)[GRADS.index(name)]
                allowed = forced.error * largest_error(by_cudnn.cpu(), bound.reference)
            if not error <= allowed:
                wrong.append(f"{name}, {forced}: {error:.3g} > {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


@gpu
def test_cuda_calls_are_fused():
    _stock.calls.clear()
    conv_relu_max_pool2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3).cuda())
    assert fusedcnn.build_info()["stock_calls"] == {}
