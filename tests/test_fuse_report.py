"""What fuse says of near misses, and when it has fused nothing."""

from __future__ import annotations

import fusedcnn
import pytest
import torch.nn.functional as F
from fusing import assert_left_alone, block, net
from torch import nn

pytestmark = pytest.mark.usefixtures("exact")


def by_dropout(self, images):
    images = F.relu(self.conv(images))
    images = F.dropout(images) if self.training else images
    return F.max_pool2d(images, 2)


class ActingNorm(nn.BatchNorm2d):
    def forward(self, images):
        return F.relu(super().forward(images))


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers).eval()


NEAR_MISSES = {
    "leaky": (lambda: sequence(nn.LeakyReLU(), nn.MaxPool2d(2)), "'1' (LeakyReLU) stands where"),
    "leaky behind the norm": (
        lambda: sequence(nn.BatchNorm2d(4), nn.LeakyReLU(), nn.MaxPool2d(2)), "'2' (LeakyReLU)"),
    "leaky function": (
        lambda: net(lambda self, x: F.max_pool2d(F.leaky_relu(self.conv(x)), 2)),
        "leaky_relu stands where only BatchNorm2d and ReLU may"),
    "dropout before ReLU": (
        lambda: sequence(nn.Dropout(), nn.ReLU(), nn.MaxPool2d(2)), "'1' (Dropout) stands where"),
    "dropout behind ReLU": (
        lambda: sequence(nn.ReLU(), nn.Dropout2d(), nn.MaxPool2d(2)), "'2' (Dropout2d) stands"),
    "dropout in training": (lambda: net(by_dropout), "dropout stands where"),
    "group norm": (
        lambda: sequence(nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)), "'1' (GroupNorm) stands"),
    "norm behind ReLU": (
        lambda: sequence(nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
        "'2' (BatchNorm2d) stands behind ReLU"),
    "residual": (
        lambda: net(lambda self, x: F.max_pool2d(F.relu(self.conv(x) + x), 2)),
        "add stands where"),
    "average pool": (lambda: sequence(nn.ReLU(), nn.AvgPool2d(2)), "'2' (AvgPool2d) is no max"),
    "adaptive max pool": (
        lambda: sequence(nn.ReLU(), nn.AdaptiveMaxPool2d(2)), "(AdaptiveMaxPool2d) is no max pool"),
    "no ReLU": (lambda: sequence(nn.MaxPool2d(2)), "no ReLU is next to the pool"),
    "leaky behind the pool": (
        lambda: sequence(nn.MaxPool2d(2), nn.LeakyReLU()), "no ReLU is next to the pool"),
    "norm with an activation": (
        lambda: sequence(ActingNorm(4), nn.MaxPool2d(2)), "'1' is a ActingNorm, and may not"),
    "two ReLUs": (lambda: sequence(nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)), "stands there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
    """One row, which names what is in the way."""
    make, expected = NEAR_MISSES[case]
    assert len(assert_left_alone(make(), expected, inplace=False)) == 1


def test_reports_print_as_lines(recwarn):
    by_value = net(lambda self, x: x if x.sum() > 0 else -x)
    _, report = fusedcnn.fuse(nn.Sequential(*block(), by_value), report=True)
    assert str(report).splitlines() == [str(row) for row in report]
    assert str(report[0]) == "0 -> 1 -> 2: fused"
    assert str(report[-1]).startswith("'3': left alone: torch.fx cannot follow its forward: ")
    assert not recwarn.list
    _, report = fusedcnn.fuse(nn.Linear(3, 4), report=True)
    assert str(report) == "no Conv2d with a ReLU and a MaxPool2d behind it"
    assert str(recwarn.pop(UserWarning).message).endswith(f"nothing in Linear:\n{report}")
    near = [layer for _ in range(20) for layer in sequence(nn.ReLU6(), nn.MaxPool2d(1))]
    fusedcnn.fuse(nn.Sequential(*near))
    lines = str(recwarn.pop(UserWarning).message).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "and 12 more: see fuse(model, report=True)"
