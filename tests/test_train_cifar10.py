"""examples/train_cifar10.py: its data, its files, resuming to the bit, and what bad input gets."""

from __future__ import annotations

import contextlib
import copy
import csv
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fusedcnn
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm", reason="needs pip install 'fusedcnn[examples]'")
pytest.importorskip("matplotlib", reason="needs pip install 'fusedcnn[examples]'")

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_cifar10.py"
sys.path.insert(0, str(EXAMPLE.parent))

import train_cifar10 as example  # noqa: E402

# Four steps an epoch. One thread, since the suite may share its cores.
SMALL = ["--train-images", "60", "--test-images", "30", "--batch-size", "16", "--threads", "1"]


@pytest.fixture(autouse=True)
def _one_thread_and_torch_left_as_found():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the example's main on the CPU; returns (exit status, stdout, stderr)."""

    def call(*arguments: object, pictures: bool = False) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            if not pictures:  # most of a small run's time
                patch.setattr(example, "draw", lambda *_: None)
            status = example.main([*map(str, arguments), "--device", "cpu"])
        return status, *capfd.readouterr()

    return call


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def entries(value, path=()):
    """Every entry of nested dicts and lists, by path, containers before what they hold."""
    yield path, value
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from entries(item, (*path, key))


def assert_same_result(folder: Path, expected: Path) -> None:
    """The checkpoints are equal to the bit, but for times and how many epochs were asked for."""

    def result(path: tuple, value: object) -> object:
        if {"seconds", "images_per_second", "epochs"} & {*path} or isinstance(value, (dict, list)):
            return type(value)
        return value.tolist() if isinstance(value, torch.Tensor) else value

    ours, theirs = ({p: result(p, v) for p, v in entries(load(f))} for f in (folder, expected))
    assert [p for p in {**ours, **theirs} if ours.get(p, ...) != theirs.get(p, ...)] == []


def assert_error(result: tuple[int, str, str], *expected: str, status: int = 2) -> None:
    """One line on stderr, with all that is ``expected``, and for bad input nothing else."""
    code, out, err = result
    assert (code, err.count("\n")) == (status, 1), err
    assert err.startswith("train_cifar10.py: ")
    assert [text for text in expected if text not in err] == [], err
    assert status == 1 or status == 130 or out == ""


def make_batch(path: Path, labels: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(labels))
    records = torch.randint(256, (len(labels), 3073), generator=generator, dtype=torch.uint8)
    records[:, 0] = torch.tensor(labels, dtype=torch.uint8)
    path.write_bytes(records.numpy().tobytes())


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder in CIFAR-10's format: three training batches, numbered past 9."""
    folder = tmp_path / "data"
    folder.mkdir()
    make_batch(folder / "data_batch_1.bin", [0, 1, 2, 3, 4])
    make_batch(folder / "data_batch_2.bin", [5, 6])
    make_batch(folder / "data_batch_10.bin", [7, 8, 9])
    make_batch(folder / "test_batch.bin", [9, 0, 9])
    (folder / "batches.meta.txt").write_text("".join(f"name {i}\n" for i in range(10)) + "\n")
    return folder


# ---- data and the step ---------------------------------------------------------------------------


def test_reads_what_was_written(data):
    (images, labels, _, test_labels), names = example.read_cifar10(data)
    assert labels.tolist() == list(range(10))
    assert test_labels.tolist() == [9, 0, 9]
    assert names == [f"name {i}" for i in range(10)]
    parts = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_10.bin")
    written = b"".join((data / name).read_bytes() for name in parts)
    assert images.shape == (10, 3, 32, 32)
    for i, image in enumerate(images):
        assert image.numpy().tobytes() == written[i * 3073 + 1 : (i + 1) * 3073]
    (data / "batches.meta.txt").unlink()
    assert example.read_cifar10(data)[1][3] == "class 3"


