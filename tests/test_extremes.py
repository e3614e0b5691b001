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
from checks import step
from fusedcnn import conv_relu_max_pool2d
from fusedcnn.functional import pack_geometry
from geometries import pair, stock
from torch import Tensor

EXTREMES = [
    -(2**63), -(2**63) + 1, -(2**31), -1, 0, 2**31 - 1, 2**31, 2**32, 2**46, 2**46 + 1, 2**61,
    2**62, 2**62 + 1, 2**63 - 1,
]  # fmt: skip

SCALARS = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "pool_kernel_size": 2, "pool_stride": 2,
    "pool_padding": 0, "pool_dilation": 1,
}  # fmt: skip

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

    @property
    def right(self) -> bool:
        """Whether the stock layers' rules allow it."""
        return (
            min(self.stride, self.dilation, self.pool, self.pool_stride, self.pool_dilation) >= 1
            and min(self.padding, self.pool_padding) >= 0
            and self.pool_padding <= self.pool // 2
            and self.conv >= 1
            and self.conv + 2 * self.pool_padding > self.pool_dilation * (self.pool - 1)
        )


def axis(changed: dict[str, int]) -> Axis:
    """Of 9 pixels and 3 taps."""
    scalars = {**SCALARS, **changed}
    del scalars["groups"]
    return Axis(9, 3, *scalars.values())


def is_small(h: Axis, w: Axis) -> bool:
    if not (h.right and w.right):
        return False
    return h.padded * w.padded <= 2**16 and h.pool * w.pool <= 2**16 and h.out * w.out <= 2**12


def takes_long(h: Axis, w: Axis) -> bool:
    """Between what is computed at once and what no machine could hold: gigabytes, minutes."""
    if not (h.right and w.right) or is_small(h, w):
        return False
    return max(h.padded * w.padded, h.out * w.out, h.pool * w.pool) <= 2**42


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=generator) for s in ((1, 2, 9, 9), (3, 2, 3, 3), (3,)))


def check(changed: dict[str, int], sides: str) -> None:
    """Arguments changed for both axes or for h alone (groups has but one value): the call fails,
    naming one of them, or gives the right result.
    """
    whole = {k: v for k, v in changed.items() if sides == "both" or k == "groups"}
    arguments: dict[str, Any] = {k: (v, SCALARS[k]) for k, v in changed.items()} | whole
    h, w = axis(changed), axis(whole)
    if takes_long(h, w):
        return
    try:
        output = conv_relu_max_pool2d(*operands(), **arguments)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        assert any(name in message for name in changed) or OUT_OF_MEMORY in message, message
        assert "std::" not in message
        assert not is_small(h, w) or changed.get("groups", 1) != 1, message
        return
    assert h.right, changed
    assert w.right, changed
    # Of sizes that fit, only strides can be as large as this, where nothing comes after one.
    arguments = {k: tuple(min(x, 2**20) for x in pair(v)) for k, v in arguments.items()}
    arguments["groups"] = 1  # as in all that fit
    right = stock(*(t.double() for t in operands()), **arguments)
    torch.testing.assert_close(output, right.float())


over_sides = pytest.mark.parametrize("sides", ["both", "h"])


@over_sides
@pytest.mark.parametrize("argument", SCALARS)
def test_each_argument_at_its_extremes(argument, sides):
    for value in EXTREMES:
        check({argument: value}, sides)


@over_sides
@pytest.mark.parametrize(
    "arguments", list(itertools.combinations(SCALARS, 2)), ids=lambda names: "-".join(names)
)
def test_two_arguments_whose_product_wraps(arguments, sides):
    large = itertools.product((2**31, 2**62, 2**63 - 1), repeat=2)
    for values in (*WRAPPING, *large):
        check(dict(zip(arguments, values, strict=True)), sides)


@pytest.mark.parametrize("moderate", [{"padding": 10**6, "dilation": 10**6}, {"padding": 40}])
def test_products_that_wrap_beside_large_padding(moderate):
    for stride, pool_stride in WRAPPING:
        strides = {"stride": stride, "pool_stride": pool_stride}
        check({**moderate, **strides, "pool_kernel_size": 1}, "both")


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


