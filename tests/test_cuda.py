"""The CUDA kernels on a GPU. Without one: what can be seen of them (the kernels themselves run in
the torch-free self-test of tests/cuda_on_cpu).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import _cuda, _ops, _stock, conv_relu_max_pool2d
from fusedcnn.functional import _why_stock, pack_geometry
from geometries import BLOCKS, DTYPES, Block, by_name, dtype_name
from reference import (
    BIAS,
    GRADS,
    INPUT,
    LAYOUTS,
    WEIGHT,
    Operands,
    exact_case,
    float_case,
    with_layout,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
BUILT = _cuda._PATH.is_file()

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gpu(function):
    """Marks a test that needs a GPU."""
    for mark in on_gpu:
        function = mark(function)
    return function


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
# The lowest decorator varies slowest, so that a block's reference is computed once.
over_blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)


# ---- without a GPU ------------------------------------------------------------------------------


def test_build_info_says_why_not():
    info = fusedcnn.build_info()["cuda"]
    assert set(info) == {"built", "loaded", "reason", "toolkit", "architectures", "kernels"}
    assert info["built"] == BUILT
    assert info["loaded"] == (info["reason"] is None) == bool(info["kernels"])
    device = fusedcnn.build_info()["devices"]["cuda"]
    assert device == ("fused kernels" if info["loaded"] else f"stock layers: {info['reason']}")
    if torch.version.cuda is None:
        assert not info["loaded"]
        assert "CUDA" in info["reason"]


def test_force_without_the_library():
    if _cuda.reason is None:
        with pytest.raises(ValueError, match="kernel: expected one of "):
            _cuda.force("fastest").__enter__()
    else:
        with pytest.raises(RuntimeError, match="CUDA kernels are not loaded"):
            _cuda.force("general").__enter__()


def test_routing(monkeypatch):
    """Tensors on CUDA go to the fused kernels exactly where these are loaded; by fake tensors."""
    with FakeTensorMode():
        input = torch.empty(1, 1, 4, 4, device="cuda")
        wide = torch.empty(1, 1, 2**14, 2**14, device="cuda")
    geometry = pack_geometry((1, 1))
    monkeypatch.setattr(_cuda, "reason", "for a test")
    reason = _why_stock(input, input, geometry, False)
    assert reason == "no fused kernel for device type 'cuda': for a test"
    monkeypatch.setattr(_cuda, "reason", None)
    assert _why_stock(input, input, geometry, False) is None
    assert "pixels" in _why_stock(wide, input, geometry, False)


def test_tf32_follows_torch(monkeypatch):
    """The library hears of torch's setting for convolutions when it changes, and only then."""
    told = []

    class Library:
        fusedcnn_cuda_allow_tf32 = staticmethod(told.append)

    monkeypatch.setattr(_cuda, "_library", Library)
    monkeypatch.setattr(_cuda, "_tf32", False)
    precision = torch.backends.cudnn.conv.fp32_precision
    try:
        for value in ("ieee", "ieee", "tf32", "tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = value
            _cuda.follow_tf32()
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    assert told == [1, 0]


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
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.home()
    )
    assert process.stdout == "imported\n", process.stderr


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
    assert names[-1] == "general" and len(set(names)) == len(names), info
assert info["architectures"] and info["toolkit"]
for name in ("", "_backward"):
    operator = f"fusedcnn::conv_relu_max_pool2d{{name}}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
print("loaded")
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path.home()
    )
    assert process.stdout == "loaded\n", process.stderr


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


def run_pass(kernel: dict, block: Block, operands: Operands, code: Tensor) -> dict[str, Tensor]:
    """One pass by one kernel on the GPU, back on the CPU; empty if it does not cover the block."""
    input, weight, bias, grad_output = operands
    pass_name, name = kernel["pass"], kernel["name"]
    with _cuda.force(name):
        try:
            if pass_name == "forward":
                tensors = _ops.forward_op(input, weight, bias, block.pack(), True)
                names = ("output", "code")
            else:
                mask = INPUT if pass_name == "grad_input" else WEIGHT | BIAS
                tensors = _ops.backward_op(grad_output, input, weight, code, block.pack(), mask)
                names = GRADS
        except RuntimeError as error:
            # "general" covers everything; of the others, only what they claim is tested.
            if name != "general" and f"no {pass_name} kernel covers" in str(error):
                return {}
            raise
    return {n: t.cpu() for n, t in zip(names, tensors, strict=True) if t.numel()}