def test_drawn_images_are_balanced_repeatable_and_what_their_labels_say():
    images, labels = example.draw_images(1205, seed=1)
    assert (images.dtype, images.shape) == (torch.uint8, (1205, 3, 32, 32))
    counts = labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    for ours, again in zip((images, labels), example.draw_images(1205, seed=1), strict=True):
        assert torch.equal(ours, again)
    assert not torch.equal(images, example.draw_images(1205, seed=2)[0])
    assert len({image.numpy().tobytes() for image in images}) == 1205
    down, across = (images.float().diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3))
    assert (across > down)[labels == 0].float().mean() > 0.9
    assert (across < down)[labels == 5].float().mean() > 0.9


def test_data_is_described_and_normalised(data):
    settings = {"data": str(data), "train_images": None, "test_images": 2}
    tensors, about = example.load_data(settings)
    assert (about["train"], about["test"], about["class_names"][0]) == (10, 2, "name 0")
    pixels = tensors[0].double()
    std, mean = torch.std_mean(pixels, (0, 2, 3), correction=0, keepdim=True)
    run = example.Run({"model": "stock", "lr": 1.0, "seed": 0}, about, torch.device("cpu"))
    expected = ((pixels - mean) / std).float()
    torch.testing.assert_close(run.normalise(tensors[0]), expected, atol=1e-5, rtol=1e-5)

    assert (
        example.load_data({**settings, "test_images": 1})[1]["fingerprint"] != about["fingerprint"]
    )
    content = bytearray((data / "test_batch.bin").read_bytes())
    content[3073 + 5] ^= 1
    (data / "test_batch.bin").write_bytes(content)
    assert example.load_data(settings)[1]["fingerprint"] != about["fingerprint"]
    for path in data.glob("*.bin"):
        path.write_bytes(bytes(2 * 3073))  # images of one colour
    assert (example.load_data(settings)[1]["std"] == 1).all()


def test_step_is_that_of_the_package():
    torch.manual_seed(0)
    ours = fusedcnn.FusedSimpleCNN().double().eval()
    theirs = copy.deepcopy(ours)
    images, labels = torch.randn(12, 3, 32, 32).double(), torch.randint(10, (12,))
    right = (ours(images).argmax(1) == labels).sum()
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    sums = example.train_step(ours, steps[0], images, labels, 12)
    loss = fusedcnn.train_step(theirs, F.cross_entropy, steps[1], images, labels)
    torch.testing.assert_close(sums, torch.stack([loss * 12, right.double()]))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


# ---- runs ----------------------------------------------------------------------------------------


