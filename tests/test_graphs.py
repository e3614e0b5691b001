"""GraphedTrainStep: on the CPU the same as train_step, on CUDA a graph with the same results."""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
from torch import nn

CRITERION = nn.CrossEntropyLoss()


def cuda(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.cuda(skip(test))


def steps(
    device: str, graphed: bool, batches: list[int], training: bool = False, **options
) -> tuple[list, list]:
    """Losses and final parameters of a few steps, from the same start.

    Dropout's draws differ between graphs and eager steps on CUDA: only the CPU compares training.
    """
    torch.manual_seed(1)
    model = fusedcnn.FusedSimpleCNN().to(device).train(training)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, **options)
    step = fusedcnn.GraphedTrainStep(model, CRITERION, optimizer)
    losses = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        inputs = torch.randn(batch, 3, 32, 32).to(device)
        labels = torch.randint(10, (batch,)).to(device)
        if graphed:
            losses.append(step(inputs, labels))
        else:
            losses.append(fusedcnn.train_step(model, CRITERION, optimizer, inputs, labels))
        assert not losses[-1].requires_grad
    return [loss.item() for loss in losses], [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_the_same_as_train_step_on_the_cpu(training):
    ours, theirs = (steps("cpu", graphed, [4, 4, 3], training) for graphed in (True, False))
    assert ours[0] == theirs[0]
    assert len(set(ours[0])) == 3
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(mine, other)


def test_a_loss_that_is_no_number_is_refused_on_the_cpu():
    model = fusedcnn.FusedSimpleCNN()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fusedcnn.GraphedTrainStep(model, nn.CrossEntropyLoss(reduction="none"), optimizer)
    with pytest.raises(RuntimeError, match="criterion: expected a 0-d loss"):
        step(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


LINEAR = nn.Linear(1, 1)
SGD = torch.optim.SGD(LINEAR.parameters(), 0.1)
REFUSED = [
    (nn.ReLU(), CRITERION, SGD, ValueError, "model: expected parameters on one device, got none"),
    (
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta")),
        *(CRITERION, SGD, ValueError, "got cpu, meta"),
    ),
    (torch.relu, CRITERION, SGD, TypeError, "model: expected a torch.nn.Module, got builtin_func"),
    (LINEAR, None, SGD, TypeError, "criterion: expected a callable, got NoneType"),
    (LINEAR, CRITERION, torch.optim.SGD, TypeError, "optimizer: expected an .* the class SGD"),
]


@pytest.mark.parametrize(("model", "criterion", "optimizer", "error", "message"), REFUSED)
def test_construction_names_what_is_wrong(model, criterion, optimizer, error, message):
    with pytest.raises(error, match=message):
        fusedcnn.GraphedTrainStep(model, criterion, optimizer)


def test_an_optimizer_that_cannot_be_captured_is_named():
    """The check itself, which __init__ makes for models on CUDA."""
    check = fusedcnn.graphs._check_capturable
    with pytest.raises(ValueError, match="optimizer: expected capturable=True, got a Adam"):
        check(torch.optim.Adam(LINEAR.parameters()))
    check(SGD)


@cuda
def test_graphs_give_the_same_as_eager_steps():
    """Through warm-up, recording, replays, a second shape, and back to the first."""
    batches = [4] * 6 + [3] * 4 + [4] * 2
    ours, theirs = (steps("cuda", graphed, batches, capturable=True) for graphed in (True, False))
    torch.testing.assert_close(ours, theirs)


@cuda
def test_expanded_inputs_and_labels():
    """One image and one label for the whole batch, as views of stride 0."""
    model = fusedcnn.FusedSimpleCNN().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fusedcnn.GraphedTrainStep(model, CRITERION, optimizer)
    images = torch.randn(1, 3, 32, 32, device="cuda").expand(4, -1, -1, -1)
    labels = torch.ones(1, dtype=torch.long, device="cuda").expand(4)
    losses = [float(step(images, labels)) for _ in range(12)]
    assert losses[-1] < losses[0]


@cuda
def test_an_optimizer_that_cannot_be_captured_is_refused():
    model = fusedcnn.FusedSimpleCNN().cuda()
    with pytest.raises(ValueError, match="capturable"):
        fusedcnn.GraphedTrainStep(model, CRITERION, torch.optim.Adam(model.parameters()))
