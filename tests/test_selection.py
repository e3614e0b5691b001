"""Selection: explain, the log, the choice by timing; and the stock convolution as a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, over_dtypes, step
from forcing import ISAS
from fusedcnn import _ops, build_info, conv_relu_max_pool2d, explain
from fusedcnn._geometry import pack_geometry
from torch import Tensor

PASSES = ["forward", "grad_weight", "grad_input"]


def operands(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: sums are exact in any order."""
    shapes = (batch, 16, 12, 10), (24, 16, 3, 3), (24,)
    return tuple(torch.randint(-2, 3, shape).to(dtype) for shape in shapes)


def run(*tensors: Tensor, **options: object) -> list[Tensor]:
    return step(lambda *t: conv_relu_max_pool2d(*t, padding=1, **options), tensors)


# ---- explain -------------------------------------------------------------------------------------


@over_dtypes
@pytest.mark.parametrize("isa", ISAS)
def test_explain_says_what_runs(isa, dtype):
    tensors = operands(dtype)
    with _ops.force(isa):
        said = explain(*tensors, padding=1)
        run(*tensors)
    assert list(said) == PASSES
    assert {name: choice.kernel for name, choice in said.items()} == _ops._C.last_selected()
    names = [isa, *(i["base"] for i in build_info()["isas"] if i["name"] == isa)]
    for name, choice in said.items():
        listed = {
            k["name"] for k in build_info()["kernels"] if k["pass"] == name and k["isa"] in names
        }
        assert {choice.kernel, *choice.why_not} == listed
        assert all(choice.why_not.values())
        assert choice.kernel not in choice.why_not
        assert f"{name}: {choice.kernel}" in str(said)


def test_explain_under_force():
    tensors = operands()
    with _ops.force(kernel="general"):
        said = explain(*tensors, padding=1)
    for choice in said.values():
        assert choice.kernel == "general"
        assert set(choice.why_not.values()) == {"another is forced"}


def test_explain_follows_autocast_and_switches():
    input, weight, bias = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(input, weight, bias) == explain(input.bfloat16(), weight.bfloat16())
    with fusedcnn.backends.winograd.flags(enabled=False):
        because = explain(input, weight).pop("forward").why_not
    assert because["winograd_f2x2"] == "Winograd is switched off"


def test_explain_of_what_the_stock_layers_compute():
    tensors = [t.to("meta") for t in operands()]
    for choice in explain(*tensors).values():
        assert choice.kernel == "stock layers"
        assert "meta" in choice.why_not["any kernel"]


# ---- the log -------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


CALLS = """
import torch, fusedcnn
weight = torch.ones(4, 3, 3, 3, requires_grad=True)
for batch in (2, 2, 3):
    input = torch.ones(batch, 3, 8, 8)
    fusedcnn.conv_relu_max_pool2d(input, weight).sum().backward()
fusedcnn.conv_relu_max_pool2d(input.to("meta"), weight.to("meta"))
"""


def test_log():
    """One line for each pass of each problem, with the kernel's name; by default none."""
    lines = python(CALLS, FUSEDCNN_LOG="debug").stderr.splitlines()
    assert [line.split(" of ")[0] for line in lines[:-1]] == [
        "fusedcnn: CPU forward", "fusedcnn: CPU grad_weight",
    ] * 2  # fmt: skip
    for line, batch in zip(lines, (2, 2, 3, 3), strict=False):
        assert f"float32 [{batch}, 3, 8, 8] x [4, 3, 3, 3], pool 2, 2, pool stride 2, 2: " in line
        kernel = line.split("pool stride 2, 2: ")[1].split(" ")[0]
        assert kernel in {k["name"] for k in build_info()["kernels"]}
    assert lines[-1].startswith("fusedcnn: computed by the stock layers: ")
    assert not python(CALLS, FUSEDCNN_LOG="").stderr


def test_an_unknown_log_level():
    done = python("import fusedcnn", FUSEDCNN_LOG="loud")
    assert done.returncode == 1
    assert "ImportError: FUSEDCNN_LOG: expected 'debug' or nothing, got 'loud'" in done.stderr


# ---- the choice by timing ------------------------------------------------------------------------


@pytest.fixture
def benchmark():
    assert fusedcnn.backends.benchmark is False
    fusedcnn.backends.benchmark = True
    yield
    fusedcnn.backends.benchmark = False


