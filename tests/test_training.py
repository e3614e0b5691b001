"""SimpleCNN, FusedSimpleCNN and train_step: the same model, the same training."""

from __future__ import annotations

import copy

import pytest
import torch
from fusedcnn import ConvReLUMaxPool2d, FusedSimpleCNN, SimpleCNN, train_step
from torch import Tensor, nn

KEYS = [
    f"{layer}.{parameter}"
    for layer in ("features.0", "features.3", "classifier.1", "classifier.4")
    for parameter in ("weight", "bias")
]


def seeded(model_class, num_classes: int = 10, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return model_class(num_classes)


def both() -> tuple[nn.Module, nn.Module]:
    return seeded(SimpleCNN), seeded(FusedSimpleCNN)


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


def assert_equal_states(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("num_classes", [10, 3])
def test_same_initial_values(num_classes):
    """To the bit, and the random numbers that follow are the same too."""
    stock = seeded(SimpleCNN, num_classes)
    after = torch.get_rng_state()
    fused = seeded(FusedSimpleCNN, num_classes)
    assert torch.equal(torch.get_rng_state(), after)
    assert list(stock.state_dict()) == KEYS
    assert_equal_states(fused, stock.state_dict())
    assert fused(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)


def test_the_architecture():
    """Layer by layer, as the class documents it."""
    stock, fused = both()
    assert [type(layer) for layer in stock.features] == 2 * [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    replaced = [ConvReLUMaxPool2d, nn.Identity, nn.Identity]
    assert [type(layer) for layer in fused.features] == 2 * replaced
    assert repr(stock.classifier) == repr(fused.classifier)
    assert sum(p.numel() for p in stock.parameters()) == 268_650
    assert stock.classifier[3].p == 0.5


# ---- training in lock-step ----------------------------------------------------------------------


def train(model: nn.Module, steps: int, lr: float, dtype=torch.float32) -> list[Tensor]:
    """Losses of `steps` steps on fresh batches, with SGD and momentum."""
    model.to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    torch.manual_seed(11)  # of the dropout
    losses = []
    for step in range(steps):
        images, labels = batch(8, step)
        losses.append(train_step(model, nn.CrossEntropyLoss(), optimizer, images.to(dtype), labels))
    return losses


def test_lock_step_in_float64():
    """Ten steps with dropout: the same losses and parameters but for float64's own rounding.

    In float64 no two elements of a window are so close that rounding decides between them, so the
    models differ by rounding alone: a few units of 1e-16 a step, on sums of up to 8,192 terms, that
    ten steps of training may multiply by some orders of magnitude. A wrong gradient of a single
    window would be seen at 1e-5.
    """
    stock, fused = both()
    stock_losses = train(stock, 10, 0.05, torch.float64)
    state = torch.get_rng_state()
    fused_losses = train(fused, 10, 0.05, torch.float64)
    assert torch.equal(torch.get_rng_state(), state)  # the dropout drew the same numbers
    torch.testing.assert_close(fused_losses, stock_losses, rtol=1e-10, atol=0)
    for ours, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert fused_losses[-1] != fused_losses[0]


def watch_margins(model: SimpleCNN) -> list[float]:
    """The smallest margin of each forward's windows: to the second, where above 0, and to 0."""
    margins = []

    def watch(module, inputs, output):
        n, c, h, w = output.shape
        windows = output.detach().view(n, c, h // 2, 2, w // 2, 2).transpose(3, 4).flatten(4)
        best, second = windows.topk(2).values.unbind(-1)
        gap = torch.where(best > 0, best - second, torch.inf)
        margins.append(min(best.abs().min().item(), gap.min().item()))

    for conv in (0, 3):
        model.features[conv].register_forward_hook(watch)
    return margins


def test_lock_step_in_float32():
    """Five steps: at most twice as far from a float64 run as SimpleCNN in float32 is.

    A window that is tied to within float32's rounding may go another way in either model, which
    says nothing about its gradients. So a seed is taken where, in the float64 run, no margin is
    below 1e-6: ten times the error of a convolution output here (sums of up to 144 terms, of size
    1). The floor is the rounding of a parameter and of a loss, once a step.
    """
    lr, steps = 0.05, 5
    for seed in range(100):
        reference = seeded(SimpleCNN, seed=seed)
        reference.classifier[3].p = 0.0
        margins = watch_margins(reference)
        exact_losses = train(reference, steps, lr, torch.float64)
        if min(margins) > 1e-6:
            break
    stock, fused = seeded(SimpleCNN, seed=seed), seeded(FusedSimpleCNN, seed=seed)
    for model in (stock, fused):
        model.classifier[3].p = 0.0
    stock_losses, fused_losses = train(stock, steps, lr), train(fused, steps, lr)
    assert min(margins) > 1e-6
    for exact, theirs, ours in zip(
        [*reference.parameters(), torch.stack(exact_losses)],
        [*stock.parameters(), torch.stack(stock_losses)],
        [*fused.parameters(), torch.stack(fused_losses)],
        strict=True,
    ):
        floor = steps * torch.finfo(torch.float32).eps / 2 * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


# ---- train_step ---------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def test_train_step_is_its_documentation():
    """zero_grad, forward, loss, backward, step, in this order; the loss of before the step."""
    images, labels = batch(4)
    criterion = nn.CrossEntropyLoss()
    one, other = (seeded(FusedSimpleCNN).eval() for _ in range(2))
    optimizers = sgd(one), sgd(other)
    for parameter in one.parameters():  # to be cleared, not added to
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        loss = train_step(one, criterion, optimizers[0], images, labels)
        optimizers[1].zero_grad()
        expected = criterion(other(images), labels)
        expected.backward()
        optimizers[1].step()
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert_equal_states(one, other.state_dict())


def test_train_step_leaves_the_mode_alone():
    images, labels = batch(2)
    for training in (True, False):
        model = seeded(FusedSimpleCNN).train(training)
        train_step(model, nn.CrossEntropyLoss(), sgd(model), images, labels)
        assert all(module.training is training for module in model.modules())


WRONG = [
    ("model", "m", TypeError, "model: expected a callable, got str"),
    ("model", nn.Linear, TypeError, "model: expected an instance, got the class Linear"),
    ("criterion", None, TypeError, "criterion: expected a callable, got NoneType"),
    ("criterion", nn.MSELoss, TypeError, "criterion: expected an instance, got .* MSELoss"),
    ("criterion", lambda *_: 1.0, TypeError, "criterion: expected a 0-d loss, got a float"),
    ("criterion", lambda *_: torch.ones(()), RuntimeError, "criterion: .* requires a gradient"),
    ("criterion", nn.MSELoss(reduction="none"), RuntimeError, "criterion: expected a 0-d loss"),
    (
        "criterion",
        lambda outputs, labels: (outputs - labels).square().mean().view(1, 1),
        RuntimeError,
        r"criterion: expected a 0-d loss, got shape \[1, 1\]",
    ),
    ("optimizer", None, TypeError, "optimizer: expected a .*Optimizer, got NoneType"),
    ("optimizer", nn.MSELoss(), TypeError, "optimizer: expected a .*Optimizer, got MSELoss"),
    ("optimizer", torch.optim.SGD, TypeError, "optimizer: expected an instance, .* SGD"),
    ("optimizer", torch.optim.LBFGS([torch.ones(1)]), TypeError, "no closure, got LBFGS"),
]


@pytest.mark.parametrize(("argument", "value", "error", "message"), WRONG)
def test_train_step_names_the_wrong_argument(argument, value, error, message):
    """Neither a parameter nor the optimizer's state has changed."""
    model = nn.Linear(4, 2)
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    arguments = {"model": model, "criterion": nn.MSELoss(), "optimizer": optimizer}
    with pytest.raises(error, match=message):
        train_step(
            **arguments | {argument: value}, inputs=torch.randn(8, 4), labels=torch.randn(8, 2)
        )
    assert_equal_states(model, before)
    assert not optimizer.state


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_train_step_where_gradients_are_off(mode):
    model = nn.Linear(4, 2)
    model.weight.grad = torch.ones(2, 4)
    with mode(), pytest.raises(RuntimeError, match="train_step: expected gradients to be enabled"):
        train_step(model, nn.MSELoss(), sgd(model), torch.randn(8, 4), torch.randn(8, 2))
    assert model.weight.grad is not None


@pytest.mark.parametrize("model_class", [SimpleCNN, FusedSimpleCNN])
def test_bad_num_classes(model_class):
    """Named, and no random number drawn."""
    state = torch.get_rng_state()
    for value in ("10", None, 2.5, True, [10]):
        with pytest.raises(TypeError, match="num_classes: expected an int, got "):
            model_class(num_classes=value)
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"num_classes: expected at least 1, got {value}"):
            model_class(num_classes=value)
    assert torch.equal(torch.get_rng_state(), state)
