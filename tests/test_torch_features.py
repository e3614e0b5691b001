"""What else of torch works on every layer: mixed precision, modes, subclasses, tools."""

from __future__ import annotations

import io

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvReLUMaxPool2d, conv_relu_max_pool2d
from geometries import BLOCKS
from reference import exact_case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

FORWARD = "fusedcnn.conv_relu_max_pool2d.default"
BACKWARD = "fusedcnn.conv_relu_max_pool2d_backward.default"


def fused(*tensors: Tensor) -> Tensor:
    return conv_relu_max_pool2d(*tensors, padding=1)


def stock(*tensors: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(*tensors, padding=1)), 2)


def integers() -> list[Tensor]:
    """Operands whose sums, of at most 28 terms of at most 1, are exact in every dtype."""
    shapes = ((2, 3, 8, 8), (4, 3, 3, 3), (4,))
    return [torch.randint(-1, 2, shape).float() for shape in shapes]


# SimpleCNN's logits from two evaluation orders in float32, as without gradients and with them: sums
# of at most 2,049 terms with magnitudes below 1, three layers after one another.
CLOSE = {"rtol": 0, "atol": 3 * 2049 * 2.0**-24}


def simple_cnn() -> tuple[nn.Module, Tensor]:
    """The fused model and images for it."""
    return fusedcnn.FusedSimpleCNN().eval(), torch.randn(2, 3, 32, 32)


# ---- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["float32", "bfloat16", "float16", "float64", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_conv2d(dtype, inputs):
    """The dtypes of output and gradients, and the values, whatever the operands' dtypes are."""
    tensors = integers()
    if inputs == "mixed":
        tensors[0] = tensors[0].bfloat16()
    else:
        tensors = [t.to(getattr(torch, inputs)) for t in tensors]

    def run(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype):
            output = function(*leaves)
            with torch.autocast("cpu", enabled=False):
                inner = function(*(t.float() for t in leaves))
        output.float().sum().backward()
        return [output.detach(), inner.detach(), *(leaf.grad for leaf in leaves)]

    for ours, theirs in zip(run(fused), run(stock), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_autocast_casts_no_more_than_conv2d(which, dtype):
    """Integers, complex numbers and float64 among others stay, and are an error."""
    tensors = integers()
    tensors[which] = tensors[which].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            stock(*tensors)
        with pytest.raises(RuntimeError, match=r"^(input|weight|bias): expected .*, got"):
            fused(*tensors)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_grad_scaler(scale):
    """Scaled loss, unscaled gradients, and a step that is skipped where they overflow."""
    results = []
    for fusing in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).double()
        model = fusedcnn.fuse(model) if fusing else model
        images = torch.randn(2, 3, 8, 8).double()
        if scale > 1e6:
            images[0, 0, 4, 4] = 1e300  # overflows in a gradient
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(images).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([*model.state_dict().values(), torch.tensor(scaler.get_scale())])
    # Two steps by gradients of sums of 28 to 128 float64 terms.
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert results[0][-1] == (scale * 4 if scale < 1e6 else scale / 4)


