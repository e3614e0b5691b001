"""Cross-entropy that counts along."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CountingCrossEntropy(nn.Module):
    """Cross-entropy that also adds up loss and correct answers, where the logits pass by anyway.

    The sums stay on the device: reading them waits for it, so that is done rarely.

    Args:
        device: of the sums.

    Attributes:
        divisor: what the batch's loss is divided by; None: its number of images, for the mean.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.divisor: float | None = None
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.divisor is None:
            loss = F.cross_entropy(logits, labels)
            added = loss * len(labels)
        else:
            added = F.cross_entropy(logits, labels, reduction="sum")
            loss = added / self.divisor
        with torch.no_grad():
            self.loss_sum += added
            self.correct += (logits.argmax(1) == labels).sum()
        return loss

    def set(self, loss_sum: float, correct: int) -> None:
        """Start from these sums."""
        self.loss_sum.fill_(loss_sum)
        self.correct.fill_(correct)
