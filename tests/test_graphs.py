"""GraphedTrainStep: on the CPU the same as train_step, on CUDA a graph with the same results."""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
from torch import nn

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def steps(device: str, graphed: bool, batches: list[int], **options) -> tuple[list, list]:
    """Losses and final parameters of a few steps, from the same start."""
    torch.manual_seed(1)
    model = fusedcnn.FusedSimpleCNN().to(device)
    model.eval()  # without dropout, whose draws differ between graphs and eager steps
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, **options)
    criterion = nn.CrossEntropyLoss()
    step = fusedcnn.GraphedTrainStep(model, criterion, optimizer)
    losses = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        inputs = torch.randn(batch, 3, 32, 32).to(device)
        labels = torch.randint(10, (batch,)).to(device)
        if graphed:
            losses.append(step(inputs, labels))
        else:
            losses.append(fusedcnn.train_step(model, criterion, optimizer, inputs, labels))
    return [loss.item() for loss in losses], [p.detach().cpu() for p in model.parameters()]


def test_the_same_as_train_step_on_the_cpu():
    ours = steps("cpu", True, [4, 4, 3])
    theirs = steps("cpu", False, [4, 4, 3])
    assert ours[0] == theirs[0]
    assert len(set(ours[0])) == 3
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(mine, other)


def test_training_mode_draws_the_same_numbers_on_the_cpu():
    losses = []
    for graphed in (True, False):
        torch.manual_seed(2)
        model = fusedcnn.FusedSimpleCNN()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        inputs, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        criterion = nn.CrossEntropyLoss()
        if graphed:
            step = fusedcnn.GraphedTrainStep(model, criterion, optimizer)
            losses.append(step(inputs, labels))
        else:
            losses.append(fusedcnn.train_step(model, criterion, optimizer, inputs, labels))
        assert not losses[-1].requires_grad
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_is_refused_on_the_cpu():
    model = fusedcnn.FusedSimpleCNN()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fusedcnn.GraphedTrainStep(model, nn.CrossEntropyLoss(reduction="none"), optimizer)
    with pytest.raises(RuntimeError, match="criterion: expected a 0-d loss"):
        step(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_parameters_on_several_devices_or_none():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(ValueError, match="model: expected parameters on one device, got none"):
        fusedcnn.GraphedTrainStep(nn.ReLU(), nn.MSELoss(), optimizer)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    with pytest.raises(ValueError, match="got cpu, meta"):
        fusedcnn.GraphedTrainStep(model, nn.MSELoss(), optimizer)


def test_wrong_types_are_named_at_construction():
    model, criterion = nn.Linear(1, 1), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        fusedcnn.GraphedTrainStep(lambda images: images, criterion, optimizer)
    with pytest.raises(TypeError, match="criterion: expected a callable, got NoneType"):
        fusedcnn.GraphedTrainStep(model, None, optimizer)
    with pytest.raises(TypeError, match="optimizer: expected an instance, got the class SGD"):
        fusedcnn.GraphedTrainStep(model, criterion, torch.optim.SGD)


def test_an_optimizer_that_cannot_be_captured_is_named():
    """The check itself, which __init__ makes for models on CUDA."""
    parameters = list(nn.Linear(1, 1).parameters())
    check = fusedcnn.graphs._check_capturable
    with pytest.raises(ValueError, match="optimizer: expected capturable=True, got a Adam"):
        check(torch.optim.Adam(parameters))
    check(torch.optim.SGD(parameters, 0.1))


@pytest.mark.cuda
@needs_cuda
def test_graphs_give_the_same_as_eager_steps():
    """Through warm-up, recording, replays, a second shape, and back to the first."""
    batches = [4] * 6 + [3] * 4 + [4] * 2
    ours = steps("cuda", True, batches, capturable=True)
    theirs = steps("cuda", False, batches, capturable=True)
    torch.testing.assert_close(ours[0], theirs[0])
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.cuda
@needs_cuda
def test_expanded_inputs_and_labels():
    """One image and one label for the whole batch, as views of stride 0."""
    model = fusedcnn.FusedSimpleCNN().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fusedcnn.GraphedTrainStep(model, nn.CrossEntropyLoss(), optimizer)
    images = torch.randn(1, 3, 32, 32, device="cuda").expand(4, -1, -1, -1)
    labels = torch.ones(1, dtype=torch.long, device="cuda").expand(4)
    losses = [float(step(images, labels)) for _ in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.cuda
@needs_cuda
def test_an_optimizer_that_cannot_be_captured_is_refused():
    model = fusedcnn.FusedSimpleCNN().cuda()
    with pytest.raises(ValueError, match="capturable"):
        fusedcnn.GraphedTrainStep(
            model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
        )
