"""``python -m fusedcnn bench``: a user's own model before and after fuse."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
from fusedcnn import bench
from fusedcnn.__main__ import main

MODELS = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), nn.LeakyReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(32, classes))

    def forward(self, x):
        return {"logits": self.head(self.features(x).flatten(1)), "count": 3}

class NeedsArguments(Net):
    def __init__(self, classes):
        super().__init__(classes)

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.Sigmoid())

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, scale):
        return self.net(x)["logits"] * scale

def make():
    return Net()

def broken():
    raise ValueError("no such weights\\nin two lines")

class Wrong(nn.Module):
    """The block's results depend on what it is, as a bug would make them."""
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        factor = 1 + any(type(m).__name__ == "ConvReLUMaxPool2d" for m in self.modules())
        return self.net(x)["logits"] * factor

class Detached(Net):
    def forward(self, x):
        return super().forward(x)["logits"].detach()

made = Net()
number = 3
'''


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    (tmp_path / "zoo.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "zoo", raising=False)
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["bench", "--seconds", "0.01", "--threads", "1", *arguments])
    except SystemExit as exit:  # argparse's
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("model", ["zoo:Net", "zoo.py:Net", "zoo:make", "zoo:made"])
def test_a_model_in_evaluation_mode(models, capsys, model):
    status, output, _ = run(capsys, model, "--input", "4,3,24,24")
    assert status == 0
    assert "BatchNorm2d" in output  # folded in evaluation mode
    assert output.count(": fused") == 2
    assert "LeakyReLU" in output  # a near miss has its reason
    assert re.search(r"outputs of both, in float64: \d\.\de-\d+ apart", output)
    assert re.search(r"forward .* us .* us .* \d+\.\d\d", output)
    assert "training step" not in output


def test_training(models, capsys):
    status, output, _ = run(capsys, "zoo:Net", "--input", "4,3,24,24", "--train")
    assert status == 0
    assert output.count(": fused") == 4  # a BatchNorm2d in training mode among them
    assert re.search(r"outputs and gradients of both, in float64: \d\.\de-\d+ apart", output)
    assert re.search(r"training step .* us .* us", output)
    assert re.search(r"kept for the backward .* MB .* MB .* \d+\.\d\d", output)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(models, capsys, dtype):
    status, output, _ = run(capsys, "zoo:Net", "--input", "1,3,24,24", "--dtype", dtype)
    assert status == 0
    assert dtype in output


def test_several_inputs(models, capsys):
    assert run(capsys, "zoo:Two", "--input", "2,3,24,24", "--input", "2,1")[0] == 0


def test_different_results_are_said_and_not_timed(models, capsys):
    status, output, _ = run(capsys, "zoo:Wrong", "--input", "2,3,24,24")
    assert status == 1
    assert "differ" in output
    assert "forward" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zoo", "--input", "1,3,24,24"), "expected package.module:Name"),
        (("zoo:", "--input", "1,3,24,24"), "expected package.module:Name"),
        (("absent:Net", "--input", "1,3,24,24"), "'absent' to import, got ModuleNotFoundError"),
        (("absent.py:Net", "--input", "1,3,24,24"), "an existing file, got 'absent.py'"),
        (("broken.py:Net", "--input", "1,3,24,24"), "got ModuleNotFoundError: No module named"),
        (("exits:Net", "--input", "1,3,24,24"), "got SystemExit"),
        (("zoo:Missing", "--input", "1,3,24,24"), "expected 'Missing' in 'zoo'"),
        (("zoo:number", "--input", "1,3,24,24"), "got int"),
        (("zoo:torch.ones", "--input", "1,3,24,24"), "need no arguments"),
        (("zoo:NeedsArguments", "--input", "1,3,24,24"), "need no arguments, got TypeError"),
        (("zoo:broken", "--input", "1,3,24,24"), "got ValueError: no such weights"),
        (("zoo:Net", "--input", "1,5,24,24"), "model takes, got [1, 5, 24, 24]"),
        (("zoo:Net", "--input", "1,3,2,2"), "model takes, got [1, 3, 2, 2]"),
        (("zoo:Plain", "--input", "1,3,24,24"), "expected something to fuse"),
        (("zoo:Detached", "--input", "1,3,24,24", "--train"), "in float64 too, got Runtime"),
        (("zoo:Net", "--input", "1,x"), "--input"),
        (("zoo:Net", "--input", "1,-3,24,24"), "--input"),
        (("zoo:Net", "--input", "1,3,24,24", "--threads", "0"), "--threads"),
        (("zoo:Net", "--input", "1,3,24,24", "--dtype", "int8"), "--dtype"),
        (("zoo:Net",), "--input"),
    ],
)
def test_bad_input(models, capsys, arguments, message):
    """Exit 2 and one line; argparse puts its usage in front."""
    status, output, errors = run(capsys, *arguments)
    assert status == 2
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not output
    if "usage" not in errors:
        assert len(errors.splitlines()) == 1


def test_the_comparison_sees_a_difference():
    torch.manual_seed(0)
    model = fusedcnn.SimpleCNN().eval()
    other = fusedcnn.SimpleCNN().eval()
    other.load_state_dict(model.state_dict())
    images = [torch.randn(2, 3, 32, 32)]
    assert bench.difference(model, other, images, train=True) == 0
    with torch.no_grad():
        other.features[0].weight[0, 0, 0, 0] += 1e-4
    assert bench.difference(model, other, images, train=False) > bench.TOLERANCE


def test_every_contender_has_a_turn_in_every_round():
    turns = []

    def fail():
        if len(turns) > 22:  # after the estimates
            raise RuntimeError("no more\nof this")

    @contextlib.contextmanager
    def turn(name):
        turns.append(f"{name} begins")
        yield
        turns.append(f"{name} ends")

    steps = {name: (lambda name=name: turns.append(name)) for name in "abc"} | {"d": fail}
    times, errors = bench.time_by_turns(steps, threads=1, seconds=1e-9, rounds=4, turn=turn)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert errors == {"d": "RuntimeError: no more"}
    assert turns.count("d begins") == turns.count("d ends") == 2  # not again after it has failed
    # A turn is one call after two to warm up; the first turns of all only estimate.
    turns = [one for one in turns if not one.startswith("d")][-4 * 15 :]
    rounds = [turns[i : i + 15] for i in range(0, 60, 15)]
    for one in rounds:
        assert sorted(one[::5]) == ["a begins", "b begins", "c begins"]
        for i in range(0, 15, 5):
            name = one[i][0]
            assert one[i : i + 5] == [f"{name} begins", name, name, name, f"{name} ends"]
    assert len({tuple(one) for one in rounds}) > 1  # in other orders


def test_a_slow_machine_ends_early_but_not_before_the_quartiles_mean_something(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "monotonic", lambda: 1000 * next(clock))
    times, _ = bench.time_by_turns({"a": lambda: None}, threads=1, seconds=1e-3, rounds=20)
    assert len(times["a"]) == bench.ENOUGH_ROUNDS


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((), "usage"), (("--help",), "bench"), (("--version",), f"fusedcnn {fusedcnn.__version__}")],
)
def test_help_and_version(arguments, text):
    done = subprocess.run(
        [sys.executable, "-m", "fusedcnn", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert text in done.stdout
