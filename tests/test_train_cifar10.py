"""examples/train_cifar10.py: its data, its files, resuming to the bit, and what bad input gets."""

from __future__ import annotations

import contextlib
import copy
import csv
import errno
import os
import random
import runpy
import shutil
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
FILES = ["checkpoint.pt", "curves.png", "metrics.csv", "predictions.png"]


@pytest.fixture(autouse=True)
def _torch_left_as_found(restore_threads):
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the example's main on the CPU; returns (exit status, stdout, stderr)."""

    def call(*arguments: object, pictures: bool = False) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            if not pictures:  # most of a small run's time
                patch.setattr(example, "draw", lambda *_: None)
            status = example.main([*map(str, arguments), "--threads", "1", "--device", "cpu"])
        return status, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Folders of two epochs of each model, the second with the curves of the first."""
    folders, compare = {}, []
    for model in ("stock", "fused"):
        folders[model] = tmp_path_factory.mktemp("trained") / "deep" / model
        arguments = [*SMALL, "--model", model, "--epochs", "2", "--output", str(folders[model])]
        with contextlib.redirect_stdout(None):
            assert example.main([*arguments, *compare, "--device", "cpu"]) == 0
        compare = ["--compare", str(folders[model])]
    return folders


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


def make_batch(path: Path, labels: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(labels))
    records = torch.randint(256, (len(labels), 3073), generator=generator, dtype=torch.uint8)
    records[:, 0] = torch.tensor(labels, dtype=torch.uint8)
    path.write_bytes(records.numpy().tobytes())


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
    assert status != 2 or out == ""


# ---- data, step, pictures ------------------------------------------------------------------------


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


def test_data_is_described(data):
    settings = {"data": str(data), "train_images": None, "test_images": 2}
    tensors, about = example.load_data(settings)
    assert (about["train_images"], about["test_images"], len(tensors[3])) == (10, 2, 2)
    std, mean = torch.std_mean(tensors[0].double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(about["mean"].view(3).double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(about["std"].view(3).double(), std, rtol=1e-5, atol=0)
    content = bytearray((data / "test_batch.bin").read_bytes())
    content[3073 + 5] ^= 1
    (data / "test_batch.bin").write_bytes(content)
    assert example.load_data(settings)[1]["data"] != about["data"]
    for path in data.glob("*.bin"):
        path.write_bytes(bytes(2 * 3073))  # images of one colour
    assert (example.load_data(settings)[1]["std"] == 1).all()


def test_step_is_that_of_the_package():
    ours = fusedcnn.FusedSimpleCNN().double().eval()
    theirs = copy.deepcopy(ours)
    images, labels = torch.randn(12, 3, 32, 32).double(), torch.randint(10, (12,))
    right = (ours(images).argmax(1) == labels).sum()
    steps = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    sums = example.train_step(ours, steps[0], images, labels, 12)
    loss = fusedcnn.train_step(theirs, F.cross_entropy, steps[1], images, labels)
    torch.testing.assert_close(sums, torch.stack([loss * 12, right.double()]))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_pictures_show_both_runs_and_survive_odd_names():
    row = dict.fromkeys(example.METRICS, 1.0)
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
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == ["", "is: a_b", "is: \\", ""]
    assert [axes.get_title()[:2] for axes in figure.axes[:4]] == ["$x", "\\ ", "a_", ""]


# ---- runs ----------------------------------------------------------------------------------------


def test_both_models_train_alike_and_leave_their_files(trained):
    for folder in trained.values():
        assert sorted(path.name for path in folder.iterdir()) == FILES
        with open(folder / "metrics.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        assert list(rows[0]) == ["epoch", *example.METRICS]
        assert [row["epoch"] for row in rows] == [1, 2]
        for row in rows:
            right = 30 * row["test_accuracy"]
            assert round(right) == pytest.approx(right, abs=1e-4)
            assert row["images_per_second"] == pytest.approx(60 / row["seconds"], rel=1e-5)
        for name in ("curves.png", "predictions.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        for model in (fusedcnn.SimpleCNN(), fusedcnn.FusedSimpleCNN()):
            model.load_state_dict(load(folder)["model"])
    stock, fused = ([r["train_loss"] for r in load(f)["history"]] for f in trained.values())
    assert stock == pytest.approx(fused, rel=1e-4)


def test_metrics_are_means_over_the_epoch(run, tmp_path):
    """With a learning rate too small to move a float, every epoch measures one fixed model."""
    run(*SMALL, "--epochs", 1, "--lr", 1e-30, "--output", tmp_path / "a")
    state, model = load(tmp_path / "a"), fusedcnn.SimpleCNN()
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
    assert torch.equal(other["data"]["mean"], state["data"]["mean"])
    assert other["history"][0]["test_loss"] != row["test_loss"]


def test_data_folder_is_kept_and_may_move(run, data, tmp_path):
    output = tmp_path / "out"
    assert run("--data", os.path.relpath(data), "--epochs", 1, "--output", output)[0] == 0
    assert run("--resume", output, "--epochs", 2)[0] == 0
    moved = data.rename(tmp_path / "moved")
    assert_error(run("--resume", output, "--epochs", 3), "--data", str(data))
    assert run("--resume", output, "--epochs", 3, "--data", moved)[0] == 0
    assert len(load(output)["history"]) == 3


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_resumed_run_equals_uninterrupted_to_the_bit(run, trained, tmp_path, monkeypatch, model):
    """Interrupted in the third step of the second epoch; the checkpoint is of the second."""
    seeds, batches, train_step = [], [], example.train_step

    def interrupted(*arguments):
        seeds.append(torch.initial_seed())
        batches.append(arguments[3].tolist())
        if len(seeds) == 4 + 3:
            raise KeyboardInterrupt
        return train_step(*arguments)

    arguments = [*SMALL, "--model", model, "--epochs", 2, "--checkpoint-steps", 2]
    with monkeypatch.context() as patch:
        patch.setattr(example, "train_step", interrupted)
        result = run(*arguments, "--output", tmp_path)
    assert_error(result, "interrupted", status=130)
    assert (len(load(tmp_path)["history"]), load(tmp_path)["step"]) == (1, 2)
    assert len({*seeds}) == len(seeds)  # each step has dropout masks of its own
    assert batches[:3] != batches[4:]  # and each epoch an order
    torch.rand(7)  # no mask depends on the process's own generator
    assert run("--resume", tmp_path / "checkpoint.pt")[0] == 0
    assert_same_result(tmp_path, trained[model])


def test_resuming_a_finished_run_only_draws(run, trained, tmp_path):
    for name in ("checkpoint.pt", "metrics.csv"):
        shutil.copy(trained["fused"] / name, tmp_path)
    metrics = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_text("lost")
    status, out, _ = run("--resume", tmp_path, pictures=True)
    assert status == 0
    assert "nothing to train" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert (tmp_path / "metrics.csv").read_bytes() == metrics


def test_fused_model_continues_a_stock_checkpoint(run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_error(run("--resume"), "--resume: ", "runs/drawn-fused-seed0", "No such file")
    stock, fused = (tmp_path / "runs" / f"drawn-{model}-seed0" for model in ("stock", "fused"))
    shutil.copytree(trained["stock"], stock)
    kept = (stock / "checkpoint.pt").read_bytes()
    status, out, _ = run("--model", "fused", "--resume", stock, "--epochs", 3)
    assert status == 0
    assert "note: was 'SimpleCNN on cpu" in out
    assert (stock / "checkpoint.pt").read_bytes() == kept
    status, out, _ = run("--resume", stock, "--epochs", 3)
    assert status == 0
    assert "note" not in out
    losses = [[row["train_loss"] for row in load(folder)["history"]] for folder in (stock, fused)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert run("--resume", "--epochs", 4)[0] == 0  # without PATH: of --output
    assert len(load(fused)["history"]) == 4


def test_changed_settings_are_refused_and_a_run_is_replaced_only_on_demand(
    run, trained, data, tmp_path
):
    output = tmp_path / "a"
    shutil.copytree(trained["fused"], output)
    kept = {path.name: path.read_bytes() for path in output.iterdir()}
    for option, then, now in (
        ("--lr", "0.001", 0.5),
        ("--batch-size", "16", 8),
        ("--seed", "0", 5),
        ("--train-images", "60", 61),
    ):
        result = run("--resume", output, option, now)
        assert_error(result, f"expected {option} {then} ", str(output), f"got {now}")
    make_batch(data / "data_batch_1.bin", [0] * 60)
    make_batch(data / "test_batch.bin", [0] * 30)
    assert_error(run("--resume", output, "--data", data), "--data drawn", "got files")
    assert_error(run(*SMALL, "--output", output), "--output", "--overwrite", str(output))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == kept
    assert run(*SMALL, "--output", output, "--overwrite", "--epochs", 1, "--lr", 0.5)[0] == 0
    assert load(output)["settings"]["lr"] == 0.5
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint.pt", "metrics.csv"]


# ---- checkpoints that cannot be believed ---------------------------------------------------------


def _flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2  # in some tensor
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: b"", "not a zip file"),
        (lambda content: content[:-1000], "not a zip file"),
        (lambda content: content[1000:], ""),
        (_flip_bit, "wrong checksum"),
    ],
)
def test_damaged_files(run, trained, tmp_path, damage, expected):
    path = tmp_path / "checkpoint.pt"
    content = damage((trained["fused"] / "checkpoint.pt").read_bytes())
    path.write_bytes(content)
    assert_error(run("--resume", tmp_path), "--resume: ", str(path), expected)
    assert_error(run("--compare", tmp_path), "--compare: ", str(path), expected)
    assert path.read_bytes() == content


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
        ((), fusedcnn.SimpleCNN().state_dict(), "expected the format"),
        (("format",), "another", "'another'"),
        (("extra",), Path("x"), "expected tensors and plain values"),
        (("optimizer",), ..., "optimizer"),
        (("settings", "batch_size"), 0, "--batch-size"),
        (("settings", "data"), "a\0b", "--data: "),
        (("data", "data"), "other", "expected --data other"),
        (("history",), None, "NoneType"),
        (("history", 1, "test_loss"), float("inf"), "inf"),
        (("step",), 5, "expected step 0 to 4 of an epoch, got 5"),
        (("step",), -1, "got -1"),
        (("sums",), torch.full((2,), float("nan")), "nan"),
        (("model", "features.0.weight"), torch.zeros(16, 3, 5, 5), "[16, 3, 3, 3]"),
        (("model", "features.0.bias"), torch.full((16,), float("nan")), "['features.0.bias']"),
        (("model", "features.0.bias"), torch.zeros(16).double(), "torch.float64"),
        (MOMENT, torch.ones(1), "[16, 3, 3, 3]"),
        (MOMENT, torch.zeros(16, 3, 3, 3, device="meta"), "meta"),
    ],
    ids=str,
)
def test_wrong_entries(run, trained, tmp_path, path, value, expected):
    torch.save(change(load(trained["fused"]), path, value), tmp_path / "bad.pt")
    result = run("--resume", tmp_path / "bad.pt", "--epochs", 4, "--output", tmp_path / "out")
    assert_error(result, expected)


ODD = [None, True, -1, 0, 3, 2**70, -0.5, float("nan"), float("inf"), "", "\ud800\n\0", b"x", []]
ODD += [{}, [1], {1: 2}, (), 1j, torch.zeros(()), torch.ones(3), torch.eye(3).to_sparse()]
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


def test_mutated_checkpoints_are_refused_or_serve(run, trained, tmp_path):
    """Whatever is taken trains on, or stops as divergence; of the rest one line says what is."""
    statuses = []
    for seed in range(80):
        torch.save(mutated(load(trained["fused"]), random.Random(seed)), tmp_path / "m.pt")
        result = run("--resume", tmp_path / "m.pt", "--epochs", 3, "--output", tmp_path / f"{seed}")
        statuses.append(result[0])
        if result[0]:
            assert_error(result, status=result[0])
            assert len(result[2]) < 700
    assert statuses.count(2) > 40
    assert statuses.count(0) > 8
    assert statuses.count(1) < 5


def test_loaded_moments_have_memory_of_their_own(trained):
    state = load(trained["fused"])
    moments = state["optimizer"]["state"]
    moments[0]["exp_avg"] = torch.zeros(1).expand(16, 3, 3, 3)
    moments[1]["exp_avg"] = moments[1]["exp_avg_sq"]
    resumed = example.Run(state["settings"], state["data"], torch.device("cpu"))
    resumed.load_state_dict(state)
    first, second = [*resumed.optimizer.state.values()][:2]
    assert first["exp_avg"].untyped_storage().nbytes() == 4 * 16 * 3 * 3 * 3
    assert second["exp_avg"].data_ptr() != second["exp_avg_sq"].data_ptr()


# ---- kills and full disks ------------------------------------------------------------------------


def test_killed_run_continues_to_the_bit(run, tmp_path):
    """SIGKILL while checkpoints are written after every step, most of the time thus."""
    output = tmp_path / "killed"
    command = [sys.executable, EXAMPLE, *SMALL, "--output", output, "--epochs", 1000]
    command += ["--checkpoint-steps", 1, "--device", "cpu"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 600
        while not (output / "metrics.csv").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    epochs = len(load(output)["history"]) + 1  # whole
    for name in ("checkpoint.pt", "metrics.csv"):
        (output / f".{name}.tmp").write_text("what a kill leaves")
    assert run("--resume", output, "--epochs", epochs)[0] == 0
    assert run(*SMALL, "--epochs", epochs, "--output", tmp_path / "whole")[0] == 0
    assert_same_result(output, tmp_path / "whole")
    assert not list(output.glob(".*"))


def _no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("name", "allowed"), [("fsync", 3), ("fsync", 4), ("replace", 4)])
def test_full_disk_stops_the_run_and_loses_nothing(
    run, trained, tmp_path, monkeypatch, name, allowed
):
    """Two files are written at the start and after each epoch: the third is the checkpoint."""
    calls, real = [], getattr(os, name)

    def full(*arguments):
        calls.append(1)
        return (_no_space if len(calls) > allowed else real)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        result = run(*SMALL, "--epochs", 2, "--output", tmp_path)
    file = tmp_path / ("metrics.csv" if allowed == 3 else "checkpoint.pt")
    assert_error(result, "--output", str(file), "No space left", "--resume", status=1)
    assert len(load(tmp_path)["history"]) == 1
    assert not list(tmp_path.glob(".*"))
    assert run("--resume", tmp_path)[0] == 0
    assert_same_result(tmp_path, trained["fused"])


def test_diverging_run_stops(run, tmp_path):
    result = run(*SMALL, "--epochs", 3, "--lr", 1e15, "--output", tmp_path)
    assert_error(result, "the loss is not finite", "--lr", status=1)
    assert run("--resume", tmp_path, "--epochs", 1)[0] in (0, 1)  # the checkpoint is whole


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epochs 0", "int (1 to"),
        ("--epochs 1.5", "'1.5'"),
        ("--batch-size 0", "'0'"),
        ("--lr 0", "float (1e-300 to"),
        ("--lr nan", "'nan'"),
        ("--seed -1", "'-1'"),
        ("--threads 0", "'0'"),
        ("--train-images 10000000000", "to 1000000"),
        ("--model resnet", "'resnet'"),
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
        ("data_batch_2.bin", lambda path: make_batch(path, [3, 10]), "record 1"),
        ("data_batch_2.bin", lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        ("test_batch.bin", Path.unlink, "No such file"),
        ("batches.meta.txt", lambda path: path.write_bytes(b"\xff\xfe"), "got 1"),
        ("", lambda path: path.rename(path.with_name("moved")), "got none"),
    ],
)
def test_bad_data_files(run, data, tmp_path, file, damage, expected):
    damage(data / file)
    output = tmp_path / "out"
    assert_error(run("--data", data, "--output", output), "--data: ", str(data / file), expected)
    assert not list(output.iterdir())


def test_more_images_than_there_are(run, data, tmp_path):
    result = run("--data", data, "--train-images", 11, "--output", tmp_path / "out")
    assert_error(result, "--train-images: expected at most 10", str(data), "got 11")


@pytest.mark.parametrize("name", ["checkpoint.pt", ".checkpoint.pt.tmp", "curves.png"])
def test_folder_in_a_files_place(run, tmp_path, name):
    (tmp_path / name / "kept").mkdir(parents=True)
    result = run(*SMALL, "--output", tmp_path, "--overwrite")
    assert_error(result, "--output", name.removeprefix(".").removesuffix(".tmp"), "directory")
    assert (tmp_path / name / "kept").exists()


def test_unwritable_output(run, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("kept")
    for folder, expected in ((file, "File exists"), (file / "below", "Not a directory")):
        assert_error(run(*SMALL, "--output", folder), "--output: ", str(folder), expected)
    assert file.read_text() == "kept"
    (tmp_path / "closed").mkdir(0o555)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        for folder in (tmp_path / "closed", tmp_path / "closed" / "new"):
            assert_error(run(*SMALL, "--output", folder), "--output: ", "Permission denied")
    monkeypatch.setattr(os, "fsync", _no_space)
    assert_error(run(*SMALL, "--output", tmp_path / "full"), "--output: ", "No space left")


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_extra_is_named(package, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    result = stop.value.code, *capfd.readouterr()
    assert_error(result, package, "pip install 'fusedcnn[examples]'")
