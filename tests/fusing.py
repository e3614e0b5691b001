"""What the tests of fuse share: small models whose results are exact, and comparisons."""

from __future__ import annotations

from collections.abc import Callable

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvReLUMaxPool2d
from torch import Tensor, nn


def integers(shape: tuple[int, ...]) -> Tensor:
    """Small integers: all that is computed from them is exact in float32."""
    return torch.randint(-2, 3, shape).float()


def with_integers(model: nn.Module) -> nn.Module:
    """Integers in all parameters, and BatchNorm2d that scales by powers of 2."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-30  # lost in every sum with a variance; torch 2.10 refuses 0
                if module.running_var is not None:
                    module.running_var.copy_(
                        torch.tensor(4.0) ** integers(module.running_var.shape)
                    )
                    module.running_mean.copy_(integers(module.running_mean.shape))
    return model


def blocks(model: nn.Module) -> int:
    return sum(isinstance(m, ConvReLUMaxPool2d) for m in model.modules())


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """Output and the gradients of inputs and parameters, dropout by one seed."""
    torch.manual_seed(5)
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = model(*leaves)
    weights = torch.arange(output.numel()).remainder(3).sub(1).view_as(output).float()
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(output, wanted, weights, allow_unused=True)
    return [output.detach(), *grads]


def assert_equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_fused(model: nn.Module, count: int, *shapes: tuple[int, ...]) -> nn.Module:
    """Fuse; outputs and gradients are equal to the bit, in both modes; and undo it."""
    with_integers(model)
    before, keys = repr(model), list(model.state_dict())
    fused, report = fusedcnn.fuse(model, report=True)
    assert blocks(fused) == count, [str(r) for r in report]
    assert sum(r.fused for r in report) == count
    assert repr(model) == before
    assert list(fused.state_dict()) == keys
    assert isinstance(fused, type(model))
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    inputs = [integers(shape) for shape in shapes]
    modes = [model.training]
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        modes = [True, False]
    for training in modes:
        assert_equal(run(fused.train(training), *inputs), run(model.train(training), *inputs))
    back = fusedcnn.unfuse(fused)
    assert blocks(back) == 0
    assert repr(back) == before
    assert type(back) is type(model)
    assert_equal(run(back, *inputs), run(model, *inputs))
    return fused


def assert_left_alone(model: nn.Module, expected: str, inplace: bool) -> fusedcnn.FuseReport:
    """Nothing is fused, all rows say why, as does one warning; and the model is as it was."""
    before, modules = repr(model), list(model.modules())
    attributes = [dict(vars(m)) for m in modules]
    with pytest.warns(UserWarning, match="fuse has replaced nothing") as warned:
        fused, report = fusedcnn.fuse(model, inplace=inplace, report=True)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert str(warned[0].message).endswith(f":\n{report}")
    assert report
    assert all(expected in row.reason for row in report), str(report)
    assert not any(row.fused for row in report)
    assert repr(model) == repr(fused) == before
    assert (fused is model) == inplace
    assert list(map(id, model.modules())) == list(map(id, modules))
    for module, values in zip(modules, attributes, strict=True):
        assert vars(module) == values
    return report


def block(*between: nn.Module, channels: tuple[int, int] = (3, 4)) -> list[nn.Module]:
    return [nn.Conv2d(*channels, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)]


class Net(nn.Module):
    """The layers of a block as attributes, with others beside them; no forward yet."""

    def __init__(self, **attributes):
        super().__init__()
        self.conv, self.relu, self.pool = block(channels=(3, 3))
        for name, value in attributes.items():
            setattr(self, name, value)


def net(forward: Callable[..., Tensor], **attributes) -> Net:
    """An instance of a class of its own with this forward."""
    return type("Net", (Net,), {"forward": forward})(**attributes)


def by_functions(self: Net, images: Tensor) -> Tensor:
    """A forward: the convolution, and the rest of the block as function calls."""
    return F.max_pool2d(F.relu(self.conv(images)), 2)


class LeNet(nn.Module):
    """As written in a hundred tutorials: one pool for both blocks, and dropout as a function."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(400, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, images):
        x = self.pool(F.relu(self.conv1(images)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = F.dropout(F.relu(self.fc1(torch.flatten(x, 1))), 0.5, self.training)
        return self.fc2(x)
