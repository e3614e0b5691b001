"""SimpleCNN, FusedSimpleCNN and train_step: the same model, the same training."""

from __future__ import annotations

import copy
import io
import pickle

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


def both(num_classes: int = 10) -> tuple[nn.Module, nn.Module]:
    return seeded(SimpleCNN, num_classes), seeded(FusedSimpleCNN, num_classes)


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


@pytest.mark.parametrize("num_classes", [10, 3])
def test_same_initial_values(num_classes):
    """To the bit, and the random numbers that follow are the same too."""
    stock = seeded(SimpleCNN, num_classes)
    after = torch.get_rng_state()
    fused = seeded(FusedSimpleCNN, num_classes)
    assert torch.equal(torch.get_rng_state(), after)
    assert list(stock.state_dict()) == list(fused.state_dict()) == KEYS
    for key, value in stock.state_dict().items():
        assert torch.equal(value, fused.state_dict()[key]), key
    assert fused.classifier[4].out_features == num_classes
    assert fused(torch.zeros(2, 3, 32, 32)).shape == (2, num_classes)


def test_the_architecture():
    """Layer by layer, as the class documents it."""
    stock, fused = both()
    assert [type(layer) for layer in stock.features] == 2 * [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(layer) for layer in fused.features] == 2 * [
        ConvReLUMaxPool2d,
        nn.Identity,
        nn.Identity,
    ]
    assert repr(stock.classifier) == repr(fused.classifier)
    assert sum(p.numel() for p in stock.parameters()) == 268_650
    assert stock.classifier[3].p == 0.5


@pytest.mark.parametrize("source", [SimpleCNN, FusedSimpleCNN])
def test_state_dicts_load_strictly_both_ways(source):
    target = FusedSimpleCNN if source is SimpleCNN else SimpleCNN
    one, other = seeded(source, seed=1).eval(), seeded(target, seed=2).eval()
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    result = other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    images, _ = batch(2)
    torch.testing.assert_close(other(images), one(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model(duplicate):
    model = seeded(FusedSimpleCNN).eval()
    twin = duplicate(model)
    images, labels = batch(2)
    assert torch.equal(twin(images), model(images))
    before = model(images)
    train_step(twin, nn.CrossEntropyLoss(), torch.optim.SGD(twin.parameters(), 0.1), images, labels)
    assert torch.equal(model(images), before)
    assert not torch.equal(twin(images), before)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversions_of_the_model(dtype, channels_last):
    """Logits at most twice as far from float64's as SimpleCNN's are, plus their own rounding."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images, _ = batch(4)
    models = [m.eval().to(dtype=dtype, memory_format=memory_format) for m in both()]
    images = images.to(dtype=dtype, memory_format=memory_format)
    stock, fused = (model(images) for model in models)
    reference = models[0].double()(images.double())
    assert fused.dtype == dtype
    floor = torch.finfo(dtype).eps * reference.abs().max()
    # Float64 has no wider reference; a few roundings in each of the four layers part the two.
    allowed = (16 if dtype == torch.float64 else 1) * floor
    assert (fused - reference).abs().max() <= 2 * (stock - reference).abs().max() + allowed


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


def test_train_step_is_its_documentation():
    """zero_grad, forward, loss, backward, step, in this order; the loss of before the step."""
    images, labels = batch(4)
    criterion = nn.CrossEntropyLoss()
    one, other = (seeded(FusedSimpleCNN).eval() for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (one, other)]
    for parameter in one.parameters():  # to be cleared, not added to
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        loss = train_step(one, criterion, optimizers[0], images, labels)
        optimizers[1].zero_grad()
        expected = criterion(other(images), labels)
        expected.backward()
        optimizers[1].step()
        assert torch.equal(loss, expected)
        for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert loss.dim() == 0
    assert not loss.requires_grad
    assert loss.grad_fn is None
    assert loss.dtype == torch.float32


def test_train_step_leaves_the_mode_alone():
    images, labels = batch(2)
    for training in (True, False):
        model = seeded(FusedSimpleCNN).train(training)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels)
        assert all(module.training is training for module in model.modules())


def test_train_step_learns():
    """One batch by heart."""
    images, labels = batch(16)
    model = seeded(FusedSimpleCNN).eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = [
        train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels) for _ in range(30)
    ]
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("reduction", ["none", "one_element"])
def test_train_step_refuses_a_loss_with_dimensions(reduction):
    """Before the backward: no parameter and no optimizer state has changed."""
    images, labels = batch(1)
    model = seeded(FusedSimpleCNN).eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())

    def criterion(outputs, labels):
        loss = nn.functional.cross_entropy(outputs, labels, reduction="none")
        return loss if reduction == "none" else loss.reshape(1, 1)

    with pytest.raises(RuntimeError, match="criterion: expected a 0-d loss"):
        train_step(model, criterion, optimizer, images, labels)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not optimizer.state
    train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels)


def test_train_step_works_with_any_model():
    """It knows nothing of the fused block."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)
    first = train_step(model, nn.MSELoss(), optimizer, inputs, targets)
    assert train_step(model, nn.MSELoss(), optimizer, inputs, targets) < first


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("model", "m", TypeError, "model: expected a callable, got str"),
        ("model", nn.Linear, TypeError, "model: expected an instance, got the class Linear"),
        ("criterion", None, TypeError, "criterion: expected a callable, got NoneType"),
        ("criterion", nn.MSELoss, TypeError, "criterion: expected an instance, got .* MSELoss"),
        ("criterion", lambda *_: 1.0, TypeError, "criterion: expected a 0-d loss, got a float"),
        ("criterion", lambda *_: torch.ones(()), RuntimeError, "criterion: .* requires a gradient"),
        ("optimizer", None, TypeError, "optimizer: expected a .*Optimizer, got NoneType"),
        ("optimizer", nn.MSELoss(), TypeError, "optimizer: expected a .*Optimizer, got MSELoss"),
        ("optimizer", torch.optim.SGD, TypeError, "optimizer: expected an instance, .* SGD"),
        ("optimizer", torch.optim.LBFGS([torch.ones(1)]), TypeError, "no closure, got LBFGS"),
    ],
)
def test_train_step_names_the_wrong_argument(argument, value, error, message):
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    arguments = {
        "model": model,
        "criterion": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    } | {argument: value}
    with pytest.raises(error, match=message):
        train_step(**arguments, inputs=torch.randn(8, 4), labels=torch.randn(8, 2))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_train_step_where_gradients_are_off(mode):
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.weight.grad = torch.ones(2, 4)
    with mode(), pytest.raises(RuntimeError, match="train_step: expected gradients to be enabled"):
        train_step(model, nn.MSELoss(), optimizer, torch.randn(8, 4), torch.randn(8, 2))
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