@over_dtypes
def test_benchmark(benchmark, dtype):
    """One of the kernels that cover the call; the same one in the calls that follow."""
    tensors = operands(dtype, batch=5)
    with fusedcnn.backends.winograd.flags(enabled=False):  # exact kernels: equal to the bit
        first = run(*tensors)
        chosen = _ops._C.last_selected()
        again = run(*tensors)
        assert _ops._C.last_selected() == chosen
        fusedcnn.backends.benchmark = False
        assert_equal(run(*tensors), first)
        assert_equal(again, first)


def test_benchmark_leaves_forced_kernels_alone(benchmark):
    with _ops.force(kernel="general"):
        run(*operands())
    assert _ops._C.last_selected() == dict.fromkeys(PASSES, "general")


def test_benchmark_in_compiled_code(benchmark):
    """Nothing is timed while a graph is traced: there, tensors have no memory."""
    compiled = torch.compile(conv_relu_max_pool2d, backend="aot_eager", fullgraph=True)
    tensors = operands(batch=6)
    assert_equal(step(compiled, tensors), step(conv_relu_max_pool2d, tensors))


def test_benchmark_takes_bools():
    with pytest.raises(TypeError, match="benchmark: expected a bool, got 1"):
        fusedcnn.backends.benchmark = 1


# ---- the stock convolution as a kernel -----------------------------------------------------------


def stock_channels_last(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    last = torch.channels_last
    input, weight = input.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, padding=1)), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_library_is_the_stock_convolution(dtype, last, with_bias):
    """To the bit: in the layout that the library computes in; whatever the caller's."""
    input, weight, bias = (torch.randn(t.shape).to(dtype) for t in operands())
    if last:
        input = input.contiguous(memory_format=torch.channels_last)
    tensors = [input, weight, bias if with_bias else None]
    with _ops.force(kernel="library"):
        got = conv_relu_max_pool2d(*tensors, padding=1)
    assert got.is_contiguous(memory_format=torch.channels_last) == last
    assert_equal(got, stock_channels_last(*tensors))


def test_library_records_no_graph():
    """The raw operator's results have their own history only."""
    tensors = [t.requires_grad_() for t in operands()]
    with _ops.force(kernel="library"), _ops.below_autograd():
        results = _ops.forward_op(*tensors, pack_geometry((3, 3), padding=1), True)
    assert not any(t.requires_grad for t in results)
    assert torch.is_grad_enabled()


WIDE = [((4, 64, 15, 17), (40, 64, 5, 5)), ((3, 256, 9, 9), (64, 256, 3, 3))]


@pytest.mark.parametrize(("image", "kernel"), WIDE)
@pytest.mark.usefixtures("restore_threads")
def test_library_depends_on_neither_threads_nor_batch(image, kernel):
    input, weight = torch.randn(image), torch.randn(kernel)
    with _ops.force(kernel="library"):
        torch.set_num_threads(1)
        one = conv_relu_max_pool2d(input, weight)
        torch.set_num_threads(3)
        assert_equal(conv_relu_max_pool2d(input, weight), one)
        apart = [conv_relu_max_pool2d(part, weight) for part in input.split(1)]
    assert_equal(torch.cat(apart), one)


def test_library_under_autocast():
    """The operator computes in the type that it is given."""
    input, weight = torch.randint(-2, 3, (8, 256, 16, 16)).float(), torch.ones(64, 256, 3, 3)
    geometry = pack_geometry((3, 3))
    with _ops.force(kernel="library"):
        expected = _ops.forward_op(input, weight, None, geometry, True)
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(_ops.forward_op(input, weight, None, geometry, True), expected)


# The stock convolution's output, 270 MB, does not fit into what is left; the pooled one does.
WITHOUT_MEMORY = """
import resource, sys, torch
import fusedcnn
from fusedcnn import _ops, conv_relu_max_pool2d, explain

torch.set_num_threads(1)
fusedcnn.backends.benchmark = sys.argv[1] == "benchmark"
one = torch.ones(1)
image, weight = one.expand(1, 64, 1024, 1024), one.expand(64, 64, 5, 5)
pool = dict(pool_kernel_size=15)
static = explain(image, weight, **pool)["forward"].kernel
if not fusedcnn.backends.benchmark and static != "library":
    raise SystemExit("not chosen here")
conv_relu_max_pool2d(image[..., :50, :50], weight, **pool)  # loads all there is

def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))

limit = used() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
output = conv_relu_max_pool2d(image, weight, **pool)
assert output.eq(1600).all() and _ops._C.last_selected()["forward"] != "library"
"""


@pytest.mark.parametrize("choice", ["static", "benchmark"])
def test_library_without_memory(choice):
    """Another kernel computes what its plane is too large for."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY, choice],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "not chosen here" in done.stderr:
        pytest.skip("selection does not choose it on this machine")
    assert done.returncode == 0, done.stderr
