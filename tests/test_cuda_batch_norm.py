"""The operators with a batch normalisation on a GPU, called by themselves. Their kernels also run
in the torch-free self-test of tests/cuda_on_cpu.
"""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import EPS, Case, draw, expected, run, stock
from checks import over, over_dtypes
from fusedcnn import _cuda
from fusedcnn._geometry import Geometry
from fusedcnn._ops import bn_forward_op
from geometries import BLOCKS, Block
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEM = Block("stem", (2, 3, 33, 34), 16, 7, 2, 3, pool=3, pool_stride=2, pool_padding=1)
WIDE = Block("wide", (4, 8, 16, 16), 64, 3, 1, 1)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
over_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    """No tf32, which errs by more, and the same convolution in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    _cuda.follow_torch()  # which operators called by themselves do not
    yield
    torch.backends.cudnn.conv.fp32_precision = precision


def on_gpu(case: Case, layout: torch.memory_format = torch.contiguous_format) -> Case:
    """Images in the layout, vectors as they are."""
    return case.map(
        lambda t: t.cuda().contiguous(memory_format=layout) if t.dim() == 4 else t.cuda()
    )


def by_stock(block: Block, case: Case) -> dict[str, Tensor]:
    """What autograd makes of the stock layers."""
    leaves = Case(*(t.detach().clone().requires_grad_() for t in case))
    input, weight, bias, gamma, beta, _ = leaves
    output = stock(
        block, input, weight, bias, None, None, gamma, beta, training=True, momentum=0.1, eps=EPS
    )
    output.backward(case.grad_output)
    return {
        "output": output.detach(),
        "grad_input": input.grad,
        "grad_weight": weight.grad,
        "grad_gamma": gamma.grad,
        "grad_beta": beta.grad,
    }


@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@over([*BLOCKS, STEM, WIDE])
def test_right(block, dtype, layout):
    """All results, within what roundings explain, given the winners that the forward picked."""
    case = draw(block, dtype)
    results, code = run(block, on_gpu(case, layout))
    wrong = []
    # A thread adds up what lies in the windows of one pooled value.
    g = Geometry(*block.pack())
    elements = g.pool_kernel_h * g.pool_kernel_w
    for name, (result, bound) in expected(block, case, code.cpu(), one_by_one=elements).items():
        ours = results[name].cpu().double()
        error = torch.where(ours == result, 0, (ours - result).abs())
        excess = (error / bound).amax().item()
        if not excess <= 1:
            wrong.append(f"{name}: {excess:.3g} times what is allowed")
    assert not wrong, "\n".join(wrong)


@over_layouts
@pytest.mark.parametrize("affine", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@over([STEM, WIDE])
def test_half_types_are_as_close_as_the_stock_layers(block, dtype, affine, layout):
    """To float64, in norm: at most twice as far, since both round the convolution's output, and
    where that makes elements tie their gradients go elsewhere.
    """
    case = draw(block, dtype, affine)
    results, _ = run(block, on_gpu(case, layout))
    theirs = by_stock(block, on_gpu(case, layout))
    for name, right in by_stock(block, case.map(Tensor.double)).items():
        assert results[name].dtype == theirs[name].dtype, name
        error = (results[name].cpu().double() - right).norm()
        stock_error = (theirs[name].cpu().double() - right).norm()
        rounding = torch.finfo(results[name].dtype).eps * right.norm()
        assert error <= 2 * stock_error + rounding, f"{name}: {error:.3g}, stock {stock_error:.3g}"


@over_layouts
@over_dtypes
def test_two_runs_give_the_same_bits(dtype, layout):
    case = on_gpu(draw(STEM, dtype), layout)
    first, first_code = run(STEM, case)
    second, second_code = run(STEM, case)
    assert torch.equal(first_code, second_code)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@over_layouts
def test_a_graph_captures_both(layout):
    """Nothing waits for the GPU, and a replay gives what a call does."""
    case = on_gpu(draw(WIDE, torch.float32), layout)
    eager, _ = run(WIDE, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(WIDE, case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run(WIDE, case)
    graph.replay()
    for name, result in captured.items():
        assert torch.equal(result, eager[name]), name


@over_layouts
def test_output_and_statistics_are_the_same_without_code(layout):
    *tensors, _ = on_gpu(draw(STEM, torch.float32), layout)
    output, _, _, mean, var = bn_forward_op(*tensors, STEM.pack(), EPS, True)
    less, code, extremum, *statistics = bn_forward_op(*tensors, STEM.pack(), EPS, False)
    assert code.numel() == extremum.numel() == 0
    assert torch.equal(less, output)
    assert torch.equal(statistics[0], mean)
    assert torch.equal(statistics[1], var)


def test_the_first_of_equal_elements_wins():
    """Equal pixels tie, whatever the sign of bn_weight, and so do all where it is zero."""
    input = torch.ones(1, 1, 4, 4, device="cuda")
    input[..., 2:, :] = torch.randn(2, 4, device="cuda")
    weight = torch.ones(3, 1, 1, 1, device="cuda")
    gamma = torch.tensor([1.0, -1.0, 0.0], device="cuda")
    beta = torch.full((3,), 9.0, device="cuda")
    block = Block("ties", (1, 1, 4, 4), 3, 1)
    code = bn_forward_op(input, weight, None, gamma, beta, block.pack(), EPS, True)[1].cpu()
    assert (code[0, :, 0] == 0).all()
    assert (code[0, 2] == 0).all()
    window = input[0, 0, 2:].cpu().unfold(1, 2, 2).permute(1, 0, 2).reshape(2, 4)
    assert code[0, 0, 1].tolist() == window.argmax(1).tolist()
    assert code[0, 1, 1].tolist() == window.argmin(1).tolist()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_channels_alone(special):
    """An image's NaN reaches every channel of a group; a bias that is not finite only its own."""
    block = Block("groups", (2, 2, 6, 6), 4, 3, 1, 1, groups=2)
    case = draw(block, torch.float32)
    case.input[0, 1, 2, 2] = special
    case.bias[1] = special
    *tensors, _ = on_gpu(case)
    output, code, _, _, var = bn_forward_op(*tensors, block.pack(), EPS, True)
    assert var.isnan().tolist() == [False, True, True, True]
    assert output[:, 1:].isnan().all()
    assert output[:, 0].isfinite().all()
    assert (code[:, 1:] != 255).all()
