"""The operators of a linear layer with ReLU and dropout: layouts, refusals, what torch asks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusedcnn._ops import below_autograd, linear_backward_op, linear_op
from torch import Tensor

ROWS, IN, OUT = 5, 7, 6


def operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"grad": (ROWS, OUT), "input": (ROWS, IN), "weight": (OUT, IN), "bias": (OUT,)}
    tensors = {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}
    return tensors | {"kept": torch.empty(ROWS, OUT, dtype=dtype).bernoulli_(0.3)}


def expected(tensors: dict[str, Tensor], relu: bool, drop: bool) -> list[Tensor]:
    """Both operators' results, by torch."""
    leaves = [tensors[name].detach().requires_grad_() for name in ("input", "weight", "bias")]
    output = F.linear(*leaves)
    output = F.relu(output) if relu else output
    dropped = output * (tensors["kept"] / 0.3)
    last = dropped if drop else output
    grads = torch.autograd.grad(last, leaves, tensors["grad"])
    return [output.detach(), dropped.detach() if drop else output.new_empty(0), *grads]


def computed(tensors: dict[str, Tensor], relu: bool, drop: bool, mask: int = 7) -> list[Tensor]:
    input, weight, kept = tensors["input"], tensors["weight"], tensors["kept"] if drop else None
    output, dropped = linear_op(input, weight, tensors["bias"], relu, kept, 0.3)
    arguments = input, weight, output if relu else None, kept, 0.3, mask
    return [output, dropped, *linear_backward_op(tensors["grad"], *arguments)]


def strided(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if layout == "gapped":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor[:1].expand_as(tensor) if layout == "expanded" else tensor


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gapped", "expanded"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_any_strides(layout, relu, drop):
    tensors = {name: strided(tensor, layout) for name, tensor in operands().items()}
    torch.testing.assert_close(
        computed(tensors, relu, drop), expected(tensors, relu, drop), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("mask", range(8))
def test_only_what_is_wanted(mask):
    tensors = operands()
    results = computed(tensors, True, True, mask)[2:]
    for bit, (result, wanted) in enumerate(
        zip(results, expected(tensors, True, True)[2:], strict=True)
    ):
        if mask >> bit & 1:
            torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)
        else:
            assert result.shape == (0,)


def test_no_rows():
    tensors = operands()
    empty = {name: t[:0] if len(t) == ROWS else t for name, t in tensors.items()}
    output, dropped, *grads = computed(empty, True, True)
    assert output.shape == dropped.shape == (0, OUT)
    assert grads[0].shape == (0, IN)
    assert torch.equal(grads[1], torch.zeros(OUT, IN, dtype=torch.float64))
    assert torch.equal(grads[2], torch.zeros(OUT, dtype=torch.float64))


def test_gradients_that_are_not_finite():
    """Through ReLU and dropout as in torch: infinity times a dropped element is NaN."""
    tensors = operands()
    tensors["grad"][0, 0], tensors["grad"][1, 1] = torch.inf, torch.nan
    tensors["kept"][0], tensors["bias"][:2] = 0, 50
    torch.testing.assert_close(
        computed(tensors, True, True), expected(tensors, True, True), equal_nan=True
    )


WRONG = [
    ("input", torch.zeros(ROWS), "input: expected"),
    ("input", torch.zeros(ROWS, IN, dtype=torch.float16), "input: expected float32 or float64"),
    ("weight", torch.zeros(OUT, IN + 1), "weight: expected"),
    ("weight", torch.zeros(OUT, IN, dtype=torch.float64), "weight: expected float32"),
    ("weight", torch.zeros(OUT), "weight: expected"),
    ("bias", torch.zeros(OUT + 1), "bias: expected"),
    ("kept", torch.zeros(ROWS, OUT + 1), "kept: expected"),
    ("grad", torch.zeros(ROWS, OUT + 1), "grad: expected"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_arguments(name, value, message):
    tensors = operands(torch.float32) | {name: value}
    with pytest.raises(RuntimeError, match=message):
        computed(tensors, True, True)


def test_released_storage():
    tensors = operands(torch.float32)
    tensors["weight"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight: expected a storage"):
        computed(tensors, True, True)


def test_wrong_mask():
    with pytest.raises(RuntimeError, match="output_mask: expected 0 to 7, got 8"):
        computed(operands(), True, True, mask=8)


def test_gradients_are_refused():
    """Instead of being left out without a word."""
    tensors = operands()
    tensors["weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match="fusedcnn::linear has no gradient"):
        computed(tensors, True, True)
    with below_autograd():
        results = computed(tensors, True, True)
    with torch.no_grad():
        assert all(map(torch.equal, computed(tensors, True, True), results))


def test_opcheck():
    tensors = operands()
    input, weight, kept = tensors["input"], tensors["weight"], tensors["kept"]
    output, _ = linear_op(input, weight, tensors["bias"], True, kept, 0.3)
    tests = ("test_schema", "test_faketensor")
    for mask in range(8):
        torch.library.opcheck(
            linear_backward_op,
            (tensors["grad"], input, weight, output, kept, 0.3, mask),
            test_utils=tests,
        )
    for noise in (None, kept):
        torch.library.opcheck(
            linear_op, (input, weight, tensors["bias"], True, noise, 0.3), test_utils=tests
        )


def test_flops_are_those_of_stock_layers():
    tensors = operands()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        computed(tensors, True, True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as stock:
        expected(tensors, True, True)
    assert counted.get_total_flops() == stock.get_total_flops() > 0
