"""One optimisation step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def train_step(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
) -> Tensor:
    """Run zero_grad, forward, loss, backward and optimizer step once.

    Equivalent to::

        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    Args:
        model: in whatever mode (train or eval) the caller has put it.
        criterion: maps (outputs, labels) to a 0-d loss, for example ``nn.CrossEntropyLoss()``.
        optimizer: over the model's parameters.
        inputs: one batch, such as [N, 3, 32, 32].
        labels: what the criterion takes, such as int64 [N].

    Returns:
        The loss before the step, detached, 0-d, on the model's device: reading its value is the
        caller's choice, since ``.item()`` waits for the device.

    Raises:
        RuntimeError: the criterion's result is not a 0-d tensor; no parameter has changed.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = criterion(model(inputs), labels)
    if loss.dim() != 0:
        raise RuntimeError(f"criterion: expected a 0-d loss, got shape {list(loss.shape)}")
    loss.backward()
    optimizer.step()
    return loss.detach()
