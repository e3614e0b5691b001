"""fuse and unfuse on architectures that others have defined."""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d
from fusing import blocks as count_blocks
from torch import Tensor, nn
from zoo import build

# (library, model, image size, blocks fused in evaluation mode, of which with BatchNorm2d)
ZOO = [
    ("torchvision", "alexnet", 64, 3, 0),
    *(("torchvision", f"vgg{n}", 32, 5, 0) for n in (11, 13, 16, 19)),
    *(("torchvision", f"vgg{n}_bn", 32, 5, 5) for n in (11, 13, 16, 19)),
    ("torchvision", "squeezenet1_0", 64, 1, 0),
    ("torchvision", "squeezenet1_1", 64, 1, 0),
    ("torchvision", "googlenet", 64, 2, 2),
    ("torchvision", "resnet18", 32, 1, 1),
    ("timm", "vgg11", 32, 5, 0),
    ("timm", "vgg11_bn", 32, 5, 5),
    ("timm", "resnet18", 32, 1, 1),
]

# float64 sums of at most 4,609 products (512 channels, 3x3, bias) in two orders differ by at most
# 2 * 4,609 * 2**-53 = 1e-12 of the sum of the absolute products, which is at most some 30 times
# the result's scale; at most 19 layers deep, each gradient through both passes.
TOLERANCE = 2 * 4609 * 2.0**-53 * 30 * 2 * 19


def tensors_of(output) -> list[Tensor]:
    """Logits, and GoogLeNet's auxiliary ones in training mode."""
    if isinstance(output, Tensor):
        return [output]
    return [t for t in output if t is not None]


def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs and the gradients of everything, dropout by one seed."""
    torch.manual_seed(3)
    images = images.detach().requires_grad_()
    outputs = tensors_of(model(images))
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, (images, *parameters), allow_unused=True)
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    result |= dict(zip(("gradient of the images", *names), grads, strict=True))
    return result


@torch.no_grad()
def call(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs, and buffers after the call; dropout by one seed."""
    torch.manual_seed(4)
    result = {f"output {i}": o for i, o in enumerate(tensors_of(model(images)))}
    return result | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            bound = TOLERANCE * expected.double().abs().max().item()
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize(
    ("library", "name", "size", "blocks", "folded"), ZOO, ids=[f"{z[0]}-{z[1]}" for z in ZOO]
)
def test_zoo(library, name, size, blocks, folded):
    """Outputs and all gradients, in both modes; keys, Parameters, and the way back."""
    stock = build(library, name).eval()
    keys = list(stock.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    fused, report = fusedcnn.fuse(stock, report=True)
    assert count_blocks(fused) == blocks
    assert sum(isinstance(m, ConvBatchNormReLUMaxPool2d) for m in fused.modules()) == folded
    chains = [result for result in report if result.steps]
    assert [result.fused for result in chains] == [True] * blocks, [str(r) for r in report]
    assert isinstance(fused, type(stock))
    assert list(fused.state_dict()) == keys
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        assert ours is theirs
    assert count_blocks(stock) == 0

    expected = run(stock, images)
    assert_same(run(fused, images), expected)
    back = fusedcnn.unfuse(fused)
    assert repr(back) == repr(stock)
    with torch.no_grad():
        assert torch.equal(back(images), expected["output 0"])

    # Apart, since both would update the statistics that they share.
    trained, reference = copy.deepcopy(fused).train(), copy.deepcopy(stock).train()
    assert_same(call(trained, images), call(reference, images))
    if folded:  # evaluation by the statistics that training has left
        assert_same(call(trained.eval(), images), call(reference.eval(), images))


@pytest.mark.parametrize(("name", "chains"), [("vgg11_bn", 5), ("googlenet", 2)])
def test_batch_norm_is_fused_in_training_mode(name, chains):
    """As in evaluation mode, by the same blocks."""
    for training in (True, False):
        fused = fusedcnn.fuse(build("torchvision", name).train(training))
        assert sum(isinstance(m, ConvBatchNormReLUMaxPool2d) for m in fused.modules()) == chains
