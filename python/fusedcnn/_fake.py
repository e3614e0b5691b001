"""What the operators answer to tensors that their kernels do not know: fake and quantized ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedcnn import _stock
from fusedcnn._geometry import Geometry, code_dtype
from fusedcnn._ops import GRAD_BIAS, GRAD_INPUT, GRAD_WEIGHT


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d")
def _(input, weight, bias, geometry, with_code):
    g = Geometry(*geometry)
    output = _stock.layers(input, weight, bias, g)
    dtype = code_dtype(g)
    code = torch.empty_like(output, dtype=dtype) if with_code else output.new_empty(0, dtype=dtype)
    return output, code


_library = torch.library.Library("fusedcnn", "IMPL")  # its registrations live as long as it does


def _refuse_quantized(input, *_):
    raise RuntimeError(
        "input: expected float32, float64, bfloat16 or float16, got a quantized tensor; call "
        "fusedcnn.unfuse before quantization, which has no such layer"
    )


for key in ("QuantizedCPU", "QuantizedCUDA"):
    _library.impl("conv_relu_max_pool2d", _refuse_quantized, key)


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d_backward")
def _(grad_output, input, weight, code, geometry, output_mask):
    return (
        _image_like(input) if output_mask & GRAD_INPUT else input.new_empty(0),
        _image_like(weight) if output_mask & GRAD_WEIGHT else input.new_empty(0),
        input.new_empty(weight.shape[0] if output_mask & GRAD_BIAS else 0),
    )


def _image_like(tensor: Tensor) -> Tensor:
    channels_last = tensor.dim() == 4 and torch._prims_common.suggest_memory_format(tensor) == (
        torch.channels_last
    )
    return torch.empty_like(
        tensor, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
