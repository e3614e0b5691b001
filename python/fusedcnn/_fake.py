"""What the operators answer to tensors that their kernels do not know: fake and quantized ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedcnn import _stock
from fusedcnn._geometry import Geometry, code_dtype, sums_dtype
from fusedcnn._ops import GRAD_BATCH_NORM, GRAD_BIAS, GRAD_INPUT, GRAD_WEIGHT


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d")
def _(input, weight, bias, geometry, with_code):
    g = Geometry(*geometry)
    output = _stock.layers(input, weight, bias, g)
    dtype = code_dtype(g)
    code = torch.empty_like(output, dtype=dtype) if with_code else output.new_empty(0, dtype=dtype)
    return output, code


@torch.library.register_fake("fusedcnn::conv_batch_norm_relu_max_pool2d")
def _(input, weight, bias, bn_weight, bn_bias, geometry, eps, with_code):
    g = Geometry(*geometry)
    output = _stock.layers(input, weight, bias, g)
    dtype = code_dtype(g)
    if with_code:
        kept = torch.empty_like(output, dtype=dtype), torch.empty_like(output)
    else:
        kept = output.new_empty(0, dtype=dtype), output.new_empty(0)
    channels = weight.shape[0], sums_dtype(input.dtype)
    return output, *kept, *(input.new_empty(channels[0], dtype=channels[1]) for _ in range(2))


_library = torch.library.Library("fusedcnn", "IMPL")  # its registrations live as long as it does


def _refuse_quantized(input, *_):
    raise RuntimeError(
        "input: expected float32, float64, bfloat16 or float16, got a quantized tensor; call "
        "fusedcnn.unfuse before quantization, which has no such layer"
    )


for key in ("QuantizedCPU", "QuantizedCUDA"):
    _library.impl("conv_relu_max_pool2d", _refuse_quantized, key)
    _library.impl("conv_batch_norm_relu_max_pool2d", _refuse_quantized, key)


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d_backward")
def _(grad_output, input, weight, code, geometry, output_mask):
    return (
        _image_like(input) if output_mask & GRAD_INPUT else input.new_empty(0),
        _image_like(weight) if output_mask & GRAD_WEIGHT else input.new_empty(0),
        input.new_empty(weight.shape[0] if output_mask & GRAD_BIAS else 0),
    )


@torch.library.register_fake("fusedcnn::conv_batch_norm_relu_max_pool2d_backward")
def _(grad_output, input, weight, bn_weight, code, extremum, mean, var, geometry, eps, output_mask):
    channels = weight.shape[0] if output_mask & GRAD_BATCH_NORM else 0
    dtype = sums_dtype(input.dtype) if bn_weight is None else bn_weight.dtype
    return (
        _image_like(input) if output_mask & GRAD_INPUT else input.new_empty(0),
        _image_like(weight) if output_mask & GRAD_WEIGHT else input.new_empty(0),
        input.new_empty(channels, dtype=dtype),
        input.new_empty(channels, dtype=dtype),
    )


@torch.library.register_fake("fusedcnn::linear")
def _(input, weight, bias, relu, kept, keep):
    output = input.new_empty(input.shape[0], weight.shape[0])
    return output, output.new_empty(0) if kept is None else torch.empty_like(output)


@torch.library.register_fake("fusedcnn::linear_backward")
def _(grad, input, weight, output, kept, keep, output_mask):
    return (
        input.new_empty(input.shape if output_mask & GRAD_INPUT else 0),
        input.new_empty(weight.shape if output_mask & GRAD_WEIGHT else 0),
        input.new_empty(weight.shape[0] if output_mask & GRAD_BIAS else 0),
    )


def _image_like(tensor: Tensor) -> Tensor:
    channels_last = tensor.dim() == 4 and torch._prims_common.suggest_memory_format(tensor) == (
        torch.channels_last
    )
    return torch.empty_like(
        tensor, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
