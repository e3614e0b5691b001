"""Wrong calls of conv_batch_norm_relu_max_pool2d: stock's class of error; nothing changes."""

from __future__ import annotations

from typing import Any

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import autograd, batch_norm, conv_batch_norm_relu_max_pool2d


def tensors() -> dict[str, Any]:
    return {
        "input": torch.randn(2, 3, 6, 6),
        "weight": torch.randn(4, 3, 3, 3),
        "bias": torch.randn(4),
        "running_mean": torch.linspace(-1, 1, 4),
        "running_var": torch.linspace(0.5, 2, 4),
        "bn_weight": torch.ones(4),
        "bn_bias": torch.zeros(4),
    }


def stock(input, weight, bias, running_mean, running_var, bn_weight, bn_bias, **options):
    pool = options.pop("pool_kernel_size", 2)
    norm = {k: options.pop(k) for k in ("training", "momentum", "eps") if k in options}
    plane = F.conv2d(input, weight, bias, **options)
    plane = F.batch_norm(plane, running_mean, running_var, bn_weight, bn_bias, **norm)
    return F.max_pool2d(F.relu(plane), pool)


NORM = ("running_mean", "running_var", "bn_weight", "bn_bias")
# What differs from a right call, and what the message begins with; in both modes.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{name} of 3": ({name: torch.ones(3)}, f"{name}: expected [4], ") for name in NORM},
    **{f"{name} of 1": ({name: torch.ones(1)}, f"{name}: expected [4], ") for name in NORM},
    **{f"a list as {name}": ({name: [1.0] * 4}, f"{name}: expected a Tensor") for name in NORM},
    **{
        f"{name} elsewhere": ({name: torch.ones(4, device="meta")}, f"{name}: expected device cpu")
        for name in NORM
    },
    **{
        f"{name} in float64": ({name: torch.ones(4).double()}, f"{name}: expected dtype")
        for name in NORM[1:]
    },
    **{
        f"{name} that learns": (
            {name: torch.ones(4, requires_grad=True)}, f"{name}: expected a Tensor that requires no"
        )
        for name in NORM[:2]
    },
    "all in float64": (
        {name: torch.ones(4).double() for name in NORM}, "running_mean: expected dtype"
    ),
    "all in bfloat16": (
        {name: torch.ones(4).bfloat16() for name in NORM}, "running_mean: expected dtype"
    ),
    "a mean as a row": ({"running_mean": torch.ones(1, 4)}, "running_mean: expected [4], "),
    "half a weight": ({"weight": torch.ones(4, 3, 3, 3).half()}, "weight: "),
    "half a bias": ({"bias": torch.ones(4).half()}, "bias: "),
    "a bias of 3": ({"bias": torch.ones(3)}, "bias: expected [4], "),
    "channels": ({"weight": torch.ones(4, 2, 3, 3)}, ""),
    "a kernel beyond the input": ({"weight": torch.ones(4, 3, 7, 7)}, ""),
    "an input of rank 2": ({"input": torch.ones(6, 6)}, "input: expected [N, C, H, W]"),
    "an input of rank 3": ({"input": torch.ones(3, 7, 7)}, "input: expected [N, C, H, W]"),
    "text for momentum": ({"momentum": "0.1"}, "momentum: expected a number"),
    "no momentum": ({"momentum": None}, "momentum: expected a number"),
    "a complex momentum": ({"momentum": 1j}, "momentum: expected a number"),
    "text for eps": ({"eps": "1e-5"}, "eps: expected a number"),
    "no eps": ({"eps": None}, "eps: expected a number"),
    "a negative eps": ({"eps": -1e-5}, "eps: expected"),
    "an eps beyond float": ({"eps": 10**400}, ""),
    "a stride of 0": ({"stride": 0}, ""),
    "padding that overflows": ({"padding": 2**62}, ""),
    "a pool beyond the map": ({"pool_kernel_size": 5}, ""),
}  # fmt: skip
TRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "no mean": ({"running_mean": None}, "running_mean: expected both"),
    "no variance": ({"running_var": None}, "running_var: expected both"),
    "eps of 0": ({"eps": 0.0}, "eps: expected a positive number"),
    "one value": (
        {"input": torch.ones(1, 3, 3, 3), "pool_kernel_size": 1},
        "input: Expected more than 1 value per channel when training, got input size "
        "torch.Size([1, 4, 1, 1])"),
}  # fmt: skip
EVALUATION: dict[str, tuple[dict[str, Any], str]] = {
    "no mean": ({"running_mean": None}, "running_mean: expected a Tensor in evaluation mode"),
    "no variance": ({"running_var": None}, "running_var: expected a Tensor in evaluation mode"),
}
CASES = [
    (training, name)
    for training, others in ((True, TRAINING), (False, EVALUATION))
    for name in (*WRONG, *others)
]


