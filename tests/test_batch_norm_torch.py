"""conv_batch_norm_relu_max_pool2d under torch's other parts, and over geometries of all kinds."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import EPS, draw, fused, stock, too_far
from checks import leaves_of, over
from fusedcnn import ConvBatchNormReLUMaxPool2d, _ops, conv_batch_norm_relu_max_pool2d
from geometries import Block
from hypothesis import given
from test_hypothesis import calls, thorough
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

SMALL = Block("small", (3, 2, 7, 6), 5, padding=1)
OVERLAPPING = Block("overlapping", (2, 3, 11, 9), 4, 3, 2, 1, pool=3, pool_stride=2, pool_padding=1)
# float64: sums of at most a few hundred terms of order 1.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Nothing compiled before counts towards the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- any geometry --------------------------------------------------------------------------------


def drawn(call: dict[str, Any]) -> Block:
    names = ("stride", "padding", "dilation", "groups")
    conv = {name: call[name] for name in names if name in call}
    pool = {name: call[f"pool_{name}"] for name in ("stride", "padding", "dilation")
            if f"pool_{name}" in call}  # fmt: skip
    return Block(
        f"drawn{call['seed']}", call["input"], call["weight"][0], call["weight"][2:], **conv,
        bias=call["bias"], pool=call.get("pool_kernel_size", 2),
        **{f"pool_{name}": value for name, value in pool.items()},
        ceil_mode=call.get("ceil_mode", False),
    )  # fmt: skip


@thorough(300)
@given(calls(general=True))
def test_any_geometry(call):
    """Right where the stock layers compute something, and an error of their class where not."""
    block = drawn(call)
    if block.weight != call["weight"] or 0 in block.input or len(block.input) == 3:
        return  # other tests' business
    tensors = [torch.zeros(block.input), torch.zeros(block.weight)]
    try:
        plane = block.conv(*(t.double() for t in tensors))
        F.batch_norm(plane, None, None, training=True)
        F.max_pool2d(plane, *block.pool_arguments)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            fused(block, *tensors, None, None, None, None, None, training=True)
        return
    case = draw(block, call["dtype"])
    if call["channels_last"]:
        case = case._replace(input=case.input.contiguous(memory_format=torch.channels_last))
    assert not too_far(block, case)


# ---- registrations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@over([SMALL, OVERLAPPING])
def test_opcheck(block, dtype):
    """Schema, fakes and autograd registration of both operators, as torch checks them."""
    case = draw(block, dtype, torch.float32 if dtype == torch.bfloat16 else None)
    leaves = leaves_of(case[:5])
    arguments = (*leaves, block.pack(), EPS, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_ops.bn_forward_op, arguments, test_utils=tests)
    opcheck(_ops.bn_forward_op, (*arguments[:-1], False), test_utils=tests)
    output, *kept = (t.detach() for t in _ops.bn_forward_op(*arguments))
    for mask in (1, 2, 4, 7):
        opcheck(
            _ops.bn_backward_op,
            (output, *leaves[:2], leaves[3], *kept, block.pack(), EPS, mask),
            test_utils=tests,
        )


@over([SMALL, OVERLAPPING, "pool_of_padding", "window289", "groups3_wide"])
def test_the_decomposition_is_the_operator(block):
    case = draw(block, torch.float64)
    arguments = (*case[:5], block.pack())
    theirs = _ops.bn_forward_op(*arguments, EPS, True)
    ours = fusedcnn.decompositions()[_ops.bn_forward_op](*arguments, EPS, True)
    live = theirs[1] != (255 if theirs[1].dtype == torch.uint8 else -1)
    for name, one, other in zip(("output", "code", "extremum", *"mv"), ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        where = live if name == "extremum" else slice(None)
        torch.testing.assert_close(one[where], other[where], **CLOSE, msg=name)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2)])
def test_flop_counter(frozen):
    """As the stock layers', whichever gradients are computed."""
    counts = []
    for function in (fused, stock):
        leaves = leaves_of(draw(OVERLAPPING, torch.float32)[:5])
        for i in frozen:
            leaves[i].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            tensors = *leaves[:3], None, None, *leaves[3:]
            function(OVERLAPPING, *tensors, training=True).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- compilers -----------------------------------------------------------------------------------


def trained(block: Block, call, images: list[Tensor], **options) -> list[Tensor]:
    """Outputs, gradients and statistics over several batches."""
    case = draw(block, torch.float64)
    running = torch.zeros(block.out_channels).double(), torch.ones(block.out_channels).double()
    results = []
    for input in images:
        leaves = leaves_of((input, *case[1:5]))
        output = call(*leaves[:3], *running, *leaves[3:])
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).double())
        results += [output.detach(), *(t.grad for t in leaves)]
    return [*results, *running]


