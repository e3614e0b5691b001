"""conv_batch_norm_relu_max_pool2d: the right values, everywhere that the block has them."""

from __future__ import annotations

import itertools
import math

import batch_norm_cases as cases
import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import Case, draw, fused, stock, too_far
from checks import assert_equal, leaves_of, over, step
from forcing import ISAS
from fusedcnn import _ops, build_info
from geometries import BLOCKS, DTYPES, Block
from reference import LAYOUTS, with_layout
from test_determinism import LARGE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SMALL = Block("small", (3, 2, 7, 6), 5, padding=1)


# ---- values --------------------------------------------------------------------------------------

# Each geometry in float32, and a third of them in each other type.
TYPED = [
    (block, dtype)
    for i, dtype in enumerate(DTYPES)
    for block in (BLOCKS if dtype == torch.float32 else BLOCKS[i::3])
]


@pytest.mark.parametrize(("block", "dtype"), TYPED, ids=lambda v: getattr(v, "name", str(v)[6:]))
def test_as_close_as_rounding_allows(block, dtype):
    """Output, winners, statistics and gradients."""
    assert not too_far(block, draw(block, dtype))


@over(BLOCKS[::6])
def test_layouts(block):
    """Whatever the strides; and a channels_last input gives a channels_last output."""
    for layout in LAYOUTS[1:]:
        case = draw(block, torch.float32).map(lambda t, layout=layout: with_layout(t, layout))
        assert not too_far(block, case), layout
        output = fused(block, *case[:3], None, None, *case[3:5], training=True)
        if layout == "channels_last":
            assert output.is_contiguous(memory_format=torch.channels_last)


@over(BLOCKS[::6])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa, block):
    with _ops.force(isa):
        assert not too_far(block, draw(block, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over(LARGE)
def test_the_same_bits_from_any_number_of_threads(block, dtype, restore_threads):
    case = draw(block, dtype)
    torch.set_num_threads(1)
    expected, code = cases.run(block, case)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        results, again = cases.run(block, case)
        assert_equal((results, again), (expected, code))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_with_parameters_in_float32(dtype):
    """As autocast brings them together."""
    case = draw(SMALL, dtype, affine=torch.float32)
    assert not too_far(SMALL, case)
    mean, var = torch.zeros(5), torch.ones(5)
    leaves = leaves_of(case[:5])
    output = fused(SMALL, *leaves[:3], mean, var, *leaves[3:], training=True)
    output.backward(case.grad_output)
    assert output.dtype == dtype
    assert [t.grad.dtype for t in leaves] == [*[dtype] * 3, *[torch.float32] * 2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [*itertools.product([True, False], repeat=3)])
def test_optional_tensors(given, training):
    """Bias and the normalisation's two parameters, each given or not: values and gradients."""
    case = draw(SMALL, torch.float64)
    optional = [t if there else None for t, there in zip(case[2:5], given, strict=True)]
    tensors = [*case[:2], *optional]
    results = []
    for function in (fused, stock):
        mean, var = torch.linspace(-1, 1, 5).double(), torch.linspace(0.5, 2, 5).double()

        def call(input, weight, bias, *affine, function=function, mean=mean, var=var):
            tensors = input, weight, bias, mean, var, *affine
            return function(SMALL, *tensors, training=training, momentum=0.3, eps=1e-2)

        results.append([*step(call, tensors, case.grad_output), mean, var])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1, 1.5, math.nan])
def test_running_statistics(momentum):
    """Of a channel with a bias, of several types and layouts, over several calls."""
    case = draw(SMALL, torch.float64)
    results = []
    for function in (fused, stock):
        running = [torch.zeros(10).double()[::2], torch.ones(5).double()]
        for _ in range(3):
            function(SMALL, *case[:3], *running, *case[3:5], training=True, momentum=momentum)
        results.append(running)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_of_half_types(dtype):
    """Mixed in float32 and rounded once."""
    case = draw(SMALL, dtype)
    running = [torch.full((5,), 0.3, dtype=dtype), torch.full((5,), 0.7, dtype=dtype)]
    expected = [t.double() for t in running]
    fused(SMALL, *case[:3], *running, *case[3:5], training=True)
    stock(SMALL, *case.map(Tensor.double)[:3], *expected, training=True)
    for ours, theirs in zip(running, expected, strict=True):
        assert ((ours - theirs).abs() <= torch.finfo(dtype).eps * theirs.abs()).all()


# A constant beside which the values differ little, and values near the smallest that there are.
@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1.0), (-1e4, 1e-2), (0.0, 1e-18), (1.0, 0.0)])
@over(["simplecnn1_n5", "channels16to16", "kernel5x5", "resnet_stem"])
def test_statistics_are_as_accurate_as_torch(block, offset, spread):
    """Against float64: the variance in particular, whose terms nearly cancel."""
    case = draw(block, torch.float32)
    input, weight = case.input * spread + offset, case.weight
    results, _ = cases.run(block, case._replace(input=input))
    plane = block.conv(input.double(), weight.double())
    var, mean = torch.var_mean(plane, (0, 2, 3), correction=0)
    stock_var, stock_mean = torch.var_mean(block.conv(input, weight), (0, 2, 3), correction=0)
    # Sums of so many terms may differ by rounding where torch's own are exact by luck.
    terms = block.conv(input.double().abs(), weight.double().abs()).amax((0, 2, 3))
    luck = torch.finfo(torch.float32).eps * terms
    spread = (var + luck**2).sqrt()
    for ours, theirs, exact, floor in (
        (results["mean"], stock_mean, mean, luck),
        (results["var"], stock_var, var, 2 * luck * spread),
    ):
        assert ((ours - exact).abs() <= 2 * (theirs - exact).abs().max() + floor).all()
    assert (results["var"] >= 0).all()


def put(field: str, index: tuple[int, ...], value: float):
    def change(case: Case) -> None:
        getattr(case, field)[index] = value

    return change


NON_FINITE = {
    f"{value} in {field}": put(field, index, value)
    for value in (math.nan, math.inf, -math.inf)
    for field, index in {
        "input": (1, 0, 3, 3),
        "weight": (2, 0, 1, 1),
        "bias": (1,),
        "bn_weight": (3,),
        "bn_bias": (0,),
        "grad_output": (0, 2, 1, 1),
    }.items()
}


@pytest.mark.parametrize("change", NON_FINITE)
def test_nan_and_infinities_go_where_torch_lets_them_go(change):
    case = draw(SMALL, torch.float64)
    NON_FINITE[change](case)
    results = []
    for function in (fused, stock):
        running = torch.zeros(5).double(), torch.ones(5).double()

        def call(*tensors, function=function, running=running):
            return function(SMALL, *tensors[:3], *running, *tensors[3:], training=True)

        output, *gradients = step(call, case[:5], case.grad_output)
        results.append([output, *running, *gradients])
    if "bn_" in change:
        # All of the channel is alike then, and which of its elements win is decided before the
        # affine map; and torch's own formula for an infinite scale has NaN where others have not.
        compared = slice(1, 3) if "inf in bn_weight" in change else slice(3)
        results = [result[compared] for result in results]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_an_empty_batch():
    """Nothing to normalise by: as torch has it, and the statistics stay."""
    case = draw(SMALL, torch.float32)
    running = torch.zeros(5), torch.ones(5)
    output = fused(SMALL, case.input[:0], *case[1:3], *running, *case[3:5], training=True)
    assert output.shape == (0, 5, 3, 3)
    assert_equal(list(running), [torch.zeros(5), torch.ones(5)])
    assert build_info()["stock_calls"]["a BatchNorm2d of an empty batch"] >= 1


# ---- derivatives ---------------------------------------------------------------------------------

GEOMETRIES = [
    Block("plain", (2, 1, 4, 4), 3, padding=1),
    Block("overlapping", (2, 1, 7, 6), 2, 3, 2, 1, pool=3, pool_stride=2, pool_padding=1),
    Block("grouped", (2, 2, 4, 5), 2, (2, 3), groups=2, pool=(1, 2), ceil_mode=True),
]


@pytest.mark.parametrize("affine", [True, False])
@over(GEOMETRIES)
def test_gradcheck(block, affine):
    """First and second derivatives by finite differences."""
    case = draw(block, torch.float64)
    leaves = leaves_of(case[:5] if affine else case[:3])

    def function(*tensors):
        tensors = [*tensors, None, None][:5]
        return fused(block, *tensors[:3], None, None, *tensors[3:], training=True)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", [n for n in itertools.product([0, 1], repeat=5) if any(n)])
def test_only_the_gradients_that_are_needed(needed):
    case = draw(SMALL, torch.float32)
    whole = step(lambda *t: fused(SMALL, *t[:3], None, None, *t[3:], training=True), case[:5])[1:]
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(case[:5], needed, strict=True)]
    fused(SMALL, *leaves[:3], None, None, *leaves[3:], training=True).sum().backward()
    for leaf, need, expected in zip(leaves, needed, whole, strict=True):
        assert (leaf.grad is None) == (not need)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


def test_a_gradient_penalty():
    """Through create_graph: parameters' gradients of a norm of the input's gradient."""
    case = draw(SMALL, torch.float64)
    results = []
    for function in (fused, stock):
        leaves = leaves_of(case[:5])
        output = function(SMALL, *leaves[:3], None, None, *leaves[3:], training=True)
        (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum() + output.sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_statistics_are_not_differentiable():
    """Nor are they among the outputs that a user sees."""
    case = draw(SMALL, torch.float32)
    leaves = leaves_of(case[:5])
    output, *kept = _ops.bn_forward_op(*leaves, SMALL.pack(), cases.EPS, True)
    assert output.requires_grad
    assert not any(t.requires_grad for t in kept)


# ---- what is kept --------------------------------------------------------------------------------


def kept_bytes(function, leaves: list[Tensor], also: Tensor) -> int:
    """Bytes saved for the backward, those of the operands left out."""
    known = {t.untyped_storage().data_ptr() for t in (*leaves, also)}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*leaves[:3], None, None, *leaves[3:], training=True)
    del output
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over(["simplecnn1_n5", "vgg64", "resnet_stem"])
def test_at_most_a_quarter_of_stock_is_kept_for_the_backward(block, dtype):
    case = draw(block, dtype)
    leaves = leaves_of(case[:5])

    def layers(*tensors, **options):
        input, weight, bias, *norm = tensors
        plane = F.batch_norm(block.conv(input, weight, bias), *norm, **options)
        return F.max_pool2d(F.relu(plane), *block.pool_arguments)

    theirs = kept_bytes(layers, leaves, case.input)
    ours = kept_bytes(lambda *t, **o: fused(block, *t, **o), leaves, case.input)
    assert 0 < ours <= theirs / 4


def test_checkpointing_updates_statistics_as_stock_does():
    """At the forward and again where it is computed once more."""
    case = draw(SMALL, torch.float64)
    results = []
    for function in (fused, stock):
        running = torch.zeros(5).double(), torch.ones(5).double()
        leaves = leaves_of(case[:5])

        def call(*tensors, function=function, running=running):
            return function(SMALL, *tensors[:3], *running, *tensors[3:], training=True)

        checkpoint(call, *leaves, use_reentrant=False).sum().backward()
        results.append([*running, *(t.grad for t in leaves)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
