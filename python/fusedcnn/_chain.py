"""The operator for blocks in a row and fully connected layers behind them: what torch asks of it.

It is inference in one call, on the CPU, in float32. Everything else that may meet it in an exported
program gets the same from the block's own operator: another device, gradients, vmap, decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from fusedcnn import _cuda, _stock
from fusedcnn._geometry import Geometry
from fusedcnn._ops import forward_op
from fusedcnn.functional import why_stock

chain_op = torch.ops.fusedcnn.conv_relu_max_pool2d_chain.default
_NAME = "fusedcnn::conv_relu_max_pool2d_chain"
_FIELDS = len(Geometry._fields)

Block = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def _layers(
    input: Tensor, parameters: Sequence[Tensor], geometries: Sequence[int], block: Block
) -> Tensor:
    """What the operator computes, layer by layer, its blocks by ``block``."""
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    blocks = sum(weight.dim() == 4 for weight, _ in pairs)
    if len(geometries) == _FIELDS:
        geometries = [*geometries] * blocks
    for i, (weight, bias) in enumerate(pairs[:blocks]):
        input = block(input, weight, bias, geometries[i * _FIELDS : (i + 1) * _FIELDS])
    if len(pairs) == blocks:
        return input.contiguous()
    input = input.flatten(1)
    for weight, bias in pairs[blocks:-1]:
        input = F.relu(F.linear(input, weight, bias))
    return F.linear(input, *pairs[-1])


def _stock_block(input: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int]) -> Tensor:
    return _stock.layers(input, weight, bias, Geometry(*geometry))


def _block(input: Tensor, weight: Tensor, bias: Tensor, geometry: Sequence[int]) -> Tensor:
    """By a fused kernel where there is one; differentiable."""
    compiling = torch.compiler.is_compiling()
    if why_stock(input, weight, tuple(geometry), compiling) is not None:
        return _stock_block(input, weight, bias, geometry)
    if not input.is_cpu and not compiling:
        _cuda.follow_torch()
    return forward_op(input, weight, bias, geometry, torch.is_grad_enabled())[0]


def _check_devices(input: Tensor, parameters: Sequence[Tensor]) -> None:
    # As the CPU's operator does. A single tensor elsewhere is enough to be sent here.
    for i, parameter in enumerate(parameters):
        if parameter.device != input.device:
            raise RuntimeError(
                f"parameters[{i}]: expected device {input.device} like input, "
                f"got {parameter.device}"
            )


def decomposed(input: Tensor, parameters: list[Tensor], geometries: list[int]) -> Tensor:
    """The operator in stock operations."""
    return _layers(input, parameters, geometries, _stock_block)


@torch.library.register_fake(_NAME)
def _(input, parameters, geometries):
    _check_devices(input, parameters)
    output = decomposed(input, parameters, geometries)
    return output.new_empty(output.shape)


_library = torch.library.Library("fusedcnn", "IMPL")  # its registrations live as long as it does


def _on_another_device(input, parameters, geometries):
    _check_devices(input, parameters)
    return _layers(input, parameters, geometries, _block)


_library.impl("conv_relu_max_pool2d_chain", _on_another_device, "CompositeExplicitAutograd")


def _setup(ctx, inputs, output):
    input, parameters, geometries = inputs
    ctx.save_for_backward(input, *parameters)
    ctx.geometries = geometries


def _backward(ctx, grad_output):
    # For programs that were exported in evaluation mode and meet gradients all the same: nothing is
    # kept for them, so that everything is computed again.
    create_graph = torch.is_grad_enabled()
    need_input, need_parameters, _ = ctx.needs_input_grad
    needs = [need_input, *need_parameters]
    with torch.enable_grad():
        # Aliases where the graph goes on: one operand may have been computed from another.
        operands = [
            t.view_as(t) if create_graph else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        output = _layers(operands[0], operands[1:], ctx.geometries, _block)
        wanted = [t for t, need in zip(operands, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=create_graph))
    grad_input, *grad_parameters = (next(grads) if need else None for need in needs)
    return grad_input, grad_parameters, None


torch.library.register_autograd(_NAME, _backward, setup_context=_setup)


@torch.library.register_vmap(_NAME)
def _(info, in_dims, input, parameters, geometries):
    input_dim, parameter_dims, _ = in_dims
    outputs = []
    for i in range(info.batch_size):
        one = [
            t if dim is None else t.select(dim, i)
            for t, dim in zip((input, *parameters), (input_dim, *parameter_dims), strict=True)
        ]
        outputs.append(chain_op(one[0], one[1:], geometries))
    return torch.stack(outputs), 0


@register_flop_formula(torch.ops.fusedcnn.conv_relu_max_pool2d_chain)
def flops(input, parameters, geometries, *, out_shape=None, **_) -> int:
    """Those of its convolutions and matrix products."""
    # Of shapes: the counter has made them of the tensors.
    empty = [torch.empty(shape, device="meta") for shape in (input, *parameters)]
    with FlopCounterMode(display=False) as counter:
        decomposed(empty[0], empty[1:], geometries)
    return counter.get_total_flops()
