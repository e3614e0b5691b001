"""Blocks in a row and the layers behind them as one operator: values, errors, what torch asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from forcing import KERNELS
from fusedcnn import _ops
from fusedcnn._chain import chain_op
from fusedcnn._geometry import pack_geometry
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

BLOCK = pack_geometry((3, 3), padding=1)
CHAIN = "fusedcnn.conv_relu_max_pool2d_chain.default"


def parameters_of(channels: tuple[int, ...], features: tuple[int, ...]) -> list[Tensor]:
    """Small integers, whose sums of up to 2^24 are exact in any order: 3x3 blocks, then layers."""
    shapes = [(out, channels[i], 3, 3) for i, out in enumerate(channels[1:])]
    shapes += [(out, features[i]) for i, out in enumerate(features[1:])]
    return [torch.randint(-1, 2, size).float() for shape in shapes for size in (shape, shape[:1])]


def images(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape).float()


def layer_by_layer(input: Tensor, parameters: list[Tensor], blocks: int, pool: int = 2) -> Tensor:
    """The stock layers."""
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    for weight, bias in pairs[:blocks]:
        input = F.max_pool2d(F.relu(F.conv2d(input, weight, bias, padding=1)), pool)
    if len(pairs) > blocks:
        input = input.flatten(1)
    for weight, bias in pairs[blocks:-1]:
        input = F.relu(F.linear(input, weight, bias))
    return F.linear(input, *pairs[-1]) if len(pairs) > blocks else input


# Channels of the blocks, then features of the layers behind them, over 12x12 images: one and three
# blocks; none, one and three layers; sizes that fill no vector, and more than one.
CHAINS = {
    "block": ((3, 5), ()),
    "blocks": ((3, 16, 17, 4), ()),
    "layer": ((3, 4), (144, 1)),
    "layers": ((2, 7, 16), (144, 33, 18, 9)),
    "wide": ((3, 32, 48), (432, 130, 10)),
}


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", CHAINS)
def test_values(name, threads, exact, restore_threads):
    """Exactly those of the stock layers, for every number of images in a tile and of threads."""
    channels, features = CHAINS[name]
    parameters, blocks = parameters_of(channels, features), len(channels) - 1
    torch.set_num_threads(threads)
    for n in (0, 1, 2, 3, 4, 5, 7, 16, 37):
        input = images(n, channels[0], 12, 12)
        expected = layer_by_layer(input, parameters, blocks)
        output = chain_op(input, parameters, BLOCK)
        assert torch.equal(output, expected)
        assert output.is_contiguous()
        assert torch.equal(chain_op(input, parameters, BLOCK * blocks), expected)


@pytest.mark.parametrize("forced", [f for f in KERNELS if f.pass_name == "forward"], ids=str)
def test_each_kernel(forced):
    """Alone and as often as there are blocks: the block's operator, block by block, to the bit."""
    if forced.kernel == "tiles":
        pytest.skip("for bfloat16")
    exercised = 0
    for channels in ((6, 7, 16), (16, 32, 16)):
        parameters, input = parameters_of(channels, (256, 12, 5)), images(5, channels[0], 16, 16)
        with _ops.force(forced.isa, forced.kernel):
            try:
                features = input
                for i in (0, 2):
                    features = _ops.forward_op(features, *parameters[i : i + 2], BLOCK, False)[0]
            except RuntimeError:
                with pytest.raises(RuntimeError, match="no forward kernel covers this call"):
                    chain_op(input, parameters, BLOCK)
                continue
            assert torch.equal(chain_op(input, parameters[:4], BLOCK), features)
            output = chain_op(input, parameters, BLOCK)
        expected = layer_by_layer(features, parameters[4:], 0)
        if forced.exact:
            assert torch.equal(output, expected)
        else:  # sums of 256 products of magnitudes up to 100, and of 12
            torch.testing.assert_close(output, expected, rtol=0, atol=256 * 12 * 100 * 2.0**-24)
        exercised += 1
    assert exercised


