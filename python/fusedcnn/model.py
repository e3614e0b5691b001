"""A small classifier for 32x32 images, from stock layers and from fused blocks."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from fusedcnn._simple_cnn import training_forward
from fusedcnn.inference import in_one_call
from fusedcnn.modules import ConvReLUMaxPool2d


class _Network(nn.Module):
    """What the two have in common; ``_block`` makes the three layers of a convolution block."""

    def __init__(self, num_classes: int = 10) -> None:
        num_classes = _check_num_classes(num_classes)
        super().__init__()
        self.features = nn.Sequential(*self._block(3, 16), *self._block(16, 32))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        return self.classifier(self.features(input))


class SimpleCNN(_Network):
    """Two convolution blocks and two linear layers, from stock layers: the reference.

    Args:
        num_classes: size of the output, at least 1.

    Raises:
        TypeError: num_classes is no int.
        ValueError: num_classes is less than 1.
    """

    def _block(self, in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        return conv, nn.ReLU(), nn.MaxPool2d(2, 2)


class FusedSimpleCNN(_Network):
    """Drop-in for :class:`SimpleCNN`, its convolution blocks fused.

    Equivalent to ``SimpleCNN(num_classes)``: the same arguments, the same ``state_dict`` keys
    (``nn.Identity`` stands where ReLU and MaxPool2d stood) and, under one seed, the same initial
    values to the bit and in training the same dropout. Where nothing is unusual it trains through
    a single autograd node, and its layers' modules are not called.
    """

    def _block(self, in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
        conv = ConvReLUMaxPool2d(in_channels, out_channels, kernel_size=3, padding=1)
        return conv, nn.Identity(), nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Map images [N, 3, 32, 32] to logits [N, num_classes]."""
        if not torch.jit.is_scripting():  # as it can be after unfuse
            logits = None if self.training else in_one_call(self, input)
            if logits is None:
                logits = training_forward(self, input)
            if logits is not None:
                return logits
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
