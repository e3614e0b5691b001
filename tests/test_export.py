"""Leaving Python and fusedcnn behind: torch.export, AOTInductor, ONNX."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from geometries import BLOCKS, Block, by_name
from reference import exact_case, with_layout
from torch import nn
from torch.export import Dim

ROOT = Path(__file__).resolve().parent.parent
FORWARD = torch.ops.fusedcnn.conv_relu_max_pool2d.default

# SimpleCNN's logits from two evaluation orders in float32: sums of at most 2,049 terms with
# magnitudes below 1, three layers after one another.
CLOSE = {"rtol": 0, "atol": 3 * 2049 * 2.0**-24}

batch_of_any_size = ({0: Dim("batch", min=1)},)


class ExactModel(nn.Module):
    """One block of test geometries as a module."""

    def __init__(self, block: Block):
        super().__init__()
        operands, _ = exact_case(block.name, torch.float32)
        self.block = block
        self.weight = nn.Parameter(operands.weight)
        self.bias = None if operands.bias is None else nn.Parameter(operands.bias)

    def forward(self, input):
        block = self.block
        return conv_relu_max_pool2d(
            input, self.weight, self.bias, *block.conv_arguments, **block.fused_keywords
        )


def count(program: torch.export.ExportedProgram, target=FORWARD) -> int:
    return sum(node.target == target for node in program.graph.nodes)


# ---- torch.export --------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_export_with_a_batch_of_any_size(grad):
    """One operator a block; the program takes other batch sizes, and trains where grad was on."""
    model = fusedcnn.FusedSimpleCNN().eval()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=batch_of_any_size
        )
    assert count(program) == 2
    exported = program.module()
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(exported(images), model(images), **CLOSE)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 ties a pool to a parity")
def test_export_with_an_image_of_any_size():
    """Height and width, too; padding and pool at odd and even sizes."""
    module = fusedcnn.ConvReLUMaxPool2d(3, 4, 3, padding=1, pool_kernel_size=3, pool_stride=2)
    shapes = ({0: Dim("n", min=1), 2: Dim("h", min=5, max=64), 3: Dim("w", min=5, max=64)},)
    program = torch.export.export(module, (torch.randn(2, 3, 9, 10),), dynamic_shapes=shapes)
    exported = program.module()
    for shape in ((1, 3, 5, 5), (3, 3, 17, 8), (2, 3, 64, 33)):
        images = torch.randn(shape)
        assert torch.equal(exported(images), module(images))


def test_export_for_training():
    """The exported model trains: the same gradients as the model's, to the bit."""
    model = fusedcnn.FusedSimpleCNN()
    model.classifier[3] = nn.Identity()  # dropout draws its own numbers
    program = torch.export.export(
        model, (torch.randn(4, 3, 32, 32),), dynamic_shapes=batch_of_any_size
    )
    exported = program.module()
    images, labels = torch.randn(6, 3, 32, 32), torch.randint(10, (6,))
    F.cross_entropy(model(images), labels).backward()
    parameters = dict(model.named_parameters())
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    F.cross_entropy(exported(images), labels).backward()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_export_of_a_joint_training_graph():
    """Forward, loss and backward in one program, the fused backward as one operator a block."""
    from torch._functorch.aot_autograd import aot_export_joint_simple

    block = by_name("simplecnn2_n2")
    operands, _ = exact_case(block.name, torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    graph = aot_export_joint_simple(
        lambda *t: (conv_relu_max_pool2d(*t, *block.conv_arguments, **block.fused_keywords),),
        leaves,
        trace_joint=True,
    )
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default) == 1
    assert targets.count(FORWARD) == 1


def test_export_to_a_file(tmp_path):
    """Saved and loaded in another process, which has to import fusedcnn and nothing else."""
    model = fusedcnn.FusedSimpleCNN().eval()
    images = torch.randn(3, 3, 32, 32)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    torch.save((images, model(images)), tmp_path / "case.pt")
    code = """
import fusedcnn, torch
images, expected = torch.load("case.pt")
output = torch.export.load("model.pt2").module()(images)
assert torch.equal(output, expected)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ---- decomposition -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_the_decomposition_is_the_operator(block, layout, exact):
    """Output and code, values and strides, as the operator's own."""
    decomposition = fusedcnn.decompositions()[FORWARD]
    operands, _ = exact_case(block.name, torch.float32)
    tensors = operands.map(lambda t: with_layout(t, layout))[:3]
    geometry = list(block.pack())
    output, code = FORWARD(*tensors, geometry, True)
    ours, our_code = decomposition(*tensors, geometry, True)
    assert torch.equal(ours, output)
    assert torch.equal(our_code, code)
    assert our_code.dtype == code.dtype
    assert ours.stride() == output.stride() or output.numel() <= 1 or 1 in output.shape
    assert our_code.stride() == code.stride() or code.numel() <= 1 or 1 in code.shape
    assert decomposition(*tensors, geometry, False)[1].shape == (0,)


def test_the_decomposition_with_nan():
    """A NaN wins its window and is on."""
    input = torch.tensor([[1.0, torch.nan, 2.0, 3.0], [torch.nan, 5.0, -1.0, -1.0]])
    weight = torch.ones(1, 1, 1, 1)
    geometry = list(Block("nan", (1, 1, 2, 4), 1, kernel=1).pack())
    arguments = (input.view(1, 1, 2, 4), weight, None, geometry, True)
    output, code = FORWARD(*arguments)
    ours, our_code = fusedcnn.decompositions()[FORWARD](*arguments)
    torch.testing.assert_close(ours, output, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(our_code, code)


def test_export_decomposes_when_asked():
    """run_decompositions with our table: stock operators alone, the same result."""
    model = fusedcnn.FusedSimpleCNN().eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,))
    assert count(program.run_decompositions()) == 2
    stock = program.run_decompositions(fusedcnn.decompositions())
    assert not any("fusedcnn" in str(node.target) for node in stock.graph.nodes)
    torch.testing.assert_close(stock.module()(images), model(images), **CLOSE)


