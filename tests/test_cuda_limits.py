"""The CUDA operators at the edges of the host's side: sizes around 2^31, streams, devices, graphs.

All need a GPU; what the kernels compute is tests/test_cuda.py's business.
"""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
from fusedcnn import conv_relu_max_pool2d
from geometries import DTYPES, dtype_name
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
second_device = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs a second CUDA device"
)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
over_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture
def memory():
    """Skips a test for which the device has too little memory; gives it back afterwards."""

    def need(elements: int, dtype: torch.dtype) -> None:
        wanted = elements * dtype.itemsize
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        # A tenth more, for what the allocator rounds up to.
        if free < 1.1 * wanted:
            pytest.skip(f"needs {wanted / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} free")

    yield need
    torch.cuda.empty_cache()


def block(device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input, weight, bias and an output's gradient of SimpleCNN's second block."""
    torch.manual_seed(5)
    shapes = ((8, 16, 16, 16), (32, 16, 3, 3), (32,), (8, 32, 8, 8))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def results(input: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]
    output = conv_relu_max_pool2d(*leaves, padding=1)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.cpu(), other.cpu())


# ---- 2^31 ----------------------------------------------------------------------------------------


@over_layouts
@pytest.mark.parametrize("images", [-1, 0, 1], ids=["below", "at", "above"])
def test_input_elements_around_2_to_31(memory, images, channels_last):
    """The last image is the one that shows; before it, zeros."""
    count, channels, size = 2**31 // (4 * 64 * 64) + images, 4, 64
    dtype = torch.float16
    elements = count * channels * size * size
    assert (elements < 2**31, elements > 2**31) == (images < 0, images > 0)
    memory(2 * elements + 2 * count * 31 * 31, dtype)  # with its gradient; outputs and theirs
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(
        count, channels, size, size, device="cuda", dtype=dtype, memory_format=memory_format
    )
    input.zero_()[-1] = 1
    input.requires_grad_()
    weight = torch.ones(1, channels, 3, 3, device="cuda", dtype=dtype, requires_grad=True)
    output = conv_relu_max_pool2d(input, weight)
    assert (output[-1] == 9 * channels).all()
    assert output[:-1].count_nonzero() == 0
    output[-1].sum().backward()
    # Equal outputs tie, and the first of each window wins: every other one of the convolution's.
    grad = input.grad[-1]
    assert (grad.float().sum((1, 2)) == 9 * 31 * 31).all()
    assert input.grad[-2].count_nonzero() == 0
    assert input.grad[0].count_nonzero() == 0
    assert (weight.grad == 31 * 31).all()


@over_layouts
@pytest.mark.parametrize("images", [-1, 0, 1], ids=["below", "at", "above"])
def test_output_elements_around_2_to_31(memory, images, channels_last):
    """Offsets into output, codes and the output's gradient."""
    out_channels, size = 64, 16  # pooled
    count = 2**31 // (out_channels * size * size) + images
    dtype = torch.float16
    elements = count * out_channels * size * size
    assert (elements < 2**31, elements > 2**31) == (images < 0, images > 0)
    inputs = count * (2 * size) ** 2
    memory(2 * elements + elements // 2 + 2 * inputs, dtype)  # a code is half as wide
    input = torch.zeros(count, 1, 2 * size, 2 * size, device="cuda", dtype=dtype)
    input[-1] = 1
    if channels_last:
        input = input.to(memory_format=torch.channels_last)
        # One channel is both at once; strides say which layout the output has.
        input = input.as_strided(input.shape, (4 * size * size, 1, 2 * size, 1))
    weight = torch.ones(out_channels, 1, 3, 3, device="cuda", dtype=dtype)
    input.requires_grad_()
    weight.requires_grad_()
    output = conv_relu_max_pool2d(input, weight, padding=1)
    # A window's best output sees nine ones, but for the borders' windows, which have one too.
    assert (output[-1] == 9).all()
    assert output[:-1].amax() == 0
    assert output[:-1].amin() == 0
    grad_output = torch.zeros_like(output)
    grad_output[-1] = 1
    grad_input, grad_weight = torch.autograd.grad(output, (input, weight), grad_output)
    assert (grad_weight == size * size).all()
    assert grad_input[-1].float().sum().item() == out_channels * 9 * size * size
    assert grad_input[:-1].count_nonzero() == 0


# ---- streams -------------------------------------------------------------------------------------


def test_backward_runs_after_what_its_stream_was_given_before():
    input, weight, bias, grad_output = block()
    expected = results(input, weight, bias, grad_output)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(grad_output)
        torch.cuda._sleep(100_000_000)
        late.copy_(grad_output)  # must have happened
        found = results(input, weight, bias, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(found, expected)


def test_streams_do_not_share_what_kernels_work_in():
    """Many calls at once on several streams: each gets the bits that it gets alone."""
    operands = [block() for _ in range(4)]
    for i, (input, *_) in enumerate(operands):
        input.mul_(i + 1)
    expected = [results(*one) for one in operands]
    streams = [torch.cuda.Stream() for _ in operands]
    found: list[list[Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(25):
        for stream, one in zip(streams, operands, strict=True):
            with torch.cuda.stream(stream):
                found.append(results(*one))
    torch.cuda.synchronize()
    for i, ours in enumerate(found):
        assert_equal(ours, expected[i % len(operands)])


# ---- devices -------------------------------------------------------------------------------------


@second_device
def test_the_stream_of_the_second_device():
    """Its current stream is used, not the current device's."""
    expected = results(*block("cuda:0"))
    operands = block("cuda:1")
    stream = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream):
        grad_output = torch.zeros_like(operands[-1])
        torch.cuda._sleep(100_000_000)
        grad_output.copy_(operands[-1])
        with torch.cuda.device("cuda:0"):
            found = results(*operands[:-1], grad_output)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        torch.testing.assert_close(ours.cpu(), theirs.cpu())
    assert torch.cuda.current_device() == 0


@second_device
def test_a_recorded_step_on_the_second_device():
    model = fusedcnn.FusedSimpleCNN().to("cuda:1").eval()
    twin = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    step = fusedcnn.GraphedTrainStep(model, criterion, torch.optim.SGD(model.parameters(), 0.01))
    optimizer = torch.optim.SGD(twin.parameters(), 0.01)
    for _ in range(6):  # three eager, then the graph's
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        loss = step(images, labels)
        assert loss.device == torch.device("cuda:1")
        operands = (images.to("cuda:1"), labels.to("cuda:1"))
        expected = fusedcnn.train_step(twin, criterion, optimizer, *operands)
        torch.testing.assert_close(loss, expected)
    assert torch.cuda.current_device() == 0


@second_device
def test_operands_on_two_devices_are_refused():
    input, weight, bias, _ = block("cuda:0")
    with pytest.raises(RuntimeError, match="weight: expected device cuda:0 like input, got cuda:1"):
        conv_relu_max_pool2d(input, weight.to("cuda:1"), bias)


# ---- graphs --------------------------------------------------------------------------------------


@over_dtypes
@over_layouts
def test_replays_equal_eager_calls_in_every_type_and_layout(dtype, channels_last):
    operands = block(dtype=dtype)
    if channels_last:
        operands = [
            t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in operands
        ]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(*operands)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises where a call synchronises
        recorded = results(*operands)
    for _ in range(3):
        for tensor in operands:
            tensor.normal_()
        graph.replay()
        assert_equal(recorded, results(*operands))


def test_graphs_of_one_pool_keep_their_working_memory_apart():
    """Two recordings, replayed in turns: each finds its own results."""
    operands = block(), [2 * t for t in block()]
    results(*operands[0])
    torch.cuda.synchronize()
    graphs, recorded = [], []
    for one in operands:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            recorded.append(results(*one))
        graphs.append(graph)
    for turn in (0, 1, 1, 0):
        graphs[turn].replay()
        assert_equal(recorded[turn], results(*operands[turn]))


def test_an_empty_batch_is_recorded():
    input, weight, bias, _ = block()
    graph = torch.cuda.CUDAGraph()
    keep = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        keep += 1
        output = conv_relu_max_pool2d(input[:0], weight, bias)
    graph.replay()
    assert output.shape == (0, 32, 7, 7)
    assert keep.item() == 1
