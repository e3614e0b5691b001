"""The training forward of FusedSimpleCNN as one autograd node.

A step of a small batch spends most of its time between the operators: in a dozen modules, and in as
many nodes whose code and objects the optimizer's pass over its state has driven from the caches.
One node calls one operator for each layer. Whoever put anything unusual in or around the model gets
the modules themselves.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from fusedcnn._geometry import pack_geometry
from fusedcnn._ops import (
    GRAD_BIAS,
    GRAD_INPUT,
    GRAD_WEIGHT,
    backward_op,
    below_autograd,
    forward_op,
    linear_backward_op,
    linear_op,
    select_grads,
)
from fusedcnn.functional import conv_relu_max_pool2d
from fusedcnn.modules import ConvReLUMaxPool2d

# The model's modules in the order of _modules_of, and what must be as it was made.
_CONTAINERS = (nn.Sequential, nn.Sequential)
_FEATURES = (ConvReLUMaxPool2d, nn.Identity, nn.Identity) * 2
_CLASSIFIER = (nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear)
_KINDS = _CONTAINERS + _FEATURES + _CLASSIFIER
BLOCK = {
    "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros",
    "pool_kernel_size": 2, "pool_stride": 2, "pool_padding": 0, "pool_dilation": 1,
    "ceil_mode": False,
}  # fmt: skip
GEOMETRY = pack_geometry((3, 3), padding=1)
_DTYPES = (torch.float32, torch.float64)

# Attributes by the dozen at every call: these getters cost a third of a loop in Python.
_hooks_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_OWN_CALLS = ("forward", "_compiled_call_impl")  # in a module's dictionary, if it has any
_block_of = operator.attrgetter(*BLOCK)
_BLOCK_VALUES = tuple(BLOCK.values())
_traits_of = operator.attrgetter("is_cpu", "layout", "dtype", "shape")
_forward_of = operator.attrgetter("forward")
_CLASSES = tuple(dict.fromkeys(_KINDS))
_FORWARDS = tuple(map(_forward_of, _CLASSES))  # see classes_are_patched


def training_forward(model: nn.Module, images: Tensor) -> Tensor | None:
    """The logits, as one node; None where the modules have to compute them, or to refuse."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _watched():
        return None
    modules = _modules_of(model)
    if modules is None:
        return None
    _, _, first, _, _, second, _, _, flatten, linear, _, dropout, last = modules
    if (
        _block_of(first) != _BLOCK_VALUES
        or _block_of(second) != _BLOCK_VALUES
        or flatten.start_dim != 1
        or flatten.end_dim != -1
    ):
        return None
    parameters = []
    for module in (first, second, linear, last):
        own = module.__dict__["_parameters"]
        parameters += own.get("weight"), own.get("bias")
    p = dropout.p if dropout.training else 0
    if type(p) not in (int, float) or not 0 <= p < 1 or not _go_together(images, parameters):
        return None
    return SimpleCNNFunction.apply(images, *parameters, p)


def _watched() -> bool:
    """Whether anybody looks at single layers or tensors, or computes with them in another way."""
    return bool(
        _has_any_global_hook()
        or torch._C._get_tracing_state()
        or torch.is_autocast_enabled("cpu")
        or under_a_mode()
        # Checkpointing counts the tensors that are saved, which may be others when it recomputes.
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def under_a_mode() -> bool:
    """Whether a mode sees each call; torch.set_default_device's changes none of ours."""
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(torch._C._len_torch_function_stack())
    )


def classes_are_patched() -> bool:
    """Whether a tool has replaced the forward of one of the layers' classes."""
    return tuple(map(_forward_of, _CLASSES)) != _FORWARDS


def _modules_of(model: nn.Module) -> list[nn.Module] | None:
    """The containers, features and classifier, if nobody has changed what calling them does."""
    own = model.__dict__["_modules"]
    containers = [own.get("features"), own.get("classifier")]
    if tuple(map(type, containers)) != _CONTAINERS:
        return None
    modules = containers.copy()
    for container in containers:
        modules += container.__dict__["_modules"].values()
    if tuple(map(type, modules)) != _KINDS or classes_are_patched():
        return None
    states = list(map(vars, modules))
    if any(map(any, map(_hooks_of, states))):
        return None
    for state in states:
        if not state.keys().isdisjoint(_OWN_CALLS):
            return None
    return modules


