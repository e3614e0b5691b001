"""A small classifier for 32x32 images, from stock layers and from fused blocks."""

from __future__ import annotations

import operator

from torch import Tensor, nn

from fusedcnn.modules import ConvReLUMaxPool2d


class SimpleCNN(nn.Module):
    """Two convolution blocks and two linear layers, from stock layers: the reference.

    Args:
        num_classes: size of the output, at least 1.

    Raises:
        TypeError: num_classes is no int.
        ValueError: num_classes is less than 1.
    """

    def __init__(self, num_classes: int = 10) -> None:
        num_classes = _check_num_classes(num_classes)
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.classifier = _classifier(num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.features(input))


class FusedSimpleCNN(nn.Module):
    """Drop-in for :class:`SimpleCNN`, its convolution blocks fused.

    Equivalent to ``SimpleCNN(num_classes)``: the same ``state_dict`` keys (``nn.Identity`` stands
    where ReLU and MaxPool2d stood) and, under one seed, the same initial values to the bit.

    Args:
        num_classes: size of the output, at least 1.

    Raises:
        TypeError: num_classes is no int.
        ValueError: num_classes is less than 1.
    """

    def __init__(self, num_classes: int = 10) -> None:
        num_classes = _check_num_classes(num_classes)
        super().__init__()
        self.features = nn.Sequential(
            ConvReLUMaxPool2d(3, 16, kernel_size=3, padding=1, pool_kernel_size=2, pool_stride=2),
            nn.Identity(),
            nn.Identity(),
            ConvReLUMaxPool2d(16, 32, kernel_size=3, padding=1, pool_kernel_size=2, pool_stride=2),
            nn.Identity(),
            nn.Identity(),
        )
        self.classifier = _classifier(num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.features(input))


def _check_num_classes(num_classes: int) -> int:
    # Before any parameter is made, so that no random numbers are drawn.
    try:
        if isinstance(num_classes, bool):
            raise TypeError
        count = operator.index(num_classes)
    except TypeError:
        raise TypeError(f"num_classes: expected an int, got {num_classes!r}") from None
    if count < 1:
        raise ValueError(f"num_classes: expected at least 1, got {count}")
    return count


def _classifier(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )
