"""What bad input gets: the stock layers' error class and a message that names the argument."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import fusedcnn
import numpy as np
import pytest
import torch
from fusedcnn import ConvReLUMaxPool2d, FusedSimpleCNN, conv_relu_max_pool2d
from geometries import stock
from torch import Tensor, nn


class Case(NamedTuple):
    """One wrong call: what differs from a right one, and what the message must name."""

    name: str
    changed: dict[str, Any]
    names: str  # a regular expression
    # None: the stock layers' own. Given where they raise nothing: from sizes that overflow they
    # compute nonsense, and a meta tensor among others makes a meta tensor of the result.
    error: type[Exception] | None = None


def call(changed: dict[str, Any]) -> dict[str, Any]:
    """A right call's arguments with some of them changed."""
    right = {"input": torch.ones(2, 4, 8, 9), "weight": torch.ones(6, 4, 3, 3)}
    return {**right, "bias": torch.ones(6), **changed}


def pairs_of(argument: str, values) -> list[Case]:
    return [Case(f"{argument}={value!r}", {argument: value}, argument) for value in values]


CASES = [
    # Ranks and sizes of the tensors.
    Case("input_1d", {"input": torch.ones(8)}, "input"),
    Case("input_2d", {"input": torch.ones(8, 9)}, "input"),
    Case("input_5d", {"input": torch.ones(1, 2, 4, 8, 9)}, "input"),
    Case("input_0d", {"input": torch.ones(())}, "input"),
    Case("weight_3d", {"weight": torch.ones(6, 4, 3)}, "weight"),
    Case("weight_5d", {"weight": torch.ones(6, 4, 3, 3, 3)}, "weight"),
    Case("bias_2d", {"bias": torch.ones(6, 1)}, "bias"),
    Case("bias_0d", {"bias": torch.ones(())}, "bias"),
    Case("bias_too_short", {"bias": torch.ones(5)}, "bias"),
    Case("bias_too_long", {"bias": torch.ones(7)}, "bias"),
    Case("input_channels", {"input": torch.ones(2, 5, 8, 9)}, "input"),
    Case("input_channels_unbatched", {"input": torch.ones(5, 8, 9)}, "input"),
    Case("no_channels", {"input": torch.ones(2, 0, 8, 9)}, "input"),
    Case("no_height", {"input": torch.ones(2, 4, 0, 9)}, "input"),
    Case("no_width", {"input": torch.ones(2, 4, 8, 0)}, "input"),
    Case("no_out_channels", {"weight": torch.ones(0, 4, 3, 3), "bias": None}, "weight"),
    Case("no_kernel_height", {"weight": torch.ones(6, 4, 0, 3)}, "weight"),
    Case("no_kernel_width", {"weight": torch.ones(6, 4, 3, 0)}, "weight"),
    # Groups.
    Case("groups_not_in_out_channels", {"groups": 4, "weight": torch.ones(6, 1, 3, 3)}, "groups"),
    Case("groups_not_in_in_channels", {"groups": 3, "weight": torch.ones(6, 1, 3, 3)}, "input"),
    Case("groups_and_weight", {"groups": 2}, "input"),
    Case("channels_of_groups", {"groups": 2, "weight": torch.ones(6, 1, 3, 3)}, "input"),
    *pairs_of("groups", [0, -1, 1.5, "2", (1, 1), None]),
    # The convolution's arguments.
    Case("kernel_beyond_input", {"weight": torch.ones(6, 4, 9, 3)}, "weight"),
    Case("dilated_kernel_beyond_input", {"dilation": (1, 5)}, "weight|dilation"),
    *pairs_of("stride", [0, -1, (1, 0), (0, 1), 1.5, "1", (1, 1, 1), [], None]),
    Case("stride=array", {"stride": np.array([1, 1])}, "stride"),
    *pairs_of("dilation", [0, -1, (0, 1), 1.5, (1, 2, 3), None]),
    *pairs_of("padding", [-1, (0, -2), "full", "SAME", 0.5, (1, 1, 1), None]),
    Case("same_with_stride", {"padding": "same", "stride": 2}, "padding"),
    Case("same_with_one_stride", {"padding": "same", "stride": (1, 2)}, "padding"),
    # The pool's.
    *pairs_of("pool_kernel_size", [0, -1, (0, 2), 1.5, "2", (1, 2, 3), None, []]),
    Case("pool_beyond_plane", {"pool_kernel_size": 7}, "pool_kernel_size"),
    Case("pool_dilation_beyond_plane", {"pool_dilation": 7}, "pool_kernel_size|pool_dilation"),
    *pairs_of("pool_stride", [0, -1, (1, 0), 1.5, "1", (1, 1, 1)]),
    *pairs_of("pool_padding", [-1, 2, (0, 2), 0.5, None, (1, 1, 1)]),
    Case("pool_padding_of_dilated", {"pool_padding": 2, "pool_dilation": 3}, "pool_padding"),
    *pairs_of("pool_dilation", [0, -1, 1.5, (1, 0), None]),
    *pairs_of("ceil_mode", ["yes", None, 1.0, (True,)]),
    # Types of the tensors.
    Case("weight_dtype", {"weight": torch.ones(6, 4, 3, 3).double()}, "weight"),
    Case("bias_dtype", {"bias": torch.ones(6).double()}, "bias"),
    Case("half_input", {"input": torch.ones(2, 4, 8, 9).half()}, "input|weight"),
    *(
        Case(
            f"all_{dtype}".replace("torch.", ""),
            {
                "input": torch.ones(2, 4, 8, 9, dtype=dtype),
                "weight": torch.ones(6, 4, 3, 3, dtype=dtype),
                "bias": torch.ones(6, dtype=dtype),
            },
            "input",
            # The stock convolution has an integer one; its ReLU refuses only bool and complex.
            RuntimeError,
        )
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
    ),
    Case("input_list", {"input": [[1.0]]}, "input"),
    Case("input_none", {"input": None}, "input"),
    Case("weight_none", {"weight": None}, "weight"),
    Case("weight_number", {"weight": 3.0}, "weight"),
    Case("bias_number", {"bias": 1.0}, "bias"),
    Case("bias_true", {"bias": True}, "bias"),
    # Devices.
    Case("meta_weight", {"weight": torch.ones(6, 4, 3, 3, device="meta")}, "weight", RuntimeError),
    Case("meta_bias", {"bias": torch.ones(6, device="meta")}, "bias", RuntimeError),
    Case(
        "meta_input", {"input": torch.ones(2, 4, 8, 9, device="meta")}, "input|weight", RuntimeError
    ),
    Case("sparse_input", {"input": torch.ones(2, 4, 8, 9).to_sparse()}, "[Ii]nput"),
    Case("sparse_bias", {"bias": torch.ones(6).to_sparse()}, "bias"),
    # Sizes whose product, or which themselves, overflow 64 bits.
    *(
        Case(f"{argument}={name}", {argument: value}, names, error)
        for name, value in (("2**62", 2**62), ("2**63-1", 2**63 - 1))
        for argument, names, error in (
            ("padding", "padding", None),
            ("dilation", "dilat", RuntimeError),
            ("pool_kernel_size", "pool_kernel_size", None),
            ("pool_padding", "pool_padding", None),
            ("pool_dilation", "pool_dilation|pool_kernel_size", None),
        )
    ),
    *(
        Case(f"{argument}=2**63", {argument: 2**63}, argument)
        for argument in (
            "stride",
            "padding",
            "dilation",
            "groups",
            "pool_kernel_size",
            "pool_stride",
            "pool_padding",
            "pool_dilation",
        )
    ),
    Case("huge_padding_both", {"padding": (2**40, 2**40), "pool_kernel_size": 1}, "output|padding"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error(case):
    arguments = call(case.changed)
    error = case.error
    if error is None:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
            stock(**arguments)
        error = raised.type
    with pytest.raises(error) as raised:
        conv_relu_max_pool2d(**arguments)
    assert re.search(case.names, str(raised.value)), str(raised.value)
    # The process goes on as before.
    right = call({})
    assert torch.equal(conv_relu_max_pool2d(**right), stock(**right))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_with_gradients_wanted(case):
    """On the path of the autograd Function too."""
    arguments = call(case.changed)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.detach().requires_grad_()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        conv_relu_max_pool2d(**arguments)
    assert re.search(case.names, str(raised.value)), str(raised.value)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"stride": 2}, {"stride": 2.0}),
        ({"padding": 1}, {"padding": 1.0}),
        ({"groups": 2, "weight": torch.ones(6, 2, 3, 3)}, {"groups": 2.0}),
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
    arguments = call(
        {
            "weight": torch.ones(6, 2, 3, 3),
            "stride": two,
            "padding": (two, two),
            "groups": two,
            "pool_kernel_size": two,
            "pool_stride": np.int32(1),
            "pool_dilation": [np.int64(1), 1],
        }
    )
    assert torch.equal(conv_relu_max_pool2d(**arguments), stock(**arguments))


