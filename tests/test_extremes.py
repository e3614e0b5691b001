"""Sizes at the edges of 64 bits, and products of sizes that wrap: an error, or the right result.

Run against a build with UBSan too (see CONTRIBUTING): there, any arithmetic that wraps ends the
process.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from fusedcnn.functional import pack_geometry
from torch import Tensor

EXTREMES = [
    -(2**63), -(2**63) + 1, -(2**31), -1, 0, 2**31 - 1, 2**31, 2**32, 2**46, 2**46 + 1, 2**61,
    2**62, 2**62 + 1, 2**63 - 1,
]  # fmt: skip

SCALARS = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "pool_kernel_size": 2, "pool_stride": 2,
    "pool_padding": 0, "pool_dilation": 1,
}  # fmt: skip
# Every name that a message may blame.
ARGUMENTS = ("input", "weight", "bias", "grad_output", "code", *SCALARS)

OUT_OF_MEMORY = "allocate memory"


def _wrapping_pairs() -> list[tuple[int, int]]:
    """Two factors below 2^46 whose product is, modulo 2^64, one of the remainders below."""
    primes = [n for n in range(2, 700) if all(n % d for d in range(2, math.isqrt(n) + 1))]
    found = []
    for remainder in (0, -1, 1, -2, 2, 9, -9, 64, 2**31, -(2**31), -(2**63)):
        for multiple in range(1, 2000):
            product, small = multiple * 2**64 + remainder, 1
            rest = product
            for prime in primes:
                while rest % prime == 0 and small < 2**32:
                    rest, small = rest // prime, small * prime
            if 2**18 < small < 2**46 and 2**18 < product // small < 2**46:
                found += [(small, product // small), (product // small, small)]
                break
    return found


WRAPPING = _wrapping_pairs()


def test_the_pairs_wrap():
    remainders = {(a * b + 2**63) % 2**64 - 2**63 for a, b in WRAPPING}
    assert {0, -1, 1, -2, 2, -(2**63)} <= remainders
    assert all(a * b >= 2**63 for a, b in WRAPPING)


class Axis(NamedTuple):
    """One axis by the definitions, in integers of any size."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    pool: int
    pool_stride: int
    pool_padding: int
    pool_dilation: int

    @property
    def padded(self) -> int:
        return self.size + 2 * self.padding

    @property
    def conv(self) -> int:
        return (self.padded - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def out(self) -> int:
        window = self.pool_dilation * (self.pool - 1) + 1
        return (self.conv + 2 * self.pool_padding - window) // self.pool_stride + 1

    def window(self, o: int) -> range:
        """The convolution outputs that exist in the window of pooled output o."""
        start = o * self.pool_stride - self.pool_padding
        first = max(0, -(start // self.pool_dilation))
        last = min(self.pool, (self.conv - 1 - start) // self.pool_dilation + 1)
        return range(
            start + first * self.pool_dilation,
            start + last * self.pool_dilation,
            self.pool_dilation,
        )

    def taps(self, c: int) -> list[tuple[int, int]]:
        """(input element, tap) of convolution output c."""
        places = (
            (c * self.stride - self.padding + k * self.dilation, k) for k in range(self.kernel)
        )
        return [(i, k) for i, k in places if 0 <= i < self.size]


def axis(size: int, kernel: int, changed: dict[str, int]) -> Axis:
    scalars = {**SCALARS, **changed}
    del scalars["groups"]
    return Axis(size, kernel, *scalars.values())


def is_right(a: Axis) -> bool:
    """Whether the stock layers' rules allow it."""
    return (
        min(a.stride, a.dilation, a.pool, a.pool_stride, a.pool_dilation) >= 1
        and min(a.padding, a.pool_padding) >= 0
        and a.pool_padding <= a.pool // 2
        and a.conv >= 1
        and a.conv + 2 * a.pool_padding > a.pool_dilation * (a.pool - 1)
    )


def is_small(h: Axis, w: Axis) -> bool:
    if not (is_right(h) and is_right(w)):
        return False
    return h.padded * w.padded <= 2**16 and h.pool * w.pool <= 2**16 and h.out * w.out <= 2**12


def takes_long(h: Axis, w: Axis) -> bool:
    """Between what is computed at once and what no machine could hold: gigabytes, minutes."""
    if not (is_right(h) and is_right(w)) or is_small(h, w):
        return False
    return max(h.padded * w.padded, h.out * w.out, h.pool * w.pool) <= 2**42


def expected(input: Tensor, weight: Tensor, bias: Tensor, h: Axis, w: Axis) -> Tensor:
    """The output in float64, element by element; -inf where a window has no elements."""
    rows = []
    for oh, ow in itertools.product(range(h.out), range(w.out)):
        best = torch.full((input.shape[0], weight.shape[0]), -math.inf, dtype=torch.float64)
        for ch, cw in itertools.product(h.window(oh), w.window(ow)):
            total = bias.double().expand_as(best)
            for (ih, kh), (iw, kw) in itertools.product(h.taps(ch), w.taps(cw)):
                total = total + input[..., ih, iw].double() @ weight[..., kh, kw].double().T
            best = torch.maximum(best, total.relu())
        rows.append(best)
    return torch.stack(rows, -1).unflatten(-1, (h.out, w.out))


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=generator) for s in ((1, 2, 9, 9), (3, 2, 3, 3), (3,)))


def check(changed: dict[str, Any], h: Axis, w: Axis, compute) -> None:
    """compute() fails, naming an argument that was changed, or gives the right result."""
    if takes_long(h, w):
        return
    try:
        output = compute()
    except (RuntimeError, ValueError) as error:
        message = str(error)
        # A dilated kernel that is too large is a matter of the weight, too.
        assert any(name in message for name in changed) or OUT_OF_MEMORY in message, message
        assert "std::" not in message
        assert not is_small(h, w) or changed.get("groups", 1) != 1, message
        return
    assert is_right(h), changed
    assert is_right(w), changed
    torch.testing.assert_close(output, expected(*operands(), h, w).float())


def check_public(changed: dict[str, int], sides: str) -> None:
    """Change arguments for both axes, or for h alone; groups has but one value."""
    whole = {k: v for k, v in changed.items() if sides == "both" or k == "groups"}
    arguments = {k: (v, SCALARS[k]) for k, v in changed.items()} | whole
    h, w = axis(9, 3, changed), axis(9, 3, whole)
    check(changed, h, w, lambda: conv_relu_max_pool2d(*operands(), **arguments))


sides = pytest.mark.parametrize("sides", ["both", "h"])


@sides
@pytest.mark.parametrize("argument", SCALARS)
def test_each_argument_at_its_extremes(argument, sides):
    for value in EXTREMES:
        check_public({argument: value}, sides)


@sides
@pytest.mark.parametrize(
    "arguments", list(itertools.combinations(SCALARS, 2)), ids=lambda names: "-".join(names)
)
def test_two_arguments_whose_product_wraps(arguments, sides):
    for pair in WRAPPING:
        check_public(dict(zip(arguments, pair, strict=True)), sides)
    for pair in itertools.product((2**31, 2**62, 2**63 - 1), repeat=2):
        check_public(dict(zip(arguments, pair, strict=True)), sides)


@pytest.mark.parametrize("moderate", [{"padding": 10**6, "dilation": 10**6}, {"padding": 40}])
def test_products_that_wrap_beside_large_padding(moderate):
    for stride, pool_stride in WRAPPING:
        changed = {**moderate, "stride": stride, "pool_stride": pool_stride, "pool_kernel_size": 1}
        check_public(changed, "both")


@pytest.mark.parametrize("value", [2**31, 2**61, 2**62, 2**63 - 1])
@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
def test_padding_same(value, kernel_size):
    """What "same" comes to is a product, too."""
    input, weight = torch.ones(1, 2, 9, 9), torch.ones(3, 2, kernel_size, kernel_size)
    with pytest.raises(RuntimeError, match=r"padding|dilation"):
        conv_relu_max_pool2d(input, weight, padding="same", dilation=value)


# ---- the registered operators -------------------------------------------------------------------

GEOMETRY = pack_geometry((3, 3))
FIELDS = [
    "stride", "stride", "padding", "padding", "padding", "padding", "dilation", "dilation",
    "groups", "pool_kernel_size", "pool_kernel_size", "pool_stride", "pool_stride", "pool_padding",
    "pool_padding", "pool_dilation", "pool_dilation", "ceil_mode",
]  # fmt: skip


def run_operators(geometry: tuple[int, ...], names: set[str]) -> None:
    """Forward and backward: an error that names an argument, or finite results."""
    input, weight, bias = operands()
    ops = torch.ops.fusedcnn
    sound = pack_geometry((3, 3))
    output, code = ops.conv_relu_max_pool2d(input, weight, bias, sound, True)
    calls = {
        "forward": lambda: ops.conv_relu_max_pool2d(input, weight, bias, geometry, True),
        "backward": lambda: ops.conv_relu_max_pool2d_backward(
            torch.ones_like(output), input, weight, code, geometry, 7
        ),
    }
    for name, run in calls.items():
        # The backward meets codes that belong to another geometry as well.
        blamed = names | ({"grad_output", "code"} if name == "backward" else set())
        try:
            results = run()
        except RuntimeError as error:
            message = str(error)
            assert any(n in message for n in blamed) or OUT_OF_MEMORY in message, (name, message)
        else:
            assert all(r.isfinite().all() for r in results)


def geometry_takes_long(g: list[int]) -> bool:
    pads = (max(g[2], g[3]), max(g[4], g[5]))
    h, w = (Axis(9, 3, g[i], pads[i], g[6 + i], *g[9 + i : 17 : 2]) for i in (0, 1))
    return takes_long(h, w)


@pytest.mark.parametrize("field", range(len(FIELDS)), ids=lambda i: f"{i}-{FIELDS[i]}")
def test_each_field_of_the_geometry(field):
    for value in EXTREMES:
        geometry = list(GEOMETRY)
        geometry[field] = value
        if not geometry_takes_long(geometry):
            run_operators(tuple(geometry), {FIELDS[field]})


@pytest.mark.parametrize("first", range(len(FIELDS) - 1), ids=lambda i: f"{i}-{FIELDS[i]}")
def test_two_fields_of_the_geometry(first):
    for second in range(first + 1, len(FIELDS) - 1):
        for a, b in [*WRAPPING[::3], (2**62, 2**62), (2**63 - 1, 2**63 - 1), (2**32, 2**32)]:
            geometry = list(GEOMETRY)
            geometry[first], geometry[second] = a, b
            if not geometry_takes_long(geometry):
                run_operators(tuple(geometry), {FIELDS[first], FIELDS[second]})


def huge(*shape: int) -> Tensor:
    """A tensor of any size, in one element of memory."""
    return torch.ones(1).expand(shape)


@pytest.mark.parametrize("size", [2**31, 2**32, 2**46, 2**56, 2**62])
@pytest.mark.parametrize(
    "shapes",
    [
        lambda s: ((s, 2, 9, 9), (3, 2, 3, 3)),
        lambda s: ((1, s, 9, 9), (3, s, 3, 3)),
        lambda s: ((1, 2, s, 9), (3, 2, 3, 3)),
        lambda s: ((1, 2, 9, s), (3, 2, 3, 3)),
        lambda s: ((1, 2, 9, 9), (s, 2, 3, 3)),
        lambda s: ((1, 2, 9, 9), (3, 2, s, 3)),
        lambda s: ((0, s, 9, 9), (3, s, 3, 3)),
        lambda s: ((0, 2, s, 9), (3, 2, 3, 3)),
        lambda s: ((0, 2, 9, 9), (s, 2, 3, 3)),
        lambda s: ((1, s, 3, 3), (1, s, 3, 3)),
    ],
    ids=["N", "C", "H", "W", "OC", "KH", "empty-C", "empty-H", "empty-OC", "one-output-C"],
)
def test_tensors_of_any_size(shapes, size):
    """Expanded tensors have such sizes without their memory."""
    input_shape, weight_shape = shapes(size)
    if math.prod(input_shape) >= 2**63 or math.prod(weight_shape) >= 2**63:
        pytest.skip("torch itself has no such tensor")
    input, weight = huge(*input_shape), huge(*weight_shape)
    geometry = pack_geometry((1, 1), pool_kernel_size=1)
    try:
        output = torch.ops.fusedcnn.conv_relu_max_pool2d(input, weight, None, geometry, False)[0]
    except RuntimeError as error:
        message = str(error)
    else:
        message = "" if output.numel() else "input"  # nothing to compute, nothing to refuse
    assert any(name in message for name in (*ARGUMENTS, OUT_OF_MEMORY)), message


def test_strides_of_tensors_without_elements():
    """They can be anything, and nothing may be computed from them."""
    for strides in itertools.product((0, 1, 2**62), repeat=4):
        input = torch.empty(0).as_strided((0, 2, 9, 9), strides).requires_grad_()
        weight = torch.ones(3, 2, 3, 3, requires_grad=True)
        output = conv_relu_max_pool2d(input, weight)
        assert output.shape == (0, 3, 3, 3)
        output.sum().backward()
        assert weight.grad.eq(0).all()
        assert input.grad.shape == input.shape


def test_strides_of_dimensions_of_one_element():
    image = torch.randn(1, 1, 1, 9)
    weight = torch.randn(1, 1, 1, 3)
    expected = F.max_pool2d(F.relu(F.conv2d(image, weight)), (1, 2))
    for strides in itertools.product((0, 1, 2**62), repeat=3):
        leaf = image.as_strided((1, 1, 1, 9), (*strides, 1)).requires_grad_()
        kernel = weight.as_strided((1, 1, 1, 3), (*strides, 1)).requires_grad_()
        output = conv_relu_max_pool2d(leaf, kernel, pool_kernel_size=(1, 2))
        torch.testing.assert_close(output, expected)
        output.sum().backward()