# ---- defaults and modes --------------------------------------------------------------------------


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        module = ConvReLUMaxPool2d(3, 4, 3)
        output = module(torch.randn(1, 3, 8, 8))
        assert module.weight.dtype == output.dtype == torch.float64
        assert fusedcnn.FusedSimpleCNN()(torch.randn(1, 3, 32, 32)).dtype == torch.float64
        (gradient,) = torch.autograd.grad(output.square().sum(), module.weight, create_graph=True)
        gradient.sum().backward()  # the double backward makes tensors of its own
        assert module.weight.grad.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device():
    """Whose kernels are the stock layers'; the double backward makes no tensor elsewhere."""
    with torch.device("meta"):
        module = ConvReLUMaxPool2d(3, 4, 3)
        assert module(torch.empty(2, 3, 8, 8)).shape == (2, 4, 3, 3)
        cpu = ConvReLUMaxPool2d(3, 4, 3, device="cpu")
        images = torch.randn(1, 3, 8, 8, device="cpu", requires_grad=True)
        (gradient,) = torch.autograd.grad(cpu(images).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
    assert cpu.weight.grad.device.type == "cpu"


def test_inference_mode():
    """Inference tensors in and out; its output cannot be recorded later, like any other."""
    model, images = simple_cnn()
    expected = model(images)
    with torch.inference_mode():
        output = model(images)
        with torch.inference_mode(False), torch.enable_grad():
            loss = model(images).sum()
    loss.backward()
    torch.testing.assert_close(output, expected.detach(), **CLOSE)
    assert output.is_inference()
    assert not output.requires_grad
    tensors = integers()
    with torch.inference_mode():
        frozen = [t.clone() for t in tensors]
        inside = fused(*frozen)
    assert torch.equal(fused(*frozen), inside)
    for function in (fused, stock):
        with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
            function(frozen[0], *(t.requires_grad_() for t in tensors[1:]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fake_tensors(layout):
    """Shapes, strides and dtypes without memory; the backward, too."""
    with FakeTensorMode() as mode:
        images = torch.empty(64, 3, 512, 512).to(memory_format=layout).requires_grad_()
        module = ConvReLUMaxPool2d(3, 64, 3, padding=1)
        output = module(images)
        assert isinstance(output, FakeTensor)
        assert output.shape == (64, 64, 256, 256)
        assert output.is_contiguous(memory_format=layout)
        output.sum().backward()
        assert images.grad.shape == images.shape
        assert module.weight.grad.shape == module.weight.shape
    # A model that exists, its parameters faked one by one.
    real = ConvReLUMaxPool2d(3, 4, 3)
    fakes = {name: mode.from_tensor(p) for name, p in real.named_parameters()}
    with mode:
        output = torch.func.functional_call(real, fakes, torch.empty(2, 3, 8, 8))
    assert output.shape == (2, 4, 3, 3)


def test_meta_construction():
    """A model built without memory, materialised, filled from a file, equal to its source."""
    source, images = simple_cnn()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        model = fusedcnn.FusedSimpleCNN().eval()
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(5, 3, 32, 32, device="meta")).shape == (5, 10)
    model.to_empty(device="cpu").load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(images), source(images))
    model.to("meta").load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(images), source(images))


def test_fuse_on_meta():
    with torch.device("meta"):
        model = fusedcnn.fuse(fusedcnn.SimpleCNN(), inplace=True)
    assert isinstance(model.features[0], ConvReLUMaxPool2d)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_deterministic_algorithms():
    """Allowed where torch is asked for reproducible results alone."""
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [t.requires_grad_() for t in integers()]
        fused(*leaves).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- tensor subclasses ---------------------------------------------------------------------------


class Logged(Tensor):
    """A wrapper subclass: every operator passes its __torch_dispatch__."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
            requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        args, kwargs = tree_map_only(Logged, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Logged, func(*args, **kwargs))


def test_wrapper_subclass():
    """__torch_dispatch__ sees the operators, forward and backward."""
    Logged.seen.clear()
    leaves = [Logged(t).requires_grad_() for t in integers()]
    output = fused(*leaves)
    output.sum().backward()
    assert type(output) is Logged
    assert [name for name in Logged.seen if "fusedcnn" in name] == [FORWARD, BACKWARD]
    plain = [t.inner.requires_grad_() for t in leaves]
    expected = stock(*plain)
    expected.sum().backward()
    assert torch.equal(output.inner, expected)
    for leaf, other in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad.inner, other.grad)


def test_torch_dispatch_modes():
    """A mode sees one operator a block."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    tensors = integers()
    with Watch(), torch.no_grad():
        fused(*tensors)
    assert seen == [FORWARD]


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_other_layouts_do_as_conv2d_does(make):
    """Right, or an error; never an answer from misread memory."""
    input, weight, bias = integers()
    operands = [make(input), make(weight), make(bias)]
    outcomes = []
    for function in (fused, stock):
        try:
            outcomes.append(function(*operands).to_dense())
        except (RuntimeError, NotImplementedError) as error:
            outcomes.append(type(error))
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], Tensor):
        assert torch.equal(outcomes[0], outcomes[1])
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused(make(input), weight, bias)