def test_both_models_train_and_leave_their_files(run, tmp_path):
    states, compare = [], []
    for model in ("stock", "fused"):
        output = tmp_path / "deep" / model
        arguments = [*SMALL, "--model", model, "--epochs", 2, "--output", output, *compare]
        status, out, err = run(*arguments, pictures=True)
        assert (status, err) == (0, "")
        assert out.count("epoch ") == 2
        with open(output / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == example.COLUMNS
        for i, row in enumerate(rows):
            row = {column: float(value) for column, value in row.items()}
            assert row["epoch"] == i + 1
            assert 0 < row["train_loss"] < 5
            assert 0 < row["test_loss"] < 5
            assert round(30 * row["test_accuracy"]) == pytest.approx(30 * row["test_accuracy"])
            assert row["images_per_second"] == pytest.approx(60 / row["seconds"], rel=1e-5)
        for name in ("curves.png", "predictions.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        files = ["checkpoint.pt", "curves.png", "metrics.csv", "predictions.png"]
        assert sorted(path.name for path in output.iterdir()) == files
        states.append(load(output))
        fusedcnn.SimpleCNN().load_state_dict(states[-1]["model"])
        fusedcnn.FusedSimpleCNN().load_state_dict(states[-1]["model"])
        compare = ["--compare", output]
    losses = [[row["train_loss"] for row in state["history"]] for state in states]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pictures_show_both_runs_and_survive_odd_names():
    row = dict.fromkeys(example.COLUMNS, 1.0)
    figure = example.draw_curves([("stock", [row]), ("fused", [row, row])], "$")
    for axes in figure.axes:
        text = " ".join(text.get_text() for text in axes.get_legend().get_texts())
        assert "stock" in text
        assert "fused" in text
    names = ["$x", "a_b", "\\", *"defghij"]
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    logits = 9 * torch.eye(10)[[0, 2, 1]]
    figure = example.draw_predictions(images, torch.tensor([0, 1, 2]), logits, names, "$")
    figure.draw_without_rendering()
    labels = [axes.get_xlabel() for axes in figure.axes[:4]]
    assert labels == ["", "is: a_b", "is: \\", ""]


def test_trains_on_files(run, data, tmp_path):
    output = tmp_path / "out"
    arguments = ["--epochs", 1, "--threads", 1, "--output", output]
    assert run("--data", os.path.relpath(data), *arguments)[0] == 0
    # The folder is known from the checkpoint, and may move.
    assert run("--resume", output, "--epochs", 2)[0] == 0
    moved = data.rename(tmp_path / "moved")
    assert_error(run("--resume", output, "--epochs", 3), "--data", str(data), "No such file")
    assert run("--resume", output, "--epochs", 3, "--data", moved)[0] == 0
    assert load(output)["epoch"] == 3


def test_metrics_are_means_over_the_epoch(run, tmp_path):
    """With a learning rate too small to move a float, every epoch measures one fixed model."""
    run(*SMALL, "--epochs", 1, "--lr", 1e-30, "--output", tmp_path / "a")
    state = load(tmp_path / "a")
    model = fusedcnn.SimpleCNN()
    model.load_state_dict(state["model"])
    (train, _, images, labels), _ = example.load_data(state["settings"])
    std, mean = torch.std_mean(train.float(), (0, 2, 3), correction=0, keepdim=True)
    with torch.no_grad():
        logits = model.eval()((images - mean) / std)
    row = state["history"][0]
    loss = F.cross_entropy(logits, labels).item()
    assert row["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert row["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert row["train_loss"] == pytest.approx(loss, rel=0.05)
    run(*SMALL, "--epochs", 1, "--lr", 1e-30, "--seed", 1, "--output", tmp_path / "b")
    other = load(tmp_path / "b")
    assert other["data"]["fingerprint"] == state["data"]["fingerprint"]
    assert other["history"][0]["test_loss"] != row["test_loss"]


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_resumed_run_equals_uninterrupted_to_the_bit(run, tmp_path, monkeypatch, model):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run(*SMALL, "--model", model, "--epochs", 3, "--output", whole)[0] == 0
    assert run(*SMALL, "--model", model, "--epochs", 1, "--output", pieces)[0] == 0

    # Interrupted in the third step of the second epoch; the checkpoint is of the second.
    steps, train_step = [], example.train_step

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(example, "train_step", interrupted)
        result = run("--resume", pieces, "--epochs", 3, "--checkpoint-steps", 2, "--threads", 1)
    assert_error(result, "interrupted", status=130)
    assert (load(pieces)["epoch"], load(pieces)["step"]) == (1, 2)

    torch.rand(7)  # the state of the generator is the checkpoint's, not the process's
    assert run("--resume", pieces / "checkpoint.pt", "--threads", 1)[0] == 0
    assert_same_result(pieces, whole)


def test_resuming_a_finished_run_only_draws(run, tmp_path):
    run(*SMALL, "--epochs", 1, "--output", tmp_path / "a")
    (tmp_path / "a" / "metrics.csv").rename(tmp_path / "metrics.csv")
    status, out, _ = run("--resume", tmp_path / "a", "--threads", 1, pictures=True)
    assert status == 0
    assert "nothing to train" in out
    assert (tmp_path / "a" / "curves.png").exists()
    assert (tmp_path / "a" / "metrics.csv").read_text() == (tmp_path / "metrics.csv").read_text()


def test_fused_model_continues_a_stock_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_error(run("--resume"), "--resume: ", "runs/drawn-fused-seed0", "No such file")
    assert run(*SMALL, "--model", "stock", "--epochs", 1)[0] == 0
    stock, fused = (tmp_path / "runs" / f"drawn-{model}-seed0" for model in ("stock", "fused"))
    kept = (stock / "checkpoint.pt").read_bytes()
    status, out, _ = run("--model", "fused", "--resume", stock, "--epochs", 2, "--threads", 1)
    assert status == 0
    assert "note: model was stock, is fused" in out
    assert (stock / "checkpoint.pt").read_bytes() == kept
    assert run("--resume", stock, "--epochs", 2, "--threads", 1)[0] == 0
    losses = [[row["train_loss"] for row in load(folder)["history"]] for folder in (stock, fused)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert run("--resume", "--epochs", 3, "--threads", 1)[0] == 0  # without PATH: of --output
    assert load(fused)["epoch"] == 3


def test_changed_settings_are_refused(run, data, tmp_path):
    output = tmp_path / "a"
    run(*SMALL, "--epochs", 1, "--output", output)
    kept = (output / "checkpoint.pt").read_bytes()
    for option, value in (("--lr", 0.5), ("--batch-size", 8), ("--seed", 5)):
        result = run("--resume", output, option, value)
        assert_error(result, f"{option}: expected", str(output), f"got {value}")
    assert_error(run("--resume", output, "--train-images", 61), "--train-images", "60", "61")
    result = run("--resume", output, "--data", data, "--train-images", 10, "--test-images", 3)
    assert_error(result, "--data", "drawn", "CIFAR-10")
    # Nor does a new run take the place of an old one unasked.
    assert_error(run(*SMALL, "--output", output), "--output", "--overwrite", str(output))
    assert (output / "checkpoint.pt").read_bytes() == kept
    assert run(*SMALL, "--output", output, "--overwrite", "--epochs", 1, "--lr", 0.5)[0] == 0
    assert load(output)["settings"]["lr"] == 0.5


# ---- checkpoints that cannot be believed ---------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setattr(example, "draw", lambda *_: None)
        assert example.main([*SMALL, "--epochs", "2", "--output", str(folder)]) == 0
    return folder


def _flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2  # in some tensor
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: None, "No such file"),
        (lambda content: b"", "is no checkpoint, or damaged"),
        (lambda content: b"epoch,loss\n1,2\n", "is no checkpoint, or damaged"),
        (lambda content: content[:-1000], "is no checkpoint, or damaged"),
        (lambda content: content[1000:], "is no checkpoint, or damaged"),
        (_flip_bit, "wrong checksum"),
    ],
)
def test_damaged_files(run, trained, tmp_path, damage, expected):
    path = tmp_path / "checkpoint.pt"
    content = damage((trained / "checkpoint.pt").read_bytes())
    if content is not None:
        path.write_bytes(content)
    assert_error(run("--resume", tmp_path), "--resume: ", str(path), expected)
    assert_error(run("--compare", tmp_path), "--compare: ", str(path), expected)
    assert (path.read_bytes() if path.exists() else None) == content


def change(state: dict, path: tuple, value: object) -> object:
    """A copy with ``value`` in place of an entry, or without it where that is ``...``."""
    if not path:
        return value
    state = copy.copy(state)
    if len(path) == 1 and value is ...:
        del state[path[0]]
    else:
        inner = state[path[0]] if len(path) > 1 else None
        state[path[0]] = change(inner, path[1:], value)
    return state


MOMENT = ("optimizer", "state", 0, "exp_avg")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ((), [1], "a list of 1"),
        ((), fusedcnn.SimpleCNN().state_dict(), "['format']"),
        (("format",), "another", "'another'"),
        (("extra",), Path("x"), "expected tensors and plain values"),
        (("extra",), 1, "to be nothing, got 1"),
        (("optimizer",), ..., "got nothing"),
        (("settings", "batch_size"), 0, "at least 1|from 1 to"),
        (("settings", "lr"), None, "over 0, got None"),
        (("settings", "model"), "foo", "'fused' or 'stock', got 'foo'"),
        (("settings", "data"), 5, "a text, got 5"),
        (("settings", "data"), "a\0b", "--data: cannot read"),
        (("settings", "train_images"), "q", "got 'q'"),
        (("data", "train"), 10**6, "checkpoint['optimizer']['state'][0]['step']"),
        (("data", "fingerprint"), "other", "--train-images"),
        (("history",), [1, 2], "['history'][0]"),
        (("history",), None, "a list, got None"),
        (("history", 1), ..., "['epoch'] to be 1, got 2"),
        (("history", 1, "test_loss"), float("inf"), "got inf"),
        (("epoch",), -2, "to be 2, got -2"),
        (("step",), 5, "['step']"),
        (("loss_sum",), float("nan"), "got nan"),
        (("model", "features.0.weight"), torch.zeros(16, 3, 5, 5), "[16, 3, 3, 3]"),
        (("model", "features.0.bias"), torch.full((16,), float("nan")), "values from nan"),
        (("model", "features.0.bias"), torch.zeros(16).double(), "torch.float64"),
        (MOMENT, torch.ones(1), "[16, 3, 3, 3]"),
        (MOMENT, torch.ones(2, 2), "got a tensor (torch.float32, [2, 2]"),
        (MOMENT, torch.zeros(16, 3, 3, 3, device="meta"), "meta"),
        (MOMENT, torch.zeros(16, 3, 3, 3).to_sparse(), "sparse"),
        (("optimizer", "state"), {}, "['state'][0]"),
        (("optimizer", "state", 0, "exp_avg_sq"), torch.full((16, 3, 3, 3), -1.0), "from -1 to -1"),
        (("optimizer", "state", 0, "step"), torch.tensor(3.0), "values from 8 to 8"),
        (("optimizer", "param_groups", 0, "lr"), None, "to be 0.001, got None"),
        (("optimizer", "param_groups", 0, "betas"), (0.9, 2.0), "['betas']"),
        (("optimizer", "param_groups", 0, "eps"), "small", "got 'small'"),
        (("optimizer", "param_groups", 0, "params"), [0], "a list of 1"),
        (("random", "cpu"), torch.zeros(5056, dtype=torch.uint8), "the state of a CPU generator"),
        (("random", "epoch_start"), torch.zeros(3), "the state of a CPU generator"),
        (("random", "cuda"), torch.zeros(3), "torch.uint8, [16]"),
        (("environment", "threads"), 0, "['threads']"),
        (("environment", "torch"), "a\nb\ud800", "a printable text"),
    ],
    ids=str,
)
def test_wrong_entries(run, trained, tmp_path, path, value, expected):
    torch.save(change(load(trained), path, value), tmp_path / "bad.pt")
    result = run("--resume", tmp_path / "bad.pt", "--epochs", 4, "--output", tmp_path / "out")
    assert_error(result)
    assert any(text in result[2] for text in expected.split("|")), result[2]