def kernels(exact: bool = False) -> list[dict]:
    """All CUDA kernels, or those whose results on small integers are exact."""
    found = [k for k in fusedcnn.build_info()["cuda"]["kernels"] if k["exact"] or not exact]
    assert {k["pass"] for k in found} == {"forward", "grad_weight", "grad_input"}
    return found


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
        for kernel in kernels(exact=True):
            for name, result in run_pass(kernel, block, laid_out, code).items():
                if not torch.equal(result, getattr(expected, name)):
                    differ = (result != getattr(expected, name)).sum().item()
                    wrong.append(f"{name}, {layout}, {kernel}: {differ} of {result.numel()} differ")
    assert not wrong, "\n".join(wrong)


def to_gpu(tensor: Tensor, layout: str) -> Tensor:
    """On the GPU with the strides that `with_layout` gives it here."""
    here = with_layout(tensor, layout)
    there = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="cuda")
    return there.copy_(here)


@gpu
@over_dtypes
@over_blocks
def test_floats_are_as_close_as_the_stock_layers(block, dtype, monkeypatch):
    """The rule of reference.py, for each result of each kernel, against the stock layers' error on
    the CPU.
    """
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # tf32 errs by more
    case = float_case(block.name, dtype)
    operands, code = case.operands.map(Tensor.cuda), case.code.cuda()
    wrong = []
    for kernel in kernels():
        results = run_pass(kernel, block, operands, code)
        results.pop("code", None)
        for name, result in results.items():
            bound = getattr(case, name)
            error = (result.double() - bound.reference).abs().max().item()
            allowed = bound.allowed(kernel["error"])
            if not error <= allowed:
                wrong.append(f"{name}, {kernel}: {error:.3g} > {allowed:.3g}")
    assert not wrong, "\n".join(wrong)


@gpu
def test_expanded_gradients_and_empty_batches():
    input = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device="cuda", requires_grad=True)
    grads = torch.autograd.grad(conv_relu_max_pool2d(input, weight).sum(), (input, weight))
    stock = F.max_pool2d(F.relu(F.conv2d(input.double(), weight.double())), 2)
    expected = torch.autograd.grad(stock.sum(), (input, weight))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    empty = conv_relu_max_pool2d(input[:0], weight)
    assert empty.shape == (0, 4, 3, 3)
    assert torch.autograd.grad(empty.sum(), weight)[0].count_nonzero() == 0


@gpu
def test_cuda_calls_are_fused():
    _stock.calls.clear()
    conv_relu_max_pool2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3).cuda())
    assert fusedcnn.build_info()["stock_calls"] == {}


# ---- autograd, compilers, streams, graphs -------------------------------------------------------


