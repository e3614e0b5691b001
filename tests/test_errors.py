"""What bad input gets: the stock layers' error class and a message that names the argument."""

from __future__ import annotations

import re
from typing import Any

import fusedcnn
import numpy as np
import pytest
import torch
from checks import assert_equal, leaves_of
from fusedcnn import ConvReLUMaxPool2d, FusedSimpleCNN, conv_relu_max_pool2d
from fusedcnn.functional import pack_geometry
from geometries import stock
from torch import Tensor, nn, ones

ERRORS = (RuntimeError, ValueError, TypeError)
GEOMETRY = pack_geometry((3, 3))


def call(changed: dict[str, Any]) -> dict[str, Any]:
    """A right call's arguments with some of them changed."""
    return {"input": ones(2, 4, 8, 9), "weight": ones(6, 4, 3, 3), "bias": ones(6), **changed}


def wrong(changed: dict[str, Any], names: str = "", error: type[Exception] | None = None):
    """One wrong call: what differs from a right one, and what the message must name (a regular
    expression; by default the argument).

    The error is the stock layers' own. It is given where they raise none: from sizes that overflow
    they compute nonsense, and a meta tensor among others makes a meta tensor of the result.
    """
    label = ",".join(f"{name}={describe(value)}" for name, value in changed.items())
    return pytest.param(changed, names or next(iter(changed)), error, id=label)


def describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = f"{value.dtype}-{value.device}-{value.layout}".replace("torch.", "")
    return f"{list(value.shape)}-{kind.removesuffix('-cpu-strided')}"


def each(argument: str, *values: Any) -> list:
    return [wrong({argument: value}) for value in values]


CASES = [
    # Ranks and sizes of the tensors.
    *each("input", ones(8), ones(8, 9), ones(1, 2, 4, 8, 9), ones(())),
    *each("input", ones(2, 5, 8, 9), ones(5, 8, 9)),
    *each("input", ones(2, 0, 8, 9), ones(2, 4, 0, 9), ones(2, 4, 8, 0)),
    *each("weight", ones(6, 4, 3), ones(6, 4, 3, 3, 3), ones(6, 4, 0, 3), ones(6, 4, 3, 0)),
    *each("bias", ones(6, 1), ones(()), ones(5), ones(7)),
    wrong({"weight": ones(0, 4, 3, 3), "bias": None}),
    # Groups.
    wrong({"groups": 4, "weight": ones(6, 1, 3, 3)}),
    wrong({"groups": 3, "weight": ones(6, 1, 3, 3)}, "input"),
    wrong({"groups": 2, "weight": ones(6, 1, 3, 3)}, "input"),
    wrong({"groups": 2}, "input"),
    *each("groups", 0, -1, 1.5, "2", (1, 1), None),
    # The convolution's arguments.
    wrong({"weight": ones(6, 4, 9, 3)}),
    wrong({"dilation": (1, 5)}, "weight|dilation"),
    *each("stride", 0, -1, (1, 0), (0, 1), 1.5, "1", (1, 1, 1), [], None, np.array([1, 1])),
    *each("dilation", 0, -1, (0, 1), 1.5, (1, 2, 3), None),
    *each("padding", -1, (0, -2), "full", "SAME", 0.5, (1, 1, 1), None),
    wrong({"padding": "same", "stride": 2}),
    wrong({"padding": "same", "stride": (1, 2)}),
    # The pool's.
    *each("pool_kernel_size", 0, -1, (0, 2), 1.5, "2", (1, 2, 3), None, [], 7),
    wrong({"pool_dilation": 7}, "pool_kernel_size|pool_dilation"),
    *each("pool_stride", 0, -1, (1, 0), 1.5, "1", (1, 1, 1)),
    *each("pool_padding", -1, 2, (0, 2), 0.5, None, (1, 1, 1)),
    wrong({"pool_padding": 2, "pool_dilation": 3}),
    *each("pool_dilation", 0, -1, 1.5, (1, 0), None),
    *each("ceil_mode", "yes", None, 1.0, (True,)),
    # Types of the tensors.
    wrong({"weight": ones(6, 4, 3, 3).double()}),
    wrong({"bias": ones(6).double()}),
    wrong({"input": ones(2, 4, 8, 9).half()}, "input|weight"),
    # The stock convolution has an integer one; its ReLU refuses only bool and complex.
    *(
        wrong({k: t.to(dtype) for k, t in call({}).items()}, "input", RuntimeError)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    ),
    *each("input", [[1.0]], None),
    *each("weight", None, 3.0),
    *each("bias", 1.0, True),
    # Devices and layouts.
    wrong({"weight": ones(6, 4, 3, 3, device="meta")}, error=RuntimeError),
    wrong({"bias": ones(6, device="meta")}, error=RuntimeError),
    wrong({"input": ones(2, 4, 8, 9, device="meta")}, "input|weight", RuntimeError),
    wrong({"input": ones(2, 4, 8, 9).to_sparse()}, "[Ii]nput"),
    wrong({"bias": ones(6).to_sparse()}),
    # Sizes whose product, or which themselves, overflow 64 bits.
    *(
        wrong({argument: value}, names, error)
        for value in (2**62, 2**63 - 1)
        for argument, names, error in (
            ("padding", "padding", None),
            ("dilation", "dilat", RuntimeError),
            ("pool_kernel_size", "pool_kernel_size", None),
            ("pool_padding", "pool_padding", None),
            ("pool_dilation", "pool_dilation|pool_kernel_size", None),
        )
    ),
    *(
        wrong({argument: 2**63})
        for argument in (
            "stride", "padding", "dilation", "groups",
            "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation",
        )
    ),
    wrong({"padding": (2**40, 2**40), "pool_kernel_size": 1}, "output|padding"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "names", "error"), CASES)