def test_moments_get_memory_of_their_own(trained):
    state = load(trained)
    moments = state["optimizer"]["state"]
    moments[0]["exp_avg"] = torch.zeros(1).expand(16, 3, 3, 3)
    moments[1]["exp_avg"] = moments[1]["exp_avg_sq"]
    copied = example.check(state)["optimizer"]["state"]
    assert copied[0]["exp_avg"].untyped_storage().nbytes() == 4 * 16 * 3 * 3 * 3
    assert copied[1]["exp_avg"].data_ptr() != copied[1]["exp_avg_sq"].data_ptr()


def test_generator_states_do_not_lead_out_of_their_words():
    state = torch.get_rng_state()
    assert example.is_generator_state(state)
    state[8:24] = torch.tensor([624, 1, 624, 0], dtype=torch.int32).view(torch.uint8)
    assert not example.is_generator_state(state)


ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**70,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "\ud800\n\0",
    b"x",
    [],
    {},
]
ODD += [
    [1],
    {1: 2},
    (),
    1j,
    torch.zeros(()),
    torch.ones(3),
    torch.zeros(0),
    torch.eye(3).to_sparse(),
]
ODD += [torch.zeros(2, device="meta"), torch.ones(1).expand(9), torch.Size([1]), torch.float32]


def mutated(state: dict, rng: random.Random) -> object:
    """The state with one entry at any depth lost, added, exchanged, or of another type or shape."""
    path, value = rng.choice([*entries(state)])
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        overlapping = torch.zeros((), dtype=value.dtype).expand(value.shape)
        changed = (value[None], value.double(), overlapping, value * 0, value.to("meta"), -value)
        return change(state, path, rng.choice(changed))
    if isinstance(value, dict) and rng.random() < 0.5:
        return change(state, (*path, rng.choice([*value, "new", 1])), rng.choice(ODD))
    other = rng.choice([*entries(state)])[1]
    return change(state, path, rng.choice([..., other, *ODD]) if path else rng.choice(ODD))