def test_nested_tensors_are_an_error():
    images = torch.nested.nested_tensor([torch.ones(3, 8, 8), torch.ones(3, 6, 6)])
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused(images, *integers()[1:])


def test_complex_tensors_are_an_error():
    tensors = [t.to(torch.complex64) for t in integers()]
    for autocast in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(RuntimeError, match=r"^input: expected float32.*got complex64"),
        ):
            fused(*tensors)


# ---- tools ---------------------------------------------------------------------------------------


def flops(function, tensors) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*tensors).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_flop_counter(block):
    """The same count as the stock layers', forward and backward."""
    operands = exact_case(block.name, torch.float32)[0].map(lambda t: t.clone().requires_grad_())

    def fused_block(*tensors):
        return conv_relu_max_pool2d(*tensors, *block.conv_arguments, **block.fused_keywords)

    assert flops(fused_block, operands[:3]) == flops(block.stock, operands[:3]) > 0


@pytest.mark.parametrize("frozen", [(), (0,), (0, 2), (1, 2), (0, 1)])
def test_flop_counter_counts_the_gradients_that_are_computed(frozen):
    tensors = [t.requires_grad_(i not in frozen) for i, t in enumerate(integers())]
    assert flops(fused, tensors) == flops(stock, tensors) > 0


def test_flop_counter_by_module():
    """The report names the blocks."""
    model, images = simple_cnn()
    with FlopCounterMode(display=False) as counter:
        model(images)
    counts = counter.get_flop_counts()["FusedSimpleCNN.features.0"]
    assert counts[torch.ops.fusedcnn.conv_relu_max_pool2d] == 2 * 2 * 16 * 32 * 32 * 27


def test_profiler_names_the_operators():
    leaves = [t.requires_grad_() for t in integers()]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        fused(*leaves).sum().backward()
    events = {e.key: e for e in profile.key_averages(group_by_input_shape=True)}
    assert events["fusedcnn::conv_relu_max_pool2d"].count == 1
    assert events["fusedcnn::conv_relu_max_pool2d_backward"].count == 1
    assert events["fusedcnn::conv_relu_max_pool2d"].input_shapes[:3] == [
        list(t.shape) for t in leaves
    ]
    assert "ConvReLUMaxPool2dFunctionBackward" in events
    assert "aten::conv2d" not in events


def test_torchinfo():
    """The layers' output shapes and parameters are the stock model's."""
    torchinfo = pytest.importorskip("torchinfo")
    summary = torchinfo.summary(fusedcnn.FusedSimpleCNN(), (4, 3, 32, 32), verbose=0)
    assert summary.total_params == 268_650
    rows = [r for r in summary.summary_list if r.class_name == "ConvReLUMaxPool2d"]
    assert [r.output_size for r in rows] == [[4, 16, 16, 16], [4, 32, 8, 8]]
    assert [r.num_params for r in rows] == [448, 4640]


def test_symbolic_tracing():
    """torch.fx keeps the module whole or the function as one node; the graph runs."""
    model, images = simple_cnn()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images), model(images), **CLOSE)
    assert any(node.target is conv_relu_max_pool2d for node in traced.graph.nodes)


def test_torchscript():
    """Deprecated, and still about: traced without gradients, scripted after unfuse."""
    model, images = simple_cnn()
    with torch.no_grad():
        traced = torch.jit.trace(model, (images,))
        torch.testing.assert_close(traced(images), model(images), **CLOSE)
        assert "fusedcnn::conv_relu_max_pool2d" in str(traced.inlined_graph)
    stock = fusedcnn.unfuse(model)
    assert torch.equal(torch.jit.script(stock)(images), stock(images))


def test_functional_call(exact):
    """Parameters given from outside reach the fused operator."""
    module = ConvReLUMaxPool2d(3, 4, 3, padding=1)
    images, weight, bias = integers()
    output = torch.func.functional_call(module, {"weight": weight, "bias": bias}, images)
    assert torch.equal(output, stock(images, weight, bias))