def test_a_message_says_what_was_expected_and_what_came():
    with pytest.raises(RuntimeError, match=r"^input: expected 4 channels, .* got 5"):
        conv_relu_max_pool2d(**call({"input": torch.ones(2, 5, 8, 9)}))
    with pytest.raises(RuntimeError, match=r"stride.*0"):
        conv_relu_max_pool2d(**call({"stride": 0}))
    with pytest.raises(RuntimeError, match=r"weight.*float32.*float64"):
        conv_relu_max_pool2d(**call({"weight": torch.ones(6, 4, 3, 3).double()}))


def test_unknown_arguments():
    with pytest.raises(TypeError, match="kernel_size"):
        conv_relu_max_pool2d(**call({"kernel_size": 3}))
    with pytest.raises(TypeError):
        conv_relu_max_pool2d(torch.ones(1, 1, 4, 4))
    with pytest.raises(TypeError, match="positional"):
        conv_relu_max_pool2d(*call({}).values(), 1, 0, 1, 1, 2)


# ---- the registered operators -------------------------------------------------------------------


def backward_call(**changed) -> tuple:
    right = call({})
    geometry = [1, 1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 0]
    output, code = torch.ops.fusedcnn.conv_relu_max_pool2d(*right.values(), geometry, True)
    arguments = {
        "grad_output": torch.ones_like(output),
        "input": right["input"],
        "weight": right["weight"],
        "code": code,
        "geometry": geometry,
        "output_mask": 7,
    }
    return tuple({**arguments, **changed}.values())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("grad_output", torch.ones(2, 6, 3, 4)),
        ("grad_output", torch.ones(6, 3, 3)),
        ("grad_output", torch.ones(2, 6, 3, 3).double()),
        ("grad_output", torch.ones(2, 6, 3, 3, dtype=torch.int64)),
        ("weight", torch.ones(6, 4, 3, 3).bfloat16()),
        ("grad_output", None),
        ("input", None),
        ("weight", None),
        ("code", None),
        ("code", torch.zeros(2, 6, 3, 3, dtype=torch.int32)),
        ("code", torch.zeros(2, 6, 3, 3)),
        ("code", torch.zeros(0, dtype=torch.uint8)),
        ("code", torch.zeros(2, 6, 9, dtype=torch.uint8)),
        ("input", torch.ones(2, 4, 2, 9)),
        ("geometry", [1, 1]),
        ("geometry", [0] * 18),
        ("geometry", [2**62] * 18),
        ("output_mask", 8),
        ("output_mask", -1),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_the_backward_operator_checks_its_arguments(argument, value):
    """It is public as torch.ops.fusedcnn.*: what does not fit is refused, not read beyond."""
    torch.ops.fusedcnn.conv_relu_max_pool2d_backward(*backward_call())
    message = r"\w+: expected|overflows"
    if value is None:  # which passes for a Tensor in a schema
        message = f"^{argument}: expected a Tensor, got None"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedcnn.conv_relu_max_pool2d_backward(*backward_call(**{argument: value}))


