"""FusedSimpleCNN's inference in one operator call, wherever nobody can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedcnn import _C
from fusedcnn._chain import chain_op
from fusedcnn._ops import below_autograd
from fusedcnn._simple_cnn import BLOCK, GEOMETRY, classes_are_patched, under_a_mode
from fusedcnn.functional import _is_dtensor
from fusedcnn.modules import ConvReLUMaxPool2d

# The two Sequentials, then what is in them: type, attributes that matter, whether it has a weight
# and a bias.
_NAMES = ("features", "classifier")
_LAYERS: tuple[tuple[type[nn.Module], dict[str, Any], bool], ...] = (
    (nn.Sequential, {}, False),
    (nn.Sequential, {}, False),
    *((ConvReLUMaxPool2d, BLOCK, True), (nn.Identity, {}, False), (nn.Identity, {}, False)) * 2,
    (nn.Flatten, {"start_dim": 1, "end_dim": -1}, False),
    (nn.Linear, {}, True),
    (nn.ReLU, {}, False),
    (nn.Dropout, {"training": False}, False),
    (nn.Linear, {}, True),
)


def parameters_as_built(model: nn.Module) -> list[Tensor] | None:
    """Weights and biases in turn; None unless the layers are those that the model was built with.

    A hook, a layer that is another or computes something else, a parameter that is computed: each
    makes a difference that one call for all layers would hide.

    ``_C.parameters_as_built`` is the same, for eager calls; this is what torch.compile can follow,
    and says nothing of the parameters' types, which are others in a graph.
    """
    modules = model._modules
    if len(modules) != len(_NAMES) or not all(name in modules for name in _NAMES):
        return None
    if any(name in model.__dict__ for name in _NAMES):
        return None
    layers = [modules[name] for name in _NAMES]
    for sequential in layers[:]:
        if type(sequential) is not nn.Sequential:
            return None
        layers += sequential._modules.values()
    if len(layers) != len(_LAYERS):
        return None
    parameters = []
    for layer, (kind, attributes, has_parameters) in zip(layers, _LAYERS, strict=True):
        if type(layer) is not kind or any(
            name in layer.__dict__ for name in ("forward", "weight", "bias")
        ):
            return None
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if [layer.__dict__[name] for name in attributes] != list(attributes.values()):
            return None
        if bool(layer._parameters) != has_parameters:
            return None
        if has_parameters:
            parameters += [layer._parameters.get(name) for name in ("weight", "bias")]
    return None if any(p is None for p in parameters) else parameters


def in_one_call(model: nn.Module, input: Tensor) -> Tensor | None:
    """The model's output, or None where its layers are to compute it one by one.

    Args:
        model: a :class:`fusedcnn.FusedSimpleCNN` in evaluation mode.
        input: whatever it was called with.
    """
    if torch.compiler.is_compiling():
        return _in_one_node(model, input)
    if (
        type(input) is not Tensor
        or not input.is_cpu
        or input.dtype != torch.float32
        or _under_a_transform()
        or under_a_mode()
        or classes_are_patched()
        or torch._C._get_tracing_state() is not None
        or (parameters := _C.parameters_as_built(model, _NAMES, _LAYERS, nn.Parameter)) is None
    ):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, *parameters)):
        return None
    try:
        with below_autograd():
            return chain_op(input, parameters, GEOMETRY)
    except RuntimeError:  # the layers compute it or say in their own words what is wrong
        return None


def _in_one_node(model: nn.Module, input: Tensor) -> Tensor | None:
    """The same for a graph: of torch.compile without gradients, of torch.export in any case."""
    if (
        (torch.is_grad_enabled() and not torch.compiler.is_exporting())
        or torch.onnx.is_in_onnx_export()
        or not isinstance(input, Tensor)
        or not input.is_cpu
        or input.dtype != torch.float32
        or input.layout != torch.strided
        or input.dim() != 4
        or _under_a_transform()
        or (parameters := parameters_as_built(model)) is None
        or any(map(_is_wrapper, (input, *parameters)))
        or not all(p.is_cpu and p.dtype == torch.float32 for p in parameters)
    ):
        return None
    return chain_op(input, parameters, GEOMETRY)


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether it is a tensor of another kind, which may have its own idea of a layer."""
    if torch.compiler.is_dynamo_compiling():
        return type(tensor) not in (Tensor, nn.Parameter)
    return _is_dtensor(tensor) or is_traceable_wrapper_subclass(tensor)


def _under_a_transform() -> bool:
    """Whether something follows the call that has to see each layer."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or bool(_module._global_forward_hooks)
        or bool(_module._global_forward_pre_hooks)
    )
