"""The operators' passes one by one: what a single call computes, and what it must result in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from agreement import compare
from blocks import Block
from cases import Problem, block_case
from fusedcnn._ops import (
    GRAD_BIAS,
    GRAD_INPUT,
    GRAD_WEIGHT,
    Geometry,
    _dense_backward,
    backward_op,
    below_autograd,
    forward_op,
)
from kernel_forcing import force_kernel
from precision import Precision, round_to_tf32, with_tf32_operands
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One pass of the operators.

    Attributes:
        name: on the command line and in the JSON.
        kernels: what ``build_info()["kernels"]`` calls the pass of the kernels that compute it.
        with_code: of a forward: whether it keeps codes for a backward.
        output_mask: of a backward: the gradients that it computes; 0 for a forward.
    """

    name: str
    kernels: str
    with_code: bool = False
    output_mask: int = 0


PASSES = (
    Pass("forward", "forward"),
    Pass("forward+code", "forward", with_code=True),
    Pass("grad_weight", "grad_weight", output_mask=GRAD_WEIGHT | GRAD_BIAS),
    Pass("grad_input", "grad_input", output_mask=GRAD_INPUT),
)


class Operands(NamedTuple):
    """What changes from call to call; the code is the general kernel's or the selected one's."""

    input: Tensor
    grad_output: Tensor
    code: Tensor