def leaves(block: Block, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Input, weight and bias on the GPU."""
    shapes = (block.input, block.weight, (block.out_channels,))
    return [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]


@gpu
@pytest.mark.parametrize("name", ["one_pooled", "strided", "overlapping"])
def test_gradcheck(name):
    block = {
        "one_pooled": Block("", (2, 2, 4, 4), 3, padding=1),
        "strided": Block("", (1, 4, 7, 6), 2, stride=2, padding=1, groups=2),
        "overlapping": Block("", (1, 2, 6, 6), 2, pool=3, pool_stride=1, pool_padding=1),
    }[name]

    def fused(*tensors: Tensor) -> Tensor:
        return conv_relu_max_pool2d(*tensors, *block.conv_arguments, **block.fused_keywords)

    assert torch.autograd.gradcheck(fused, leaves(block))
    assert torch.autograd.gradgradcheck(fused, leaves(block))


@gpu
@pytest.mark.parametrize("name", ["simplecnn1_n1", "unbatched", "window256", "depthwise"])
def test_opcheck(name):
    block = by_name(name)
    input, weight, bias = leaves(block, torch.float32)
    geometry = block.pack()
    torch.library.opcheck(_ops.forward_op, (input, weight, bias, geometry, True))
    output, code = _ops.forward_op(input, weight, bias, geometry, True)
    arguments = (torch.randn_like(output), input, weight, code, geometry, 7)
    torch.library.opcheck(_ops.backward_op, arguments)


def step(device: str = "cuda") -> list[Tensor]:
    """Output and gradients of block 1 of SimpleCNN, the same numbers on every device."""
    torch.manual_seed(3)
    input, weight, bias = (t.to(device) for t in (
        torch.randn(16, 3, 32, 32), torch.randn(16, 3, 3, 3), torch.randn(16)))  # fmt: skip
    tensors = [t.requires_grad_() for t in (input, weight, bias)]
    output = conv_relu_max_pool2d(*tensors, padding=1)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]


@gpu
def test_every_run_gives_the_same_bits():
    for ours, again in zip(step(), step(), strict=True):
        assert torch.equal(ours, again)


@gpu
def test_side_stream():
    """The call runs on the current stream: after what the stream was given before it."""
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        input = torch.zeros(1, 1, 512, 512, device="cuda")
        torch.cuda._sleep(100_000_000)
        input.fill_(1)  # must have happened
        output = conv_relu_max_pool2d(input, torch.ones(1, 1, 3, 3, device="cuda"))
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert (output == 9).all()
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@gpu
def test_threads_launch_one_kernel_with_different_amounts_of_shared_memory():
    """No launch lowers the limit that another thread's is about to need."""
    packed = by_name("simplecnn2_n2").pack()

    def backward(size: int) -> Tensor:
        gen = torch.Generator(device="cuda").manual_seed(size)
        input = torch.randn(2, 16, size, size, device="cuda", generator=gen)
        weight = torch.randn(32, 16, 3, 3, device="cuda", generator=gen)
        output, code = _ops.forward_op(input, weight, None, packed, True)
        first, *rest = (
            _ops.backward_op(output, input, weight, code, packed, INPUT)[0] for _ in range(500)
        )
        assert all(torch.equal(first, again) for again in rest)
        return first

    sizes = (16, 32)  # 51 and 69 KiB
    with _cuda.force("winners_3x3"), ThreadPoolExecutor(len(sizes)) as pool:
        expected = [backward(size) for size in sizes]
        for ours, alone in zip(pool.map(backward, sizes), expected, strict=True):
            assert torch.equal(ours, alone)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device():
    """The tensors' device is used, whichever is current, and stays current after."""
    expected = step("cuda:0")
    results = step("cuda:1")
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        torch.testing.assert_close(ours.cpu(), theirs.cpu())


@gpu
def test_graph_replay_equals_eager():
    inputs = torch.randn(8, 3, 16, 16, device="cuda")
    weight = torch.randn(8, 3, 3, 3, device="cuda", requires_grad=True)

    def run() -> list[Tensor]:
        output = conv_relu_max_pool2d(inputs, weight, padding=1)
        return [output, *torch.autograd.grad(output.sum(), weight)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for _ in range(2):
        inputs.normal_()
        graph.replay()
        for ours, theirs in zip(recorded, run(), strict=True):
            assert torch.equal(ours, theirs)


@gpu
def test_compiled_equals_eager():
    compiled = torch.compile(conv_relu_max_pool2d, fullgraph=True)
    input, weight = torch.randn(2, 3, 9, 9).cuda(), torch.randn(4, 3, 3, 3).cuda()
    assert torch.equal(compiled(input, weight), conv_relu_max_pool2d(input, weight))


@gpu
def test_more_elements_than_32_bits():
    """Offsets into tensors of more than 2^31 elements; the last image is the one that shows."""
    images = 2**31 // (64 * 64) + 2
    input = torch.zeros(images, 1, 64, 64, device="cuda", dtype=torch.float16)
    input[-1] = 1
    weight = torch.ones(1, 1, 3, 3, device="cuda", dtype=torch.float16, requires_grad=True)
    input.requires_grad_()
    output = conv_relu_max_pool2d(input, weight)
    assert (output[-1] == 9).all()
    assert output[:-1].count_nonzero() == 0
    output[-1].sum().backward()
    assert input.grad[-1].double().sum().item() == 9 * 31 * 31
    assert (weight.grad == 31 * 31).all()


@gpu
def test_arguments_on_different_devices():
    weight = torch.ones(1, 1, 3, 3)
    with pytest.raises(RuntimeError, match="weight: expected device cuda:0 like input, got cpu"):
        conv_relu_max_pool2d(torch.ones(1, 1, 4, 4, device="cuda"), weight)
    geometry = Block("", (1, 1, 4, 4), 1).pack()
    with pytest.raises(RuntimeError, match="weight: expected a tensor on CUDA device 0 like input"):
        _ops.forward_op(torch.ones(1, 1, 4, 4, device="cuda"), weight, None, geometry, False)