def test_other_geometries(exact):
    """Each block has its own: strides, windows, groups, more padding after than before."""
    first = pack_geometry((4, 4), (2, 1), "valid", 1, 1, (3, 2), (2, 2), (1, 0), 1, True)
    second = pack_geometry((2, 2), 1, "same", 1, 2, 20, 1, 10, 1, False)  # codes would be int32
    weights = images(8, 3, 4, 4), images(6, 4, 2, 2)
    input = images(3, 3, 21, 24)
    stock = F.max_pool2d(F.relu(F.conv2d(input, weights[0], torch.ones(8), (2, 1))), (3, 2), 2,
                         (1, 0), 1, True)  # fmt: skip
    stock = F.conv2d(F.pad(stock, (0, 1, 0, 1)), weights[1], torch.ones(6), groups=2)
    stock = F.max_pool2d(F.relu(stock), 20, 1, 10)
    parameters = [weights[0], torch.ones(8), weights[1], torch.ones(6)]
    assert torch.equal(chain_op(input, parameters, first + second), stock)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(t.shape),
    "every_other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, exact):
    """Of the images, of weights and of biases."""
    parameters, input = parameters_of((3, 16, 8), (72, 20, 3)), images(5, 3, 12, 12)
    expected = layer_by_layer(LAYOUTS[layout](input), parameters, 2)
    assert torch.equal(chain_op(LAYOUTS[layout](input), parameters, BLOCK), expected)
    for i, parameter in enumerate(parameters):
        if parameter.dim() != 4 and layout == "channels_last":
            continue
        if parameter.dim() == 1 and layout == "transposed":
            continue
        strided = [*parameters]
        strided[i] = LAYOUTS[layout](parameter)
        expected = layer_by_layer(input, strided, 2)
        assert torch.equal(chain_op(input, strided, BLOCK), expected)


def test_values_that_are_not_finite(exact):
    """NaN passes ReLU and pool; infinities meet zeros; each only in its own image."""
    parameters, input = parameters_of((2, 4, 4), (16, 6, 6)), images(6, 2, 8, 8)
    input[1, 0, 3, 3], input[2, 1, 0, 0], input[4, 0, 7, 7] = torch.nan, torch.inf, -torch.inf
    expected = layer_by_layer(input, parameters, 2)
    output = chain_op(input, parameters, BLOCK)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    assert output[[0, 3, 5]].isfinite().all()


def test_bits_do_not_depend_on_the_batch():
    """Nor on threads: real numbers, each image alone and in any company."""
    parameters = [torch.randn_like(p) for p in parameters_of((3, 16, 32), (288, 128, 10))]
    input = torch.randn(41, 3, 12, 12)
    together = chain_op(input, parameters, BLOCK)
    for i in (0, 1, 15, 16, 39, 40):
        assert torch.equal(chain_op(input[i : i + 1], parameters, BLOCK)[0], together[i])
    assert torch.equal(chain_op(input[3:21], parameters, BLOCK), together[3:21])


def test_large_images_go_a_block_at_a_time(restore_threads):
    """Where the stock convolution is chosen within, the chain is made of the block's operator."""
    weight, bias = torch.randn(256, 256, 3, 3) / 48, torch.randn(256)
    input = torch.randn(1, 256, 28, 28)
    parameters = [weight, bias, torch.randn(7, 256 * 14 * 14) / 200, torch.randn(7)]
    features = _ops.forward_op(input, weight, bias, BLOCK, False)[0]
    assert torch.equal(chain_op(input, parameters[:2], BLOCK), features)
    expected = F.linear(features.double().flatten(1), *(p.double() for p in parameters[2:]))
    # 50,176 products of magnitude 1 / 200 in 16 lanes of 3,136 and a tree.
    torch.testing.assert_close(
        chain_op(input, parameters, BLOCK).double(), expected, rtol=0, atol=3140 * 2.0**-24 * 10
    )


