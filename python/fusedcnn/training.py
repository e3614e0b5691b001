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
        TypeError: model or criterion cannot be called, optimizer is none or is one whose ``step``
            needs a closure (LBFGS), or the criterion's result is no tensor.
        RuntimeError: gradients are switched off, or the criterion's result is not 0-d or does not
            depend on anything that requires a gradient. No parameter has changed then.
    """
    check_step(model, criterion, optimizer)
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "train_step: expected gradients to be enabled, got a call under torch.no_grad() or "
            "torch.inference_mode()"
        )
    optimizer.zero_grad(set_to_none=True)
    loss = criterion(model(inputs), labels)
    if not isinstance(loss, Tensor):
        raise TypeError(f"criterion: expected a 0-d loss, got a {type(loss).__name__}")
    if loss.dim() != 0:
        raise RuntimeError(f"criterion: expected a 0-d loss, got shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise RuntimeError("criterion: expected a loss that requires a gradient, got one without")
    loss.backward()
    optimizer.step()
    return loss.detach()


def check_step(model: object, criterion: object, optimizer: object) -> None:
    """Raise TypeError for what cannot make a step; see :func:`train_step`."""
    for name, value in (("model", model), ("criterion", criterion)):
        if isinstance(value, type):
            raise TypeError(f"{name}: expected an instance, got the class {value.__name__}")
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    if isinstance(optimizer, type):
        raise TypeError(f"optimizer: expected an instance, got the class {optimizer.__name__}")
    if not (hasattr(optimizer, "zero_grad") and hasattr(optimizer, "step")):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: expected one whose step() needs no closure, got LBFGS")