@pytest.mark.parametrize(("training", "name"), CASES)
def test_wrong_calls(name, training):
    changes, message = (WRONG | (TRAINING if training else EVALUATION))[name]
    arguments = tensors() | changes | {"training": training}
    before = {k: arguments[k].clone() for k in NORM[:2] if torch.is_tensor(arguments[k])}
    with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)) as ours:
        conv_batch_norm_relu_max_pool2d(**arguments)
    assert str(ours.value).startswith(message)
    for key, value in before.items():
        assert value.is_meta or torch.equal(arguments[key], value)
    with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)) as theirs:
        stock(**arguments)
    # Both are ValueErrors where the message is torch's own.
    assert issubclass(ours.type, theirs.type)


@pytest.mark.parametrize("flag", [1, 0, None, "yes"])
def test_training_is_a_bool(flag):
    with pytest.raises(TypeError, match="training: expected a bool, got"):
        conv_batch_norm_relu_max_pool2d(**tensors(), training=flag)


def release(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def cut(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)


@pytest.mark.parametrize("take_away", [release, cut])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("argument", tensors())
def test_released_storage(argument, training, take_away):
    """The tensor is there and its memory is not, as sharding and offloading leave it."""
    given = tensors()
    take_away(given[argument])
    kept = {name: given[name].clone() for name in NORM[:2] if name != argument}
    with pytest.raises(RuntimeError, match=f"^{argument}: expected"):
        conv_batch_norm_relu_max_pool2d(**given, training=training)
    assert all(torch.equal(given[name], value) for name, value in kept.items())


def test_expanded_statistics_are_refused():
    given = tensors() | {"running_var": torch.ones(1).expand(4)}
    before = given["running_mean"].clone()
    with pytest.raises(RuntimeError, match="running_var: expected elements of their own"):
        conv_batch_norm_relu_max_pool2d(**given, training=True)
    assert torch.equal(given["running_mean"], before)


@pytest.mark.parametrize("grad", [True, False])
def test_an_error_from_the_kernels_leaves_the_statistics(grad, monkeypatch):
    """Out of memory, say."""

    def fail(*arguments):
        raise RuntimeError("not enough memory")

    for module in (autograd, batch_norm):
        monkeypatch.setattr(module, "bn_forward_op", fail)
    given = tensors()
    given["input"].requires_grad_(grad)
    before = [given[name].clone() for name in NORM[:2]]
    with pytest.raises(RuntimeError, match="not enough memory"):
        conv_batch_norm_relu_max_pool2d(**given, training=True)
    assert all(torch.equal(given[n], t) for n, t in zip(NORM[:2], before, strict=True))


def test_an_error_of_the_last_stock_layer_leaves_the_statistics():
    """The pool's, which the stock layers raise after an update."""
    given = tensors()
    before = [given[name].clone() for name in NORM[:2]]
    given["input"] = given["input"].to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        conv_batch_norm_relu_max_pool2d(**given, training=True)
    given["input"] = tensors()["input"]
    with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
        conv_batch_norm_relu_max_pool2d(**given, training=True, pool_padding=2)
    reason = fusedcnn.build_info()["stock_calls"]
    assert reason["forward-mode differentiation"] >= 1
    assert all(torch.equal(given[n], t) for n, t in zip(NORM[:2], before, strict=True))


def test_a_module_counts_no_batch_that_failed():
    block = fusedcnn.ConvBatchNormReLUMaxPool2d(3, 4, 3, pool_kernel_size=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.ones(1, 3, 3, 3))
    assert block.batch_norm.num_batches_tracked == 0
