"""What many tests do: a forward with its backward, comparisons, tables of blocks and types."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from geometries import DTYPES, Block, by_name, dtype_name
from torch import Tensor

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Of tensors and of lists of them: values, dtypes and shapes.
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def over(blocks: Iterable[Block | str]) -> pytest.MarkDecorator:
    """Parametrizes `block`; those of the common list by name."""
    blocks = [by_name(block) if isinstance(block, str) else block for block in blocks]
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.name)


def leaves_of(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Leaves that share the tensors' memory, or None where there is none."""
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def step(
    function: Callable[..., Tensor],
    tensors: Iterable[Tensor | None],
    grad_output: Tensor | None = None,
) -> list[Tensor | None]:
    """[output, *gradients] of function(*tensors), by default for an output gradient of ones."""
    leaves = leaves_of(tensors)
    output = function(*leaves)
    output.backward(torch.ones_like(output) if grad_output is None else grad_output)
    return [output.detach(), *(t if t is None else t.grad for t in leaves)]