def test_mutated_states_are_refused_or_serve(trained):
    """Whatever the check lets through trains on; of the rest it says in a line what is wrong."""
    refusals = []
    for seed in range(400):
        try:
            state = example.check(mutated(load(trained), random.Random(seed)))
        except example.Stop as stop:
            refusals.append(stop.args)
            continue
        run = example.Run(state["settings"], state["data"], torch.device("cpu"))
        run.load_state_dict(state)
        images = torch.rand(16, 3, 32, 32)
        example.train_step(run.model, run.optimizer, images, torch.arange(16) % 10, 16)
        assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert 250 < len(refusals) < 400
    for status, line in refusals:
        assert status == 2
        assert line.startswith("expected checkpoint")
        assert len(line) < 400
        assert line.isprintable()


# ---- kills and full disks ------------------------------------------------------------------------


def test_killed_run_continues_to_the_bit(run, tmp_path):
    """SIGKILL thrice while checkpoints are written after every step, most of the time thus."""
    output = tmp_path / "killed"

    def version() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return (output / "checkpoint.pt").stat().st_mtime_ns

    for kill, arguments in enumerate((SMALL, ["--resume", output], ["--resume"])):
        command = [sys.executable, EXAMPLE, *arguments, "--output", output, "--epochs", 1000]
        command += ["--checkpoint-steps", 1, "--device", "cpu", "--threads", 1]
        before, end = version(), time.monotonic() + 600
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
        try:
            while version() == before:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(0.05 * kill + 0.007)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
        load(output)  # whole

    epochs = load(output)["epoch"] + 1
    assert run("--resume", output, "--epochs", epochs, "--threads", 1)[0] == 0
    assert run(*SMALL, "--epochs", epochs, "--output", tmp_path / "whole")[0] == 0
    assert_same_result(output, tmp_path / "whole")
    assert not list(output.glob(".*"))