# ---- AOTInductor ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The example's package, and the model in it."""
    path = tmp_path_factory.mktemp("aoti") / "simple_cnn.pt2"
    spec = importlib.util.spec_from_file_location("export", ROOT / "examples/aoti_cpp/export.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = fusedcnn.FusedSimpleCNN()
    example.export(model, path)
    return path, model


def test_aot_inductor_from_python(package):
    path, model = package
    compiled = torch._inductor.aoti_load_package(str(path))
    for n in (1, 4, 9):
        images = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(compiled(images), model(images), **CLOSE)


def test_aot_inductor_from_cpp(package, tmp_path):
    """The example, built and run: a program that no Python is linked or loaded into."""
    path, model = package
    tools = Path(sys.executable).parent
    cmake = tools / "cmake" if (tools / "cmake").exists() else "cmake"
    build = tmp_path / "build"
    torch_dir = Path(torch.__file__).parent
    environ = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def run(*command, **options):
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=environ, **options
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(cmake, "-S", ROOT / "examples/aoti_cpp", "-B", build, f"-DTORCH_DIR={torch_dir}")
    run(cmake, "--build", build)
    program, library = build / "run_simple_cnn", fusedcnn.build_info()["library"]
    for n in (1, 6):
        images = torch.randn(n, 3, 32, 32)
        (tmp_path / "images").write_bytes(images.numpy().tobytes())
        # LD_DEBUG lists every library that is loaded, those that dlopen brings included.
        environ |= {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
        out = run(program, library, path, tmp_path / "images", tmp_path / "logits")
        del environ["LD_DEBUG"], environ["LD_DEBUG_OUTPUT"]
        assert out == f"logits [{n}, 10]\n"
        logits = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float)
        torch.testing.assert_close(logits.view(n, 10), model(images), **CLOSE)
    loaded = "".join(file.read_text() for file in tmp_path.glob("loaded.*"))
    assert "libfusedcnn" in loaded
    assert "libtorch_cpu" in loaded
    assert "libpython" not in loaded
    assert "libtorch_python" not in loaded

    (tmp_path / "images").write_bytes(b"12345")
    command = [program, library, path, tmp_path / "images", tmp_path / "logits"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "IMAGES: expected a multiple of 12288 bytes" in failed.stderr


# ---- ONNX ----------------------------------------------------------------------------------------


def onnx_session(model, input: torch.Tensor | None, path: Path, **options):
    """What ONNX Runtime makes of a plain export, and the operators in it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    arguments = () if input is None else (input,)
    program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images):
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run, [node.op_type for node in program.model.graph]


@pytest.mark.parametrize("training", [True, False])
def test_onnx(training, tmp_path):
    """Conv, Relu and MaxPool, once a block, without any table given to the exporter."""
    model = fusedcnn.FusedSimpleCNN().train(training)
    if training:
        model.classifier[3] = nn.Identity()
    run, operators = onnx_session(
        model, torch.randn(2, 3, 32, 32), tmp_path / "m.onnx", dynamic_shapes=batch_of_any_size
    )
    assert operators[:6] == ["Conv", "Relu", "MaxPool"] * 2
    assert set(operators[6:]) <= {"Reshape", "Shape", "Concat", "Gemm", "Relu", "Flatten"}
    for n in (1, 2, 7):
        images = torch.randn(n, 3, 32, 32)
        torch.testing.assert_close(run(images), model(images), **CLOSE)


def test_onnx_of_an_exported_program(tmp_path):
    """Taken apart first, for the exporter does not see the module any more."""
    model = fusedcnn.FusedSimpleCNN().eval()
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (images,)).run_decompositions(fusedcnn.decompositions())
    run, operators = onnx_session(program, None, tmp_path / "m.onnx")
    assert operators[:6] == ["Conv", "Relu", "MaxPool"] * 2
    torch.testing.assert_close(run(images), model(images), **CLOSE)


@pytest.mark.parametrize(
    "name", ["kernel5x5", "pool3_stride2", "groups2", "no_bias", "ceil_odd", "same_even"]
)
def test_onnx_geometries(name, tmp_path, exact):
    """Arguments arrive in the ONNX nodes: exact on integers."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)
    model = ExactModel(block)
    run, operators = onnx_session(model, operands.input, tmp_path / "m.onnx")
    assert {"Conv", "Relu", "MaxPool"} <= set(operators) <= {"Conv", "Relu", "MaxPool", "Pad"}
    assert torch.equal(run(operands.input), model(operands.input))


def test_onnx_of_a_fused_model(tmp_path):
    """A stranger's model, fused with its normalisation folded."""
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    ).eval()
    stock[1].running_mean.uniform_(-1, 1)
    model = fusedcnn.fuse(stock)
    assert isinstance(model[0], fusedcnn.ConvReLUMaxPool2d)
    images = torch.randn(2, 3, 12, 12)
    run, operators = onnx_session(model, images, tmp_path / "m.onnx")
    assert {"Conv", "Relu", "MaxPool"} <= set(operators)
    torch.testing.assert_close(run(images), stock(images), **CLOSE)
