"""FusedSimpleCNN's inference in one operator call, wherever nobody can tell the difference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from fusedcnn._chain import chain_op
from fusedcnn._geometry import pack_geometry
from fusedcnn._ops import below_autograd
from fusedcnn.functional import _is_dtensor
from fusedcnn.modules import POOL_ARGUMENTS, ConvReLUMaxPool2d

_FEATURES = (ConvReLUMaxPool2d, nn.Identity, nn.Identity) * 2
_CLASSIFIER = (nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear)
_KINDS = (nn.Sequential, nn.Sequential, *_FEATURES, *_CLASSIFIER)
# Of _KINDS: those with parameters.
_BLOCKS, _FLATTEN, _DROPOUT, _LINEARS = (2, 5), 8, 11, (9, 12)

_BLOCK_ARGUMENTS = ("padding_mode", "stride", "padding", "dilation", "groups", *POOL_ARGUMENTS)
_BLOCK_VALUES = ["zeros", (1, 1), (1, 1), (1, 1), 1, 2, 2, 0, 1, False]
_GEOMETRY = pack_geometry((3, 3), *_BLOCK_VALUES[1:])
_PARAMETERS = [nn.Parameter] * 8


def _parameters(model: nn.Module) -> list[Tensor] | None:
    """Weights and biases in turn; None unless the layers are those that the model was built with.

    A hook, a layer that is another or computes something else, a parameter that is computed: each
    makes a difference that one call for all layers would hide.
    """
    features, classifier = map(model._modules.get, ("features", "classifier"))
    if type(features) is not nn.Sequential or type(classifier) is not nn.Sequential:
        return None
    layers = (features, classifier, *features._modules.values(), *classifier._modules.values())
    if len(layers) != len(_KINDS) or len(model._modules) != 2:
        return None
    for layer, kind in zip(layers, _KINDS, strict=True):
        of_layer = layer.__dict__  # reading from it is several times quicker
        if type(layer) is not kind or "forward" in of_layer:
            return None
        if of_layer["_forward_hooks"] or of_layer["_forward_pre_hooks"]:
            return None
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    flatten, dropout = layers[_FLATTEN], layers[_DROPOUT]
    if dropout.training or flatten.start_dim != 1 or flatten.end_dim != -1:
        return None
    parameters = []
    for i in _BLOCKS:
        of_layer = layers[i].__dict__
        if [of_layer[name] for name in _BLOCK_ARGUMENTS] != _BLOCK_VALUES:
            return None
    for i in (*_BLOCKS, *_LINEARS):
        of_layer = layers[i]._parameters
        parameters += of_layer.get("weight"), of_layer.get("bias")
    return None if any(p is None for p in parameters) else parameters


def in_one_call(model: nn.Module, input: Tensor) -> Tensor | None:
    """The model's output, or None where its layers are to compute it one by one.

    Args:
        model: a :class:`fusedcnn.FusedSimpleCNN` in evaluation mode.
        input: whatever it was called with.
    """
    compiling = torch.compiler.is_compiling()
    exporting = compiling and torch.compiler.is_exporting()
    if torch.is_grad_enabled() and not exporting:
        return None
    if not isinstance(input, Tensor) or not input.is_cpu or input.dim() != 4:
        return None
    if (
        input.dtype != torch.float32
        or input.layout != torch.strided
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (compiling and torch.onnx.is_in_onnx_export())
    ):
        return None
    parameters = _parameters(model)
    if parameters is None:
        return None
    if compiling:
        if any(map(_is_dtensor, (input, *parameters))):
            return None
    elif (
        type(input) is not Tensor
        or list(map(type, parameters)) != _PARAMETERS
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
    ):
        return None
    if parameters[0].dtype != torch.float32 or False in [p.is_cpu for p in parameters]:
        return None
    if compiling:
        return chain_op(input, parameters, _GEOMETRY)
    try:
        with below_autograd():
            return chain_op(input, parameters, _GEOMETRY)
    except RuntimeError:  # the layers compute it or say in their own words what is wrong
        return None