def test_write_that_is_killed_or_fails_changes_nothing(tmp_path):
    """Killed half-way through the bytes and before the rename; a file that may not grow so long."""
    pytest.importorskip("resource", reason="needs POSIX resource limits")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = f"""
import os, pathlib, resource, signal, train_cifar10

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(descriptor):
    os.truncate(descriptor, 50_000)
    die()

def write(data):
    train_cifar10.write(pathlib.Path({str(path)!r}), data)

for name, deadly in (("fsync", half), ("replace", die)):
    if (child := os.fork()) == 0:
        setattr(os, name, deadly)
        write(bytes(100_000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
assert len(os.listdir({str(tmp_path)!r})) == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write(bytes(100_000))
except train_cifar10.Stop as stop:
    print(*stop.args)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=EXAMPLE.parent, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"1 --output: cannot write {path}: File too large"), done.stderr
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_full_disk_stops_the_run_and_loses_nothing(run, tmp_path, monkeypatch):
    output, sync, calls = tmp_path / "full", os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 4:  # two files, at the start and after an epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run(*SMALL, "--epochs", 3, "--output", output)
    written = str(output / "checkpoint.pt")
    assert_error(result, "--output", written, "No space left on device", "--resume", status=1)
    assert load(output)["epoch"] == 1
    assert not list(output.glob(".*"))
    assert run("--resume", output, "--threads", 1)[0] == 0
    assert run(*SMALL, "--epochs", 3, "--output", tmp_path / "whole")[0] == 0
    assert_same_result(output, tmp_path / "whole")


@pytest.mark.parametrize("name", ["checkpoint.pt", ".checkpoint.pt.tmp", "curves.png"])
def test_folder_in_a_files_place(run, tmp_path, name):
    (tmp_path / name / "kept").mkdir(parents=True)
    arguments = [*SMALL, "--epochs", 1, "--output", tmp_path, "--overwrite"]
    result = run(*arguments, pictures=True)
    assert_error(
        result, "--output", name.strip(".").removesuffix(".tmp"), "Is a directory", status=1
    )
    assert (tmp_path / name / "kept").exists()


def test_diverging_run_stops(run, tmp_path):
    result = run(*SMALL, "--epochs", 3, "--lr", 1e15, "--output", tmp_path / "a")
    assert_error(result, "the loss is not finite", "--lr", status=1)
    example.check(load(tmp_path / "a"))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epochs 0", "a whole number from 1 to"),
        ("--epochs 1.5", "'1.5'"),
        ("--batch-size 0", "a whole number from 1 to"),
        ("--lr 0", "expected a finite number over 0, got '0'"),
        ("--lr -1e-3", "'-1e-3'"),
        ("--lr nan", "'nan'"),
        ("--seed -1", "a whole number from 0 to"),
        ("--threads 0", "'0'"),
        ("--train-images 10000000000", "to 1000000"),
        ("--model resnet", "expected 'fused' or 'stock', got 'resnet'"),
        ("--device abacus", "'abacus'"),
        ("--device meta", "'meta'"),
        ("--epoch 3", "unrecognized arguments: --epoch"),
        ("extra", "unrecognized arguments: extra"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capfd, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status = example.main(arguments.split())
    assert_error((status, *capfd.readouterr()), arguments.split()[0], expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        ("data_batch_2.bin", lambda path: path.write_bytes(b""), "got 0 bytes"),
        ("data_batch_2.bin", lambda path: os.truncate(path, 6145), "got 6145 bytes"),
        ("data_batch_2.bin", lambda path: make_batch(path, [3, 10]), "got 10"),
        ("data_batch_2.bin", lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        ("test_batch.bin", Path.unlink, "No such file"),
        ("test_batch.bin", lambda path: make_batch(path, [0, 255]), "record 1"),
        ("batches.meta.txt", lambda path: path.write_text("cat\ndog\n"), "got 2"),
        ("batches.meta.txt", lambda path: path.write_bytes(b"\xff\xfe"), "got 1"),
    ],
)
def test_bad_data_files(run, data, tmp_path, file, damage, expected):
    damage(data / file)
    output = tmp_path / "out"
    assert_error(run("--data", data, "--output", output), "--data: ", str(data / file), expected)
    assert not list(output.iterdir())


def test_bad_folders(run, data, tmp_path, monkeypatch):
    output, missing, empty = tmp_path / "out", tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for folder, expected in (
        (missing, "No such file"),
        (data / "test_batch.bin", "Not a directory"),
        (empty, "expected data_batch_*.bin"),
    ):
        assert_error(run("--data", folder, "--output", output), "--data: ", str(folder), expected)
    result = run("--data", data, "--train-images", 11, "--output", output)
    assert_error(result, "--train-images: expected at most 10", str(data), "got 11")
    assert not list(output.iterdir())

    file = tmp_path / "file"
    file.write_text("kept")
    for folder, expected in ((file, "File exists"), (file / "below", "Not a directory")):
        assert_error(run(*SMALL, "--output", folder), "--output: ", str(folder), expected)
    assert file.read_text() == "kept"
    empty.chmod(0o555)
    if not os.access(empty, os.W_OK):  # root may write everywhere
        assert_error(run(*SMALL, "--output", empty), "--output: ", "Permission denied")
        assert_error(run(*SMALL, "--output", empty / "new"), "--output: ", "Permission denied")

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert_error(run(*SMALL, "--output", output), "--output: ", str(output), "No space left")


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_extra_is_named(package):
    """The script itself, as people start it: one line, no traceback, status 2."""
    script = f"import runpy, sys; sys.modules[{package!r}] = None\n"
    script += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    result = done.returncode, done.stdout, done.stderr
    assert_error(result, package, "pip install 'fusedcnn[examples]'")