class BlockCalls:
    """All passes of one block at one batch size, dtype and layout.

    Args:
        block: what to compute.
        batch_size: images per call.
        precision: of all tensors.
        channels_last: their layout.
        device: where they are.
        forward_kernel: computes the codes from which the backward passes start; "": the selected
            one. The general kernel serves every block, and ties fall as in the stock layers.
    """

    def __init__(
        self,
        block: Block,
        batch_size: int,
        precision: Precision,
        channels_last: bool,
        forward_kernel: str = "general",
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> None:
        case = block_case(
            block,
            "gradients",
            name=block.name,
            title=block.title,
            input_grad=True,
            clear_images=False,  # each pass is compared with the code given
        )
        self.block = block
        self.precision = precision
        self.dtype = precision.dtype
        self.device = device
        self.geometry = block.geometry()
        self._problem = Problem(case, batch_size, precision, device)
        module = self._problem.module(fused=True, channels_last=channels_last)[0]
        self._weight, self._bias = module.weight.detach(), module.bias.detach()
        self._operands = []
        with below_autograd(), force_kernel(device, forward_kernel):
            for batch in self._problem.batches(channels_last=channels_last):
                input = batch.input.detach()
                _, code = forward_op(input, self._weight, self._bias, self.geometry, True)
                self._operands.append(Operands(input, batch.target, code))
        self._rotating = itertools.cycle(self._operands)
        self._references: dict[str, tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = {}

    def bytes(self, of_pass: Pass) -> int:
        """Bytes that a call of the pass must at least read and write once, workspace left out."""
        input, grad_output, code = self._operands[0]
        # The output is as large as its gradient, and each gradient as what it is the gradient of.
        parts = {
            "forward": [input, self._weight, self._bias, grad_output],
            "forward+code": [input, self._weight, self._bias, grad_output, code],
            "grad_weight": [input, grad_output, code, self._weight, self._bias],
            "grad_input": [grad_output, code, self._weight, input],
        }[of_pass.name]
        return sum(tensor.nbytes for tensor in parts)

    def step(self, of_pass: Pass) -> Callable[[], object]:
        """Return the function that calls the operator on the next operands: what is timed."""
        rotating, weight, bias, geometry = self._rotating, self._weight, self._bias, self.geometry
        with_code, mask = of_pass.with_code, of_pass.output_mask

        def forward() -> object:
            input, _, _ = next(rotating)
            return forward_op(input, weight, bias, geometry, with_code)

        def backward() -> object:
            input, grad_output, code = next(rotating)
            return backward_op(grad_output, input, weight, code, geometry, mask)

        return backward if mask else forward

    def check(self, of_pass: Pass) -> dict[str, dict[str, Any]]:
        """Compute a pass once by the kernel in use and compare: see :func:`agreement.compare`.

        Raises:
            RuntimeError: the forced kernel does not cover the block.
        """
        input, grad_output, code = self._operands[0]
        weight, geometry, mask = self._weight, self.geometry, of_pass.output_mask
        if not mask:
            with below_autograd():
                results = forward_op(input, weight, self._bias, geometry, of_pass.with_code)
            return self.check_output(results[0], results[1] if of_pass.with_code else None)
        with below_autograd():
            grads = backward_op(grad_output, input, weight, code, geometry, mask)
        named = zip(("grad input", "grad weight", "grad bias"), grads, strict=True)
        return self.check_gradients({name: g for i, (name, g) in enumerate(named) if mask >> i & 1})

    def check_output(self, output: Tensor, code: Tensor | None) -> dict[str, dict[str, Any]]:
        """Compare a forward's output, and the outputs that its codes name, with the reference."""
        exact, stock = self._once("forward", self._forward_references)
        report = compare({"output": output}, exact, stock)
        if code is not None:
            error = (self._coded(code) - exact["output"]).abs().max().item()
            # Of two outputs that are each off by the limit, the smaller may have looked the larger.
            limit = 2 * report["output"]["limit"]
            report["code"] = report["output"] | {
                "error": error,
                "limit": limit,
                "right": report["output"]["right"] and error <= limit,
            }
        return report

    def check_gradients(self, gradients: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Compare gradients, by name, with those that follow from the same codes."""
        exact, stock = self._once("backward", self._backward_references)
        return compare(
            gradients,
            {name: exact[name] for name in gradients},
            [{name: way[name] for name in gradients} for way in stock],
        )

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._references:
            self._references[name] = compute()
        return self._references[name]

    @property
    def _measured(self) -> torch.dtype:
        """The dtype whose error in the stock layers is the yardstick: see agreement.py."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    @torch.no_grad()
    def _forward_references(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        stock = []
        # See Problem.references.
        ways = [(False, False), (True, False)] + [(False, True)] * self.precision.tf32
        for channels_last, rounded in ways:
            module = self._problem.module(fused=False, channels_last=channels_last)
            if rounded:
                with_tf32_operands(module)
            input = self._problem.batches(channels_last=channels_last)[0].input
            stock.append({"output": module.to(self._measured)(input.to(self._measured))})
        module = self._problem.module(fused=False).double()
        return {"output": module(self._operands[0].input.double())}, stock

    @torch.no_grad()
    def _backward_references(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        def gradients(
            dtype: torch.dtype, memory_format: torch.memory_format, rounded: bool = False
        ) -> dict[str, Tensor]:
            input, grad_output, code = self._operands[0]
            operands = (grad_output, input, self._weight)
            operands = [t.to(dtype, memory_format=memory_format) for t in operands]
            if rounded:
                operands = [round_to_tf32(t) for t in operands]
            grads = _dense_backward(*operands, code.contiguous(), Geometry(*self.geometry))
            return dict(zip(("grad input", "grad weight", "grad bias"), grads, strict=True))

        formats = (torch.contiguous_format, torch.channels_last)
        stock = [gradients(self._measured, memory_format) for memory_format in formats]
        if self.precision.tf32:
            stock.append(gradients(self._measured, formats[0], rounded=True))
        return gradients(torch.float64, formats[0]), stock

    def _coded(self, code: Tensor) -> Tensor:
        """In float64, the convolution outputs that the codes name, and 0 where ReLU is off."""
        # Both grad_weight and grad_bias are linear in grad_output; with the weight and the bias in
        # place of what they meet, its factor is the output that the code names.
        input, grad_output, _ = self._operands[0]
        weight = self._weight.double().contiguous()
        probe = grad_output.double().contiguous().requires_grad_()
        with torch.enable_grad():
            _, grad_weight, grad_bias = _dense_backward(
                probe,
                input.double().contiguous(),
                weight,
                code.contiguous(),
                Geometry(*self.geometry),
            )
            total = (grad_weight * weight).sum() + (grad_bias * self._bias.double()).sum()
        return torch.autograd.grad(total, probe)[0]
