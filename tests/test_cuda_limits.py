"""The CUDA operators from the host's side: autograd, sizes around 2^31, streams, devices, graphs.

All need a GPU; what the kernels compute is tests/test_cuda.py's business.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import fusedcnn
import pytest
import torch
from checks import assert_equal, leaves_of, over, over_dtypes, step
from forcing import CUDA_KERNELS, run_pass
from fusedcnn import _cuda, _ops, conv_relu_max_pool2d
from geometries import BLOCKS, Block, by_name, stock
from reference import INPUT, float_case, with_layout
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
second_device = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs a second CUDA device"
)
over_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture
def repeatable(monkeypatch):
    """Stock convolutions that return the same bits twice, of operands that are not rounded."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    _cuda.follow_torch()  # which operators called by themselves do not


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


def operands(
    device: str = "cuda", dtype: torch.dtype = torch.float32, block: int = 2
) -> list[Tensor]:
    """Input, weight, bias and an output's gradient of SimpleCNN's first or second block."""
    torch.manual_seed(5)
    shapes = {
        1: ((16, 3, 32, 32), (16, 3, 3, 3), (16,), (16, 16, 16, 16)),
        2: ((8, 16, 16, 16), (32, 16, 3, 3), (32,), (8, 32, 8, 8)),
    }[block]
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def results(input: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = leaves_of((input, weight, bias))
    output = conv_relu_max_pool2d(*leaves, padding=1)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


# ---- autograd and compilers ----------------------------------------------------------------------


def test_expanded_gradients_and_empty_batches(repeatable):
    tensors = [torch.randn(s, device="cuda") for s in ((2, 3, 8, 8), (4, 3, 3, 3))]
    grads = step(lambda *t: conv_relu_max_pool2d(*t).sum(), tensors)[1:]
    expected = step(lambda *t: stock(*t).sum(), [t.double() for t in tensors])[1:]
    torch.testing.assert_close(grads, [t.float() for t in expected], rtol=1e-4, atol=1e-4)
    empty, _, grad_weight = step(conv_relu_max_pool2d, [tensors[0][:0], tensors[1]])
    assert empty.shape == (0, 4, 3, 3)
    assert grad_weight.count_nonzero() == 0


def leaves(block: Block, dtype: torch.dtype) -> list[Tensor]:
    """Input, weight and bias on the GPU."""
    shapes = (block.input, block.weight, (block.out_channels,))
    return [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]


@over([
    Block("one_pooled", (2, 2, 4, 4), 3, padding=1),
    Block("strided", (1, 4, 7, 6), 2, stride=2, padding=1, groups=2),
    Block("overlapping", (1, 2, 6, 6), 2, pool=3, pool_stride=1, pool_padding=1),
])  # fmt: skip
def test_gradcheck(block):
    tensors = leaves(block, torch.float64)
    assert torch.autograd.gradcheck(block.fused, tensors)
    assert torch.autograd.gradgradcheck(block.fused, tensors)


@over(["simplecnn1_n1", "unbatched", "window256", "depthwise"])
def test_opcheck(block):
    input, weight, bias = leaves(block, torch.float32)
    geometry = block.pack()
    torch.library.opcheck(_ops.forward_op, (input, weight, bias, geometry, True))
    output, code = _ops.forward_op(input, weight, bias, geometry, True)
    arguments = (torch.randn_like(output), input, weight, code, geometry, 7)
    # Not aot_dispatch_dynamic: with sizes as symbols, torch 2.11's own double backward of a
    # convolution on CUDA asks a tensor for its numel().
    tests = ("test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_static")  # fmt: skip
    torch.library.opcheck(_ops.backward_op, arguments, test_utils=tests)


def test_compiled_equals_eager():
    compiled = torch.compile(conv_relu_max_pool2d, fullgraph=True)
    input, weight = torch.randn(2, 3, 9, 9).cuda(), torch.randn(4, 3, 3, 3).cuda()
    assert torch.equal(compiled(input, weight), conv_relu_max_pool2d(input, weight))


# ---- the stock convolution -----------------------------------------------------------------------


def test_what_the_library_kernels_return_is_the_stock_convolutions(repeatable):
    """Where the stock layers are deterministic, so are they; and their gradients are the same."""
    tensors = operands()
    with _cuda.force("library"):
        found = [results(*tensors) for _ in range(2)]
    assert_equal(found[0], found[1])
    double = results(*(t.double() for t in tensors))
    torch.testing.assert_close([t.double() for t in found[0]], double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@over(BLOCKS)
def test_half_types_have_the_same_bits_in_either_layout(block, dtype, repeatable):
    """Their convolution is called in one order whatever the layout of its operands: channels_last,
    unless there is one channel.
    """
    case = float_case(block.name, dtype)
    found = []
    for layout in ("contiguous", "channels_last"):
        given = case.operands.map(lambda t, layout=layout: with_layout(t.cuda(), layout))
        code = with_layout(case.code.cuda(), layout)
        library = [f for f in CUDA_KERNELS if f.kernel == "library"]
        passes = [run_pass(forced, block, given, code) for forced in library]
        found.append({name: t for results in passes for name, t in results.items()})
    # All but grad_bias, which a kernel sums in the order in which gradients lie.
    for name in ("output", "code", "grad_input", "grad_weight"):
        assert torch.equal(found[0][name], found[1][name]), name


def test_the_operator_refuses_operands_that_autocast_would_cast():
    """torch casts the operands of its convolution; the kernels around it expect their type."""
    input, weight, bias, _ = operands()
    geometry = by_name("simplecnn2_n2").pack()
    with (
        _cuda.force("library"),
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(RuntimeError, match="input: expected autocast's type"),
    ):
        _ops.forward_op(input, weight, bias, geometry, False)


def test_a_released_input_is_not_read_for_grad_input(repeatable):
    input, weight, bias, grad_output = operands()
    geometry = by_name("simplecnn2_n2").pack()
    _, code = _ops.forward_op(input, weight, bias, geometry, True)
    with _cuda.force("library"):
        arguments = (grad_output, input, weight, code, geometry, INPUT)
        expected = _ops.backward_op(*arguments)[0]
        input.untyped_storage().resize_(0)
        assert torch.equal(_ops.backward_op(*arguments)[0], expected)


# ---- 2^31 ----------------------------------------------------------------------------------------

around = pytest.mark.parametrize("images", [-1, 0, 1], ids=["below", "at", "above"])


@over_layouts
@around
def test_input_elements_around_2_to_31(memory, images, layout):
    """The last image is the one that shows; before it, zeros."""
    count, channels, size = 2**31 // (4 * 64 * 64) + images, 4, 64
    dtype = torch.float16
    elements = count * channels * size * size
    assert (elements < 2**31, elements > 2**31) == (images < 0, images > 0)
    memory(2 * elements + 2 * count * 31 * 31, dtype)  # with its gradient; outputs and theirs
    memory_format = getattr(torch, layout if layout == "channels_last" else "contiguous_format")
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
    assert (input.grad[-1].float().sum((1, 2)) == 9 * 31 * 31).all()
    assert input.grad[-2].count_nonzero() == 0
    assert input.grad[0].count_nonzero() == 0
    assert (weight.grad == 31 * 31).all()


@over_layouts
@around
def test_output_elements_around_2_to_31(memory, images, layout):
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
    if layout == "channels_last":
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


def after_a_pause(operands: list[Tensor]) -> list[Tensor]:
    """Copies of them; the current stream writes the values late."""
    late = [torch.zeros_like(t) for t in operands]
    torch.cuda._sleep(100_000_000)
    for copied, tensor in zip(late, operands, strict=True):
        copied.copy_(tensor)
    return late


@pytest.mark.parametrize("late", [slice(0, 4), slice(3, 4)], ids=["forward", "backward"])
def test_calls_run_after_what_their_stream_was_given_before(late):
    tensors = operands()
    expected = results(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensors[late] = after_a_pause(tensors[late])
        found = results(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(found, expected)


def test_streams_do_not_share_what_kernels_work_in():
    """Many calls at once on several streams: each gets the bits that it gets alone."""
    several = [operands(block=block) for block in (1, 2, 1, 2)]
    for i, (input, *_) in enumerate(several):
        input.mul_(i + 1)
    expected = [results(*one) for one in several]
    streams = [torch.cuda.Stream() for _ in several]
    found: list[list[Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(25):
        for stream, one in zip(streams, several, strict=True):
            with torch.cuda.stream(stream):
                found.append(results(*one))
    torch.cuda.synchronize()
    assert_equal(found, expected * 25)


def test_threads_launch_one_kernel_with_different_amounts_of_shared_memory():
    """No launch lowers the limit that another thread's is about to need."""
    packed = by_name("simplecnn2_n2").pack()
    calls = []
    for out_channels in (56, 72):  # 49 and 58 KiB
        gen = torch.Generator(device="cuda").manual_seed(out_channels)
        input = torch.randn(2, 16, 16, 16, device="cuda", generator=gen)
        weight = torch.randn(out_channels, 16, 3, 3, device="cuda", generator=gen)
        output, code = _ops.forward_op(input, weight, None, packed, True)
        calls.append((output, input, weight, code, packed, INPUT))

    def backward(call: tuple) -> Tensor:
        first, *rest = (_ops.backward_op(*call)[0] for _ in range(500))
        assert all(torch.equal(first, again) for again in rest)
        return first

    with _cuda.force("cuda_cores_3x3"), ThreadPoolExecutor(len(calls)) as pool:
        expected = [backward(call) for call in calls]
        assert_equal(list(pool.map(backward, calls)), expected)


# ---- devices -------------------------------------------------------------------------------------


@second_device
def test_the_stream_of_the_second_device():
    """The tensors' device and its current stream are used, not the current device's."""
    expected = results(*operands("cuda:0"))
    tensors = operands("cuda:1")
    stream = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(stream):
        tensors[-1:] = after_a_pause(tensors[-1:])
        with torch.cuda.device("cuda:0"):
            found = results(*tensors)
    stream.synchronize()
    assert {t.device for t in found} == {torch.device("cuda:1")}
    torch.testing.assert_close([t.cpu() for t in found], [t.cpu() for t in expected])
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
        batch = (images.to("cuda:1"), labels.to("cuda:1"))
        torch.testing.assert_close(loss, fusedcnn.train_step(twin, criterion, optimizer, *batch))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda:1", marks=second_device)])
def test_arguments_on_different_devices(other):
    input, weight, bias, _ = operands("cuda:0")
    weight = weight.to(other)
    message = f"weight: expected device cuda:0 like input, got {other}"
    with pytest.raises(RuntimeError, match=message):
        conv_relu_max_pool2d(input, weight, bias)
    geometry = by_name("simplecnn2_n2").pack()
    with pytest.raises(RuntimeError, match="weight: expected a tensor on CUDA device 0 like input"):
        _ops.forward_op(input, weight, bias, geometry, False)


# ---- graphs --------------------------------------------------------------------------------------


@over_dtypes
@over_layouts
@pytest.mark.parametrize("block", [1, 2])
def test_replays_equal_eager_calls_in_every_type_and_layout(block, dtype, layout, repeatable):
    tensors = [with_layout(t, layout) for t in operands(dtype=dtype, block=block)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises where a call synchronises
        recorded = results(*tensors)
    for _ in range(3):
        for tensor in tensors:
            tensor.normal_()
        graph.replay()
        assert_equal(recorded, results(*tensors))


def test_graphs_of_one_pool_keep_their_working_memory_apart():
    """Two recordings, replayed in turns: each finds its own results."""
    both = operands(), [2 * t for t in operands()]
    results(*both[0])
    torch.cuda.synchronize()
    graphs, recorded = [], []
    for one in both:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            recorded.append(results(*one))
        graphs.append(graph)
    for turn in (0, 1, 1, 0):
        graphs[turn].replay()
        assert_equal(recorded[turn], results(*both[turn]))


def test_an_empty_batch_is_recorded():
    input, weight, bias, _ = operands()
    graph = torch.cuda.CUDAGraph()
    keep = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        keep += 1
        output = conv_relu_max_pool2d(input[:0], weight, bias)
    graph.replay()
    assert output.shape == (0, 32, 7, 7)
    assert keep.item() == 1