CHANGES = {
    "add": lambda p: p.add_(1),
    "through_data": lambda p: p.data.mul_(2),
    "through_numpy": lambda p: p.detach().numpy().__imul__(-1),
    "last_element": lambda p: p.view(-1)[-1:].add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_changed_in_place(change):
    """What kernels derive from a weight is not kept beyond its values."""
    input = torch.rand(3, 4, 12, 12)
    for i in range(8):
        parameters = [torch.rand_like(p) for p in parameters_of((4, 32, 32), (288, 20, 5))]
        before = chain_op(input, parameters, BLOCK)
        CHANGES[change](parameters[i])
        after = chain_op(input, parameters, BLOCK)
        assert not torch.equal(after, before)
        assert torch.equal(after, chain_op(input, [p.clone() for p in parameters], BLOCK))


def test_threads_of_the_program(restore_threads):
    """Calls at the same time with other sizes and weights: each result is that of a call alone."""
    torch.set_num_threads(2)
    cases = []
    for n, out in ((1, 16), (3, 32), (20, 8), (5, 16)):
        parameters = [torch.randn_like(p) for p in parameters_of((3, out, out), (out * 9, 30, 4))]
        cases.append((torch.randn(n, 3, 12, 12), parameters))
    alone = [chain_op(*case, BLOCK) for case in cases]

    def right(thread: int) -> bool:
        order = [(thread + i) % len(cases) for i in range(24)]
        return all(torch.equal(chain_op(*cases[i], BLOCK), alone[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(8)))


# ---- errors --------------------------------------------------------------------------------------


def changed(i: int, value: Tensor) -> list[Tensor]:
    parameters = parameters_of((3, 4, 5), (45, 6, 2))
    parameters[i] = value
    return parameters


def released(*shape: int) -> Tensor:
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


GOOD = images(2, 3, 12, 12)
ERRORS = {
    "dtype": (GOOD.double(), None, BLOCK, "^input: expected float32, got float64"),
    "rank": (GOOD[0], None, BLOCK, r"^input: expected \[N, C, H, W\], got 3 dimensions"),
    "channels": (GOOD[:, :2], None, BLOCK, "^block 0: input: expected 3 channels"),
    "image": (GOOD[..., :8, :8], None, BLOCK, r"^parameters\[4\]: .* \[out_features, 20\].*6, 45"),
    "input_storage": (released(2, 3, 12, 12), None, BLOCK, "^input: expected a storage"),
    "no_parameters": (GOOD, [], BLOCK, "^parameters: expected a weight and a bias .* got 0"),
    "odd": (GOOD, parameters_of((3, 4), ())[:1], BLOCK, "^parameters: .* got 1 tensors"),
    "no_block": (GOOD, parameters_of((), (9, 2)), BLOCK, r"^parameters\[0\]: expected 4 dim"),
    "geometries": (GOOD, None, BLOCK * 3, "^geometries: expected 18 .* 2 blocks, got 54"),
    "geometry": (GOOD, None, BLOCK + (0,) * 18, "^block 1: groups: expected a value"),
    "weight_type": (GOOD, changed(2, images(5, 4, 3, 3).half()), BLOCK, r"^parameters\[2\]: .*16"),
    "weight_size": (GOOD, changed(2, images(5, 3, 3, 3)), BLOCK, "^block 1: input: expected 3"),
    "bias_rank": (GOOD, changed(3, images(5, 1)), BLOCK, r"^parameters\[3\]: expected 1 dimens"),
    "bias_size": (
        GOOD,
        changed(3, images(4)),
        BLOCK,
        r"^parameters\[3\]: expected \[5\], .* \[4\]",
    ),
    "linear": (GOOD, changed(4, images(6, 44)), BLOCK, r"^parameters\[4\]: .*, 45\].*\[6, 44\]"),
    "linear_rank": (GOOD, changed(6, images(6)), BLOCK, r"^parameters\[6\]: expected 2 dim"),
    "linear_bias": (GOOD, changed(5, images(2)), BLOCK, r"^parameters\[5\]: expected \[6\]"),
    "storage": (GOOD, changed(4, released(6, 45)), BLOCK, r"^parameters\[4\]: expected a storage"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    input, parameters, geometries, message = ERRORS[name]
    good = parameters_of((3, 4, 5), (45, 6, 2))
    with pytest.raises(RuntimeError, match=message):
        chain_op(input, good if parameters is None else parameters, geometries)
    assert chain_op(GOOD, good, BLOCK).shape == (2, 2)


# ---- what torch asks of an operator --------------------------------------------------------------


def test_opcheck():
    parameters, input = parameters_of((3, 4, 5), (45, 6, 2)), images(2, 3, 12, 12)
    leaves = [t.requires_grad_() for t in (input, *parameters)]
    torch.library.opcheck(chain_op, (leaves[0], leaves[1:], list(BLOCK)))
    torch.library.opcheck(chain_op, (input.detach(), [p.detach() for p in parameters[:4]], BLOCK))


@pytest.mark.parametrize("frozen", [(), (0,), (1, 4, 8)])
def test_gradients(frozen):
    """A program exported in evaluation mode may still be asked for them: first and second."""
    operands = (images(3, 2, 8, 8), *parameters_of((2, 3, 4), (16, 5, 2)))
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(operands)]
    wanted = [t for t in leaves if t.requires_grad]

    def gradients(output: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(output.sum(), wanted, create_graph=True)
        second = torch.autograd.grad(
            sum(g.sum() for g in first), wanted, allow_unused=True, materialize_grads=True
        )
        return [*first, *second]

    ours = gradients(chain_op(leaves[0], leaves[1:], BLOCK))
    theirs = gradients(layer_by_layer(leaves[0], leaves[1:], 2))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradient_of_an_operand_that_comes_from_another():
    """Only the direct dependence counts, also where the graph goes on."""
    parameters = [p.requires_grad_() for p in parameters_of((2, 3), (48, 2))]
    results = []
    for function in (lambda i, p: chain_op(i, p, BLOCK), lambda i, p: layer_by_layer(i, p, 1)):
        input = torch.ones(1, 2, 8, 8) * parameters[1].sum()
        output = function(input, parameters).sum()
        results.append(torch.autograd.grad(output, parameters, create_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_vmap():
    """Over images, over an ensemble's parameters, over both."""
    input = images(4, 2, 3, 8, 8)
    parameters = [
        torch.stack(p)
        for p in zip(*(parameters_of((3, 4), (64, 2)) for _ in range(4)), strict=True)
    ]

    def one(input, parameters):
        return chain_op(input, parameters, BLOCK)

    def each(i):
        return [p[i] for p in parameters]

    expected = torch.stack([one(input[i], each(i)) for i in range(4)])
    assert torch.equal(torch.vmap(one)(input, parameters), expected)
    expected = torch.stack([one(input[i], each(0)) for i in range(4)])
    assert torch.equal(torch.vmap(one, (0, None))(input, each(0)), expected)
    expected = torch.stack([one(input[1], each(i)) for i in range(4)])
    assert torch.equal(
        torch.vmap(one, (None, 0), 1)(input[1], parameters), expected.transpose(0, 1)
    )


@pytest.mark.parametrize("features", [(), (45, 6, 2)])
def test_decomposition_and_flops(features, exact):
    parameters, input = parameters_of((3, 4, 5), features), images(2, 3, 12, 12)
    decomposition = fusedcnn.decompositions()[chain_op]
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = input.contiguous(memory_format=layout), parameters, list(BLOCK)
        assert torch.equal(decomposition(*arguments), chain_op(*arguments))
        assert decomposition(*arguments).stride() == chain_op(*arguments).stride()
    counts = []
    for function in (chain_op, decomposition):
        with FlopCounterMode(display=False) as counter:
            function(input, parameters, list(BLOCK))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_meta():
    """The shape without values, unless only some of the operands are there."""
    parameters = [p.to("meta") for p in parameters_of((3, 4, 5), (45, 6, 2))]
    assert chain_op(GOOD.to("meta"), parameters, BLOCK).shape == (2, 2)
    parameters = changed(4, torch.ones(6, 45, device="meta"))
    with pytest.raises(RuntimeError, match=r"^parameters\[4\]: expected device cpu like input"):
        chain_op(GOOD, parameters, BLOCK)