def test_error(changed, names, error):
    arguments = call(changed)
    if error is None:
        with pytest.raises(ERRORS) as raised:
            stock(**arguments)
        error = raised.type
    with pytest.raises(error) as raised:
        conv_relu_max_pool2d(**arguments)
    assert re.search(names, str(raised.value)), str(raised.value)
    with pytest.raises(type(raised.value), match=f"^{re.escape(str(raised.value))}$"):
        fusedcnn.explain(**arguments)
    # On the path of the autograd Function too.
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.detach().requires_grad_()
    with pytest.raises(ERRORS) as raised:
        conv_relu_max_pool2d(**arguments)
    assert re.search(names, str(raised.value)), str(raised.value)
    # The process goes on as before.
    assert_equal(conv_relu_max_pool2d(**call({})), stock(**call({})))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"stride": 2}, {"stride": 2.0}),
        ({"padding": 1}, {"padding": 1.0}),
        ({"groups": 2, "weight": ones(6, 2, 3, 3)}, {"groups": 2.0}),
        ({"pool_kernel_size": 3}, {"pool_kernel_size": 3.0}),
        ({"dilation": (2, 2)}, {"dilation": (2.0, 2)}),
        ({"ceil_mode": True}, {"ceil_mode": 1}),
    ],
    ids=lambda arguments: str(next(iter(arguments.items()))),
)
def test_a_float_is_no_int_even_after_its_int(right, wrong):
    """2.0 == 2, and hashes alike: what was accepted before must not decide."""
    conv_relu_max_pool2d(**call(right))
    with pytest.raises(TypeError, match=next(iter(wrong))):
        conv_relu_max_pool2d(**call({**right, **wrong}))