@pytest.mark.parametrize("training", [True, False])
@over([SMALL, OVERLAPPING])
def test_compiled_for_any_batch_and_size(block, training):
    """Without a graph break; statistics are updated as eagerly."""

    def call(*tensors):
        return fused(block, *tensors, training=training)

    def layers(*tensors):
        return stock(block, *tensors, training=training)

    channels = block.input[1]
    images = [torch.randn(n, channels, 8 + n, 9, dtype=torch.float64) for n in (2, 3, 5)]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, theirs = trained(block, compiled, images), trained(block, layers, images)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_compiled_by_inductor():
    """The default backend, with a normalisation that keeps no statistics beside."""
    block = ConvBatchNormReLUMaxPool2d(3, 4, 3, padding=1, dtype=torch.float64)
    eager = ConvBatchNormReLUMaxPool2d(3, 4, 3, padding=1, dtype=torch.float64)
    eager.load_state_dict(block.state_dict())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True)
    for _ in range(2):
        ours, theirs = compiled(images), eager(images)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for one, other in zip(block.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)
    torch.testing.assert_close(block.state_dict(), eager.state_dict(), **CLOSE)


def test_no_double_backward_of_compiled_code():
    """torch's own limit, and its own words."""
    case = draw(SMALL, torch.float64)
    leaves = leaves_of(case[:5])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*tensors):
        return fused(SMALL, *tensors[:3], None, None, *tensors[3:], training=True)

    (grad,) = torch.autograd.grad(call(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_export(training, decomposed):
    """With a batch of any size; a program that trains goes on counting and averaging."""
    module = ConvBatchNormReLUMaxPool2d(3, 4, 3, padding=1, dtype=torch.float64).train(training)
    eager = copy.deepcopy(module)  # the program shares the module's buffers
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(module, (images,), dynamic_shapes=dynamic)
    if decomposed:
        program = program.run_decompositions(fusedcnn.decompositions())
        assert not any("fusedcnn" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for n in (5, 2):
        images = torch.randn(n, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(exported(images), eager(images), **CLOSE)
    torch.testing.assert_close(dict(exported.state_dict()), dict(eager.state_dict()), **CLOSE)
    assert eager.batch_norm.num_batches_tracked == 2 * training


def test_symbolic_tracing():
    """The function is one node; a module, whose mode would be fixed, is an error or a leaf."""

    def function(input, weight):
        return conv_batch_norm_relu_max_pool2d(
            input, weight, None, None, None, None, None, training=True
        )

    traced = torch.fx.symbolic_trace(function)
    assert any(n.target is conv_batch_norm_relu_max_pool2d for n in traced.graph.nodes)
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert torch.equal(traced(images, weight), function(images, weight))

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return isinstance(module, ConvBatchNormReLUMaxPool2d)

    model = nn.Sequential(ConvBatchNormReLUMaxPool2d(3, 4, 3), nn.Flatten())
    with pytest.raises(torch.fx.proxy.TraceError, match="unfuse first"):
        torch.fx.symbolic_trace(model)
    graph = torch.fx.GraphModule(model, Whole().trace(model))
    assert torch.equal(graph(images), model(images))
    assert model[0].batch_norm.num_batches_tracked == 2


# ---- transforms ----------------------------------------------------------------------------------


def without_statistics(function, **options):
    def call(*tensors):
        return function(SMALL, *tensors[:3], None, None, *tensors[3:], training=True, **options)

    return call


def agree(compute) -> None:
    ours, theirs = (compute(without_statistics(f)) for f in (fused, stock))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_transforms():
    """grad, jvp, vmap over batches, and batched gradients of the eager graph."""
    case = draw(SMALL, torch.float64)
    tensors = case[:5]
    agree(lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1, 2, 3, 4))(*tensors))
    agree(lambda f: torch.func.jvp(f, tensors, tensors))
    stacked = torch.stack([case.input, case.input.flip(0) * 2])
    agree(lambda f: torch.func.vmap(f, (0, *[None] * 4))(stacked, *tensors[1:]))
    leaves = leaves_of(tensors)
    cotangents = torch.randn(3, *case.grad_output.shape, dtype=torch.float64)
    agree(lambda f: torch.autograd.grad(f(*leaves), leaves, cotangents, is_grads_batched=True))


class Noted(Tensor):
    """A tensor subclass that writes down what is called with it."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("which", range(7))
def test_torch_function(which):
    """Any of the seven tensors may be of a class of its own."""
    case = draw(SMALL, torch.float64)
    tensors = [*case[:3], torch.zeros(5).double(), torch.ones(5).double(), *case[3:5]]
    expected = fused(SMALL, *(t.clone() for t in tensors), training=True)
    tensors[which] = tensors[which].as_subclass(Noted)
    Noted.seen.clear()
    output = fused(SMALL, *tensors, training=True)
    assert conv_batch_norm_relu_max_pool2d in Noted.seen
    torch.testing.assert_close(output.as_subclass(Tensor), expected, **CLOSE)


def test_meta_and_other_layouts_take_the_stock_layers():
    module = ConvBatchNormReLUMaxPool2d(3, 4, 3, device="meta")
    assert module(torch.ones(2, 3, 8, 8, device="meta")).shape == (2, 4, 3, 3)
    reasons = fusedcnn.build_info()["stock_calls"]
    assert any("meta" in reason for reason in reasons)
