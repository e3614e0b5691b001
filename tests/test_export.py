"""Leaving fusedcnn behind: torch.export, ONNX. AOTInductor: test_serving.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from fusing import block
from geometries import BLOCKS, Block, by_name
from reference import exact_case, with_layout
from torch import nn
from torch.export import Dim

FORWARD = torch.ops.fusedcnn.conv_relu_max_pool2d.default
CHAIN = torch.ops.fusedcnn.conv_relu_max_pool2d_chain.default

# SimpleCNN's logits from two evaluation orders in float32: sums of at most 2,049 terms with
# magnitudes below 1, three layers after one another.
CLOSE = {"rtol": 0, "atol": 3 * 2049 * 2.0**-24}

batch_of_any_size = ({0: Dim("batch", min=1)},)


@pytest.fixture
def model() -> nn.Module:
    return fusedcnn.FusedSimpleCNN().eval()


def images_of(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32)


def count(program: torch.export.ExportedProgram) -> int:
    return sum(node.target == FORWARD for node in program.graph.nodes)


def assert_agree(ours, model: nn.Module, *batch_sizes: int) -> None:
    for n in batch_sizes:
        images = images_of(n)
        torch.testing.assert_close(ours(images), model(images), **CLOSE)


# ---- torch.export --------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_export_with_a_batch_of_any_size(grad, model):
    """One operator for all layers; the program takes other batch sizes."""
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images_of(2),), dynamic_shapes=batch_of_any_size)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [CHAIN]
    assert_agree(program.module(), model, 1, 2, 5)


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
    program = torch.export.export(model, (images_of(4),), dynamic_shapes=batch_of_any_size)
    images, labels = images_of(6), torch.randint(10, (6,))
    gradients = []
    for trained in (program.module(), model):
        loss = F.cross_entropy(trained(images), labels)
        names, parameters = zip(*trained.named_parameters(), strict=True)
        gradients.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_export_of_a_joint_training_graph():
    """Forward, loss and backward in one program, the fused backward as one operator a block."""
    from torch._functorch.aot_autograd import aot_export_joint_simple

    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 3, 8, 8), (4, 3, 3, 3), (4,))]
    graph = aot_export_joint_simple(
        lambda *tensors: (conv_relu_max_pool2d(*tensors),), leaves, trace_joint=True
    )
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default) == 1
    assert targets.count(FORWARD) == 1


def test_export_to_a_file(tmp_path, model):
    """Saved and loaded in another process, which has to import fusedcnn and nothing else."""
    images = images_of(3)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    with torch.no_grad():
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
    theirs, ours = (f(*tensors, geometry, True) for f in (FORWARD, decomposition))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.stride() == other.stride() or one.numel() <= 1 or 1 in one.shape
    assert decomposition(*tensors, geometry, False)[1].shape == (0,)


def test_the_decomposition_with_nan():
    """A NaN wins its window and is on."""
    input = torch.tensor([[[[1.0, torch.nan, 2.0, 3.0], [torch.nan, 5.0, -1.0, -1.0]]]])
    geometry = list(Block("nan", (1, 1, 2, 4), 1, kernel=1).pack())
    arguments = (input, torch.ones(1, 1, 1, 1), None, geometry, True)
    ours, theirs = fusedcnn.decompositions()[FORWARD](*arguments), FORWARD(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_export_decomposes_when_asked(model):
    """run_decompositions with our table: stock operators alone, the same result."""
    module = nn.Sequential(*model.features, *model.classifier)  # layer by layer
    for layers, operators in ((model, 0), (module, 2)):
        program = torch.export.export(layers, (images_of(2),))
        assert count(program.run_decompositions()) == operators
        stock = program.run_decompositions(fusedcnn.decompositions())
        assert not any("fusedcnn" in str(node.target) for node in stock.graph.nodes)
        assert_agree(stock.module(), model, 2)


# ---- ONNX ----------------------------------------------------------------------------------------


def onnx_session(model, arguments: tuple[torch.Tensor, ...], path: Path, **options):
    """What ONNX Runtime makes of a plain export, and the operators in it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images):
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run, [node.op_type for node in program.model.graph]


@pytest.mark.parametrize("training", [True, False])
def test_onnx(training, tmp_path, model):
    """Conv, Relu and MaxPool, once a block, without any table given to the exporter."""
    model.train(training)
    if training:
        model.classifier[3] = nn.Identity()
    path = tmp_path / "m.onnx"
    run, operators = onnx_session(model, (images_of(2),), path, dynamic_shapes=batch_of_any_size)
    assert operators[:6] == ["Conv", "Relu", "MaxPool"] * 2
    assert set(operators[6:]) <= {"Reshape", "Shape", "Concat", "Gemm", "Relu", "Flatten"}
    assert_agree(run, model, 1, 2, 7)


def test_onnx_of_an_exported_program(tmp_path, model):
    """Taken apart first, for the exporter does not see the module any more."""
    program = torch.export.export(model, (images_of(2),))
    program = program.run_decompositions(fusedcnn.decompositions())
    run, operators = onnx_session(program, (), tmp_path / "m.onnx")
    assert operators[:6] == ["Conv", "Relu", "MaxPool"] * 2
    assert_agree(run, model, 2)


@pytest.mark.parametrize(
    "name", ["kernel5x5", "pool3_stride2", "groups2", "no_bias", "ceil_odd", "same_even"]
)
def test_onnx_geometries(name, tmp_path, exact):
    """Arguments arrive in the ONNX nodes: exact on integers."""
    block, (operands, expected) = by_name(name), exact_case(name, torch.float32)
    model = fusedcnn.ConvReLUMaxPool2d(
        block.input[-3],
        block.out_channels,
        block.kernel,
        *block.conv_arguments,
        block.bias,
        **block.fused_keywords,
    )
    parameters = {"weight": operands.weight, "bias": operands.bias}
    model.load_state_dict({k: v for k, v in parameters.items() if v is not None})
    run, operators = onnx_session(model, (operands.input,), tmp_path / "m.onnx")
    assert {"Conv", "Relu", "MaxPool"} <= set(operators) <= {"Conv", "Relu", "MaxPool", "Pad"}
    assert torch.equal(run(operands.input), expected.output)


def test_onnx_of_a_fused_model(tmp_path):
    """A stranger's model, fused with its normalisation folded."""
    stock = nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten()).eval()
    stock[1].running_mean.uniform_(-1, 1)
    model = fusedcnn.fuse(stock)
    assert isinstance(model[0], fusedcnn.ConvReLUMaxPool2d)
    run, operators = onnx_session(model, (images_of(2),), tmp_path / "m.onnx")
    assert {"Conv", "Relu", "MaxPool"} <= set(operators)
    assert_agree(run, stock, 2)