def _go_together(images: Tensor, parameters: list[Tensor | None]) -> bool:
    """Whether all are plain tensors of the expected shapes; the modules name what is not.

    How many images, hidden units and classes there are is open.
    """
    if type(images) is not Tensor or images.is_nested:
        return False
    if set(map(type, parameters)) != {nn.Parameter}:
        return False
    # The node keeps what all gradients need. Of frozen layers the modules keep less.
    if not all(weight.requires_grad for weight in parameters[::2]):
        return False
    dtype, count = images.dtype, images.shape[:1]
    hidden, classes = parameters[4].shape[:1], parameters[6].shape[:1]
    shapes = (
        (*count, 3, 32, 32), (16, 3, 3, 3), (16,), (32, 16, 3, 3), (32,),
        (*hidden, 2048), hidden, classes + hidden, classes,
    )  # fmt: skip
    return (
        dtype in _DTYPES
        and count != (0,)
        and list(map(_traits_of, (images, *parameters)))
        == [(True, torch.strided, dtype, shape) for shape in shapes]
    )


class SimpleCNNFunction(torch.autograd.Function):
    """Two fused blocks, Linear, ReLU, Dropout and Linear.

    ``apply(images, *parameters, p)``, the eight parameters in the model's order, p of the dropout.
    Saved for the backward: the operands, each block's output and code, ReLU's output, the dropout's
    mask and its output. The dropout draws what :class:`torch.nn.Dropout` draws. Differentiable any
    number of times.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, *arguments: Any) -> Tensor:
        """Return the logits [N, classes] and save what the backward needs."""
        *parameters, p = arguments
        w1, b1, w2, b2, w3, b3, w4, b4 = parameters
        keep = 1 - p
        with below_autograd():
            first, first_code = forward_op(images, w1, b1, GEOMETRY, True)
            second, second_code = forward_op(first, w2, b2, GEOMETRY, True)
            kept = images.new_empty(len(images), len(b3)).bernoulli_(keep) if p else None
            hidden, dropped = linear_op(second.flatten(1), w3, b3, True, kept, keep)
            logits, _ = linear_op(dropped if p else hidden, w4, b4, False, None, 1)
        ctx.save_for_backward(
            images, *parameters, first, first_code, second, second_code, hidden, kept, dropped
        )
        ctx.keep = keep
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the images and parameters that are needed, None for the rest."""
        if grad_output is None:
            return (None,) * 10
        record = torch.is_grad_enabled()  # create_graph=True: record the backward itself
        if record or forward_ad._current_level >= 0:
            with torch.enable_grad():
                return *_recorded_gradients(ctx, grad_output, record), None
        with below_autograd():
            return *_gradients(ctx, grad_output), None


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    needed = ctx.needs_input_grad
    images, w1, _b1, w2, _b2, w3, _b3, w4, _b4, *tensors = ctx.saved_tensors
    first, first_code, second, second_code, hidden, kept, dropped = tensors
    grads: list[Tensor | None] = [None] * 9

    def layer(backward: Any, weight_at: int, need_input: bool, *arguments: Any) -> Tensor | None:
        mask = need_input * GRAD_INPUT
        mask += needed[weight_at] * GRAD_WEIGHT + needed[weight_at + 1] * GRAD_BIAS
        results = select_grads(backward(*arguments, mask), mask)
        grads[weight_at : weight_at + 2] = results[1:]
        return results[0]

    input = hidden if kept is None else dropped
    grad = layer(linear_backward_op, 7, any(needed[:7]), grad, input, w4, None, None, 1)
    if any(needed[:7]):
        arguments = grad, second.flatten(1), w3, hidden, kept, ctx.keep
        grad = layer(linear_backward_op, 5, any(needed[:5]), *arguments)
    if any(needed[:5]):
        arguments = grad.view(second.shape), first, w2, second_code, GEOMETRY
        grad = layer(backward_op, 3, any(needed[:3]), *arguments)
    if any(needed[:3]):
        grads[0] = layer(backward_op, 1, needed[0], grad, images, w1, first_code, GEOMETRY)
    return grads


def _recorded_gradients(ctx: Any, grad_output: Tensor, record: bool) -> list[Tensor | None]:
    """The gradients as differentiable operations: of the layers one by one, computed again."""
    operands, kept = ctx.saved_tensors[:9], ctx.saved_tensors[14]
    needed = ctx.needs_input_grad[:9]
    # Aliases: images may have been computed from a parameter, and only the direct dependence is
    # wanted here.
    operands = [operand.view_as(operand) for operand in operands]
    images, w1, b1, w2, b2, w3, b3, w4, b4 = operands
    first = conv_relu_max_pool2d(images, w1, b1, padding=1)
    second = conv_relu_max_pool2d(first, w2, b2, padding=1)
    hidden = F.relu(F.linear(second.flatten(1), w3, b3))
    logits = F.linear(hidden if kept is None else hidden * (kept / ctx.keep), w4, b4)
    wanted = [operand for operand, need in zip(operands, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(logits, wanted, grad_output, create_graph=record))
    return [next(grads) if need else None for need in needed]