def check_operators(changed: dict[int, int]) -> None:
    """Forward and backward, some fields of the geometry changed: an error that names an argument,
    or finite results.
    """
    g = list(GEOMETRY)
    for field, value in changed.items():
        g[field] = value
    pads = (max(g[2], g[3]), max(g[4], g[5]))
    if takes_long(*(Axis(9, 3, g[i], pads[i], g[6 + i], *g[9 + i : 17 : 2]) for i in (0, 1))):
        return
    input, weight, bias = operands()
    ops = torch.ops.fusedcnn
    output, code = ops.conv_relu_max_pool2d(input, weight, bias, GEOMETRY, True)
    grad_output = torch.ones_like(output)
    names = {FIELDS[field] for field in changed}
    for run, arguments, blamed in (
        (ops.conv_relu_max_pool2d, (input, weight, bias, g, True), names),
        # Here the code belongs to another geometry.
        (ops.conv_relu_max_pool2d_backward, (grad_output, input, weight, code, g, 7),
         names | {"grad_output", "code"}),
    ):  # fmt: skip
        try:
            results = run(*arguments)
        except RuntimeError as error:
            message = str(error)
            assert any(n in message for n in blamed) or OUT_OF_MEMORY in message, (run, message)
        else:
            assert all(r.isfinite().all() for r in results)


def over_fields(count: int):
    return pytest.mark.parametrize("field", range(count), ids=lambda i: f"{i}-{FIELDS[i]}")


@over_fields(len(FIELDS))
def test_each_field_of_the_geometry(field):
    for value in EXTREMES:
        check_operators({field: value})


@over_fields(len(FIELDS) - 2)  # not ceil_mode, and not the last that is no first
def test_two_fields_of_the_geometry(field):
    for second in range(field + 1, len(FIELDS) - 1):
        for a, b in [*WRAPPING[::3], (2**62, 2**62), (2**63 - 1, 2**63 - 1), (2**32, 2**32)]:
            check_operators({field: a, second: b})


@pytest.mark.parametrize("size", [2**31, 2**32, 2**46, 2**56, 2**62])
@pytest.mark.parametrize(
    ("input", "weight"),
    [
        ("s 2 9 9", "3 2 3 3"),
        ("1 s 9 9", "3 s 3 3"),
        ("1 2 s 9", "3 2 3 3"),
        ("1 2 9 s", "3 2 3 3"),
        ("1 2 9 9", "s 2 3 3"),
        ("1 2 9 9", "3 2 s 3"),
        ("0 s 9 9", "3 s 3 3"),
        ("0 2 s 9", "3 2 3 3"),
        ("0 2 9 9", "s 2 3 3"),
        ("1 s 3 3", "1 s 3 3"),
    ],
)
def test_tensors_of_any_size(input, weight, size):
    """Expanded tensors have such sizes without their memory."""
    shapes = [[size if n == "s" else int(n) for n in text.split()] for text in (input, weight)]
    if max(map(math.prod, shapes)) >= 2**63:
        pytest.skip("torch itself has no such tensor")
    tensors = [torch.ones(1).expand(shape) for shape in shapes]
    geometry = pack_geometry((1, 1), pool_kernel_size=1)
    try:
        output = torch.ops.fusedcnn.conv_relu_max_pool2d(*tensors, None, geometry, False)[0]
    except RuntimeError as error:
        message = str(error)
    else:
        message = "" if output.numel() else "input"  # nothing to compute, nothing to refuse
    assert any(name in message for name in ("input", "weight", *SCALARS, OUT_OF_MEMORY)), message


def test_strides_of_tensors_without_elements():
    """They can be anything, and nothing may be computed from them."""
    weight = torch.ones(3, 2, 3, 3)
    for strides in itertools.product((0, 1, 2**62), repeat=4):
        input = torch.empty(0).as_strided((0, 2, 9, 9), strides)
        output, grad_input, grad_weight = step(conv_relu_max_pool2d, (input, weight))
        assert output.shape == (0, 3, 3, 3)
        assert grad_weight.eq(0).all()
        assert grad_input.shape == input.shape


def test_strides_of_dimensions_of_one_element():
    image, weight = torch.randn(9), torch.randn(3)
    kernel_size = {"pool_kernel_size": (1, 2)}
    expected = stock(image.view(1, 1, 1, 9), weight.view(1, 1, 1, 3), **kernel_size)
    for strides in itertools.product((0, 1, 2**62), repeat=3):
        tensors = [t.as_strided((1, 1, 1, len(t)), (*strides, 1)) for t in (image, weight)]
        output, *_ = step(lambda *t: conv_relu_max_pool2d(*t, **kernel_size), tensors)
        torch.testing.assert_close(output, expected)