@pytest.mark.parametrize("argument", ["input", "weight"])
def test_the_forward_operator_names_a_tensor_that_is_none(argument):
    """For a schema None passes for a Tensor; torch's own error names a source file instead."""
    arguments = {**call({}), argument: None}
    tensors = (arguments["input"], arguments["weight"], arguments["bias"])
    geometry = (1, 1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 0)
    with pytest.raises(RuntimeError, match=f"^{argument}: expected a Tensor, got None"):
        torch.ops.fusedcnn.conv_relu_max_pool2d(*tensors, geometry, True)
    leaves = (t if t is None else t.requires_grad_() for t in tensors)
    with pytest.raises(RuntimeError, match=f"^{argument}: expected a Tensor, got None"):
        fusedcnn.ConvReLUMaxPool2dFunction.apply(*leaves, geometry)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_a_message_names_the_dtype_that_came(dtype):
    images, weight = (torch.empty(s, dtype=dtype) for s in ((2, 4, 8, 9), (6, 4, 3, 3)))
    with pytest.raises(RuntimeError, match=f"^input: .* got {str(dtype).removeprefix('torch.')}$"):
        conv_relu_max_pool2d(images, weight)


# ---- modules ------------------------------------------------------------------------------------

MODULE_CASES = [
    {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2},
    {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "groups": 2},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 0},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "full"},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding_mode": "ones"},
    {"in_channels": 4, "out_channels": 4},
]


@pytest.mark.parametrize("arguments", MODULE_CASES, ids=lambda a: str(list(a.items())[2:]))
def test_module_arguments(arguments):
    """What nn.Conv2d refuses, with its class."""
    with pytest.raises((ValueError, TypeError)) as raised:
        nn.Conv2d(**arguments)
    with pytest.raises(raised.type):
        ConvReLUMaxPool2d(**arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2, 4, 8, 8),
        torch.ones(8, 8),
        torch.ones(1, 3, 2, 2),
        torch.ones(1, 3, 8, 8, dtype=torch.int64),
        torch.ones(1, 3, 8, 8).double(),
        "image",
    ],
    ids=lambda wrong: f"{getattr(wrong, 'dtype', 'str')}{list(getattr(wrong, 'shape', ()))}",
)
def test_module_input(wrong):
    module, conv = ConvReLUMaxPool2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    with pytest.raises((RuntimeError, TypeError)) as raised:
        conv(wrong)
    with pytest.raises(raised.type, match=r"input|weight"):
        module(wrong)
    assert module(torch.ones(1, 3, 8, 8)).shape == (1, 4, 3, 3)


def test_model_input():
    model = FusedSimpleCNN()
    with pytest.raises(RuntimeError, match=r"^input: expected 3 channels, as .* got 1$"):
        model(torch.ones(2, 1, 32, 32))
    with pytest.raises(RuntimeError):  # of the first linear layer
        model(torch.ones(2, 3, 28, 28))
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 10)
