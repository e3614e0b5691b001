"""torch.compile: no graph break, no recompilation, eager's numbers; activation checkpointing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import fusedcnn
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from fusing import net
from geometries import by_name
from reference import exact_case, with_layout
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

# SimpleCNN's logits and gradients from two evaluation orders in float32: sums of at most 2,049
# terms, or 64 * 1,024 in a weight's gradient, of magnitudes below 1; three layers.
CLOSE = {"rtol": 0, "atol": 3 * 2049 * 2.0**-24}
FORWARD = "fusedcnn.conv_relu_max_pool2d.default"
BACKWARD = "fusedcnn.conv_relu_max_pool2d_backward.default"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Nothing compiled before counts towards the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Module:
    """Without dropout, which draws other numbers when compiled."""
    model = fusedcnn.FusedSimpleCNN()
    model.classifier[3] = nn.Identity()
    return model


def step(function, model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and gradients."""
    model.zero_grad()
    images = images.detach().requires_grad_()
    output = function(images)
    F.cross_entropy(output, torch.arange(len(images)) % 10).backward()
    return [output.detach(), images.grad, *(p.grad.clone() for p in model.parameters())]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE, check_stride=True)


def recording(graphs: list[list[str]]):
    """A compiler that notes the fused operators and convolutions of each graph."""

    def keep(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append([t for t in targets if "fusedcnn" in t or "convolution" in t])
        return make_boxed_func(graph.forward)

    return keep


def counting() -> torch._dynamo.testing.CompileCounterWithBackend:
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", True), ("inductor", False), ("inductor", True)]
)
def test_compiled_training(backend, dynamic, model):
    """One graph forward and one backward, with both fused operators in them."""
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (4, 2, 7) if dynamic else (4,):
        images = torch.randn(n, 3, 32, 32)
        assert_close(step(compiled, model, images), step(model, model, images))
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), **CLOSE)


def test_inductor_where_ci_is_set():
    """Inductor is stricter with CI=1; a fresh process, as it looks at each operator once."""
    code = """
import fusedcnn, torch
model = fusedcnn.ConvReLUMaxPool2d(3, 4, 3)
compiled = torch.compile(model, fullgraph=True)
images = torch.randn(2, 3, 9, 9)
compiled(images).sum().backward()
torch.testing.assert_close(compiled(images), model(images))
"""
    environ = os.environ | {"CI": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operators_of_a_compiled_training_step(model):
    """The fused forward and backward arrive whole; nothing of them is decomposed or doubled."""
    graphs = []
    backend = aot_autograd(fw_compiler=recording(graphs))
    torch.compile(model, fullgraph=True, backend=backend)(
        torch.randn(2, 3, 32, 32)
    ).sum().backward()
    assert graphs == [[FORWARD] * 2, [BACKWARD] * 2]


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 ties a pool to a parity")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_recompilation_for_another_batch(layout, train):
    """dynamic=True: compiled once, for batches and images of any size."""
    counter = counting()
    module = fusedcnn.ConvReLUMaxPool2d(3, 8, 3, padding=1)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((4, 3, 12, 10), (2, 3, 12, 10), (9, 3, 12, 10), (5, 3, 17, 8), (3, 3, 8, 33)):
        images = with_layout(torch.randn(shape), layout)
        with torch.set_grad_enabled(train):
            output, expected = compiled(images), module(images)
        assert torch.equal(output, expected)
        assert output.stride() == expected.stride()
        if train:
            output.sum().backward()
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes(model, recwarn):
    """Without dynamic=True the second batch size makes the size symbolic, and the third is free.

    All without a warning of ours, such as of a cache that the compiler looks past.
    """
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in (4, 6, 8, 3):
        compiled(torch.randn(n, 3, 32, 32))
    assert counter.frame_count == 2
    assert [str(w.message) for w in recwarn if "fusedcnn" in str(w) or "lru_cache" in str(w)] == []


def test_compiled_train_step(model):
    """train_step around a compiled model, as users write it."""
    twin = copy.deepcopy(model)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    losses = []
    for called in (model, torch.compile(twin, fullgraph=True, backend="aot_eager")):
        optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
        arguments = called, F.cross_entropy, optimizer, images, labels
        losses.append([fusedcnn.train_step(*arguments) for _ in range(3)])
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)


def test_compile_a_fused_model():
    """One whose forward was rewritten, in both modes."""

    def forward(self, images):
        images = F.max_pool2d(F.relu(self.norm(self.conv(images))), 2)
        return F.dropout(images, 0.5, self.training)

    stock = net(forward, norm=nn.BatchNorm2d(3)).eval()
    stock.norm.running_mean.uniform_(-1, 1)
    fused = fusedcnn.fuse(stock)
    assert isinstance(fused.conv, fusedcnn.ConvReLUMaxPool2d)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    images = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(compiled(images), stock(images), **CLOSE)
    fused.train()
    assert (compiled(images) == 0).float().mean() > 0.5  # dropout, and the stock layers
    fused.eval()
    torch.testing.assert_close(compiled(images), stock(images), **CLOSE)


def test_compile_under_autocast(exact):
    """The dtype of the region, in one graph; exact on integers."""
    block = by_name("simplecnn1_n2")
    operands, _ = exact_case(block.name, torch.float32)

    def function(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return fusedcnn.conv_relu_max_pool2d(
                *tensors, *block.conv_arguments, **block.fused_keywords
            )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*operands[:3]), function(*operands[:3])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_compile_where_there_is_no_kernel():
    """The stock layers, without a graph break at the line that logs so."""
    module = fusedcnn.ConvReLUMaxPool2d(3, 8, 3, device="meta")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 8, 3, 3)


# ---- activation checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, model):
    """The blocks run again in the backward: the same gradients to the bit, less kept."""
    images = torch.randn(4, 3, 32, 32)

    def checkpointed(images):
        return model.classifier(checkpoint(model.features, images, use_reentrant=reentrant))

    ours, theirs = (step(function, model, images) for function in (checkpointed, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            function(images.requires_grad_())
        return sum(sizes)

    assert kept(checkpointed) < kept(model)


def test_checkpoint_under_compile(model):
    """AOTAutograd runs the fused forward again in the backward graph, and keeps its input only."""
    graphs = []
    backend = aot_autograd(
        fw_compiler=recording(graphs), partition_fn=min_cut_rematerialization_partition
    )

    @torch.compile(fullgraph=True, backend=backend)
    def checkpointed(images):
        return model.classifier(checkpoint(model.features, images, use_reentrant=False))

    images = torch.randn(4, 3, 32, 32)
    assert_close(step(checkpointed, model, images), step(model, model, images))
    assert [sorted(graph) for graph in graphs] == [[FORWARD] * 2, [FORWARD] * 2 + [BACKWARD] * 2]