def test_integers_of_numpy_are_ints():
    """Sizes read from an array's shape or computed by NumPy; torch takes them too."""
    two = np.int64(2)
    sizes = {"stride": two, "padding": (two, two), "groups": two, "pool_kernel_size": two}
    pool = {"pool_stride": np.int32(1), "pool_dilation": [np.int64(1), 1]}
    arguments = call({"weight": ones(6, 2, 3, 3), **sizes, **pool})
    assert_equal(conv_relu_max_pool2d(**arguments), stock(**arguments))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": ones(2, 5, 8, 9)}, r"^input: expected 4 channels, .* got 5"),
        ({"stride": 0}, r"stride.*0"),
        ({"weight": ones(6, 4, 3, 3).double()}, r"weight.*float32.*float64"),
        *(
            (
                {k: torch.empty_like(call({})[k], dtype=dtype) for k in ("input", "weight")},
                f"^input: .* got {str(dtype).removeprefix('torch.')}$",
            )
            for dtype in (
                torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_message_says_what_was_expected_and_what_came(changed, message):
    with pytest.raises(RuntimeError, match=message):
        conv_relu_max_pool2d(**call({"bias": None, **changed}))


def test_unknown_arguments():
    with pytest.raises(TypeError, match="kernel_size"):
        conv_relu_max_pool2d(**call({"kernel_size": 3}))
    with pytest.raises(TypeError):
        conv_relu_max_pool2d(ones(1, 1, 4, 4))
    with pytest.raises(TypeError, match="positional"):
        conv_relu_max_pool2d(*call({}).values(), 1, 0, 1, 1, 2)


# ---- the registered operators -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("grad_output", ones(2, 6, 3, 4)),
        ("grad_output", ones(6, 3, 3)),
        ("grad_output", ones(2, 6, 3, 3).double()),
        ("grad_output", ones(2, 6, 3, 3, dtype=torch.int64)),
        ("weight", ones(6, 4, 3, 3).bfloat16()),
        ("grad_output", None),
        ("input", None),
        ("weight", None),
        ("code", None),
        ("code", torch.zeros(2, 6, 3, 3, dtype=torch.int32)),
        ("code", torch.zeros(2, 6, 3, 3)),
        ("code", torch.zeros(0, dtype=torch.uint8)),
        ("code", torch.zeros(2, 6, 9, dtype=torch.uint8)),
        ("input", ones(2, 4, 2, 9)),
        ("geometry", [1, 1]),
        ("geometry", [0] * 18),
        ("geometry", [2**62] * 18),
        ("output_mask", 8),
        ("output_mask", -1),
    ],
    ids=describe,
)
def test_the_backward_operator_checks_its_arguments(argument, value):
    """It is public as torch.ops.fusedcnn.*: what does not fit is refused, not read beyond."""
    input, weight, bias = call({}).values()
    output, code = torch.ops.fusedcnn.conv_relu_max_pool2d(input, weight, bias, GEOMETRY, True)
    arguments = {"grad_output": ones(output.shape), "input": input, "weight": weight, "code": code}
    arguments |= {"geometry": GEOMETRY, "output_mask": 7}
    backward = torch.ops.fusedcnn.conv_relu_max_pool2d_backward
    backward(*arguments.values())
    message = r"\w+: expected|overflows"
    if value is None:  # which passes for a Tensor in a schema
        message = f"^{argument}: expected a Tensor, got None"
    with pytest.raises(RuntimeError, match=message):
        backward(*{**arguments, argument: value}.values())


@pytest.mark.parametrize("argument", ["input", "weight"])
def test_the_forward_operator_names_a_tensor_that_is_none(argument):
    """For a schema None passes for a Tensor; torch's own error names a source file instead."""
    tensors = call({argument: None}).values()
    message = f"^{argument}: expected a Tensor, got None"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedcnn.conv_relu_max_pool2d(*tensors, GEOMETRY, True)
    with pytest.raises(RuntimeError, match=message):
        fusedcnn.ConvReLUMaxPool2dFunction.apply(*leaves_of(tensors), GEOMETRY)


# ---- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"in_channels": 3, "groups": 2},
        {"out_channels": 3, "groups": 2},
        {"groups": 0},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "ones"},
        {"kernel_size": None},
    ],
    ids=str,
)
def test_module_arguments(changed):
    """What nn.Conv2d refuses, with its class; None leaves an argument out."""
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **changed}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises((ValueError, TypeError)) as raised:
        nn.Conv2d(**arguments)
    with pytest.raises(raised.type):
        ConvReLUMaxPool2d(**arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        ones(2, 4, 8, 8),
        ones(8, 8),
        ones(1, 3, 2, 2),
        ones(1, 3, 8, 8, dtype=torch.int64),
        ones(1, 3, 8, 8).double(),
        "image",
    ],
    ids=describe,
)
def test_module_input(wrong):
    module, conv = ConvReLUMaxPool2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    with pytest.raises((RuntimeError, TypeError)) as raised:
        conv(wrong)
    with pytest.raises(raised.type, match=r"input|weight"):
        module(wrong)
    assert module(ones(1, 3, 8, 8)).shape == (1, 4, 3, 3)


def test_model_input():
    model = FusedSimpleCNN()
    with pytest.raises(RuntimeError, match=r"^input: expected 3 channels, as .* got 1$"):
        model(ones(2, 1, 32, 32))
    with pytest.raises(RuntimeError):  # of the first linear layer
        model(ones(2, 3, 28, 28))
    assert model(ones(2, 3, 32, 32)).shape == (2, 10)
