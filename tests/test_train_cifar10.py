"""examples/train_cifar10.py: its data, its files, resuming to the bit, and what bad input gets."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib
import os
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

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import atomic  # noqa: E402
import checkpoints  # noqa: E402
import cifar10  # noqa: E402
import train_cifar10  # noqa: E402

# Four steps an epoch. One thread, since the suite may share its cores.
SMALL = ["--train-images", "60", "--test-images", "30", "--batch-size", "16", "--threads", "1"]
TIMES = ("seconds", "images_per_second")


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
                patch.setattr(train_cifar10, "draw", lambda *_: None)
            status = train_cifar10.main([*map(str, arguments), "--device", "cpu"])
        return status, *capfd.readouterr()

    return call


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flatten(value, prefix=""):
    """Every leaf of nested dicts and lists, by path, but for the times."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in TIMES}.items()
    elif isinstance(value, list):
        value = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in value:
        yield from flatten(item, f"{prefix}/{key}")


def assert_same_result(folder: Path, expected: Path) -> None:
    """The checkpoints are equal to the bit, but for times and the settings of other lengths."""
    ours, theirs = (
        {k: v for k, v in flatten(load(f)) if not k.startswith("/settings/")}
        for f in (folder, expected)
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key


def assert_error(result: tuple[int, str, str], *expected: str, status: int = 2) -> None:
    """One line on stderr, with all that is ``expected``, and nothing else."""
    code, out, err = result
    assert code == status
    assert err.count("\n") == 1
    assert err.startswith("train_cifar10.py: ")
    for text in expected:
        assert text in err
    if status == 2:
        assert out == ""


def make_batch(path: Path, labels: list[int], seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    records = torch.randint(
        256, (len(labels), cifar10.RECORD_BYTES), generator=generator, dtype=torch.uint8
    )
    records[:, 0] = torch.tensor(labels, dtype=torch.uint8)
    path.write_bytes(records.numpy().tobytes())
    return path.read_bytes()


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder in CIFAR-10's format: three training batches, numbered past 9."""
    folder = tmp_path / "data"
    folder.mkdir()
    make_batch(folder / "data_batch_1.bin", [0, 1, 2, 3, 4], seed=1)
    make_batch(folder / "data_batch_2.bin", [5, 6], seed=2)
    make_batch(folder / "data_batch_10.bin", [7, 8, 9], seed=10)
    make_batch(folder / "test_batch.bin", [9, 0, 9], seed=3)
    (folder / "batches.meta.txt").write_text("".join(f"name {i}\n" for i in range(10)) + "\n")
    return folder


# ---- data ----------------------------------------------------------------------------------------


def test_reads_what_was_written(data):
    dataset = cifar10.read_cifar10(data)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.test.labels.tolist() == [9, 0, 9]
    assert dataset.class_names == [f"name {i}" for i in range(10)]
    names = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_10.bin")
    written = b"".join((data / name).read_bytes() for name in names)
    assert dataset.train.images.shape == (10, 3, 32, 32)
    for i, image in enumerate(dataset.train.images):
        start = i * 3073 + 1
        assert image.numpy().tobytes() == written[start : start + 3072]
    # Record 0, green, row 5, column 7, by the format's description.
    assert dataset.train.images[0, 1, 5, 7] == written[1 + 1024 + 5 * 32 + 7]


def test_class_names_may_be_missing(data):
    (data / "batches.meta.txt").unlink()
    assert cifar10.read_cifar10(data).class_names[3] == "class 3"


def test_fingerprint_tells_images_apart(data):
    before = cifar10.read_cifar10(data)
    assert before.fingerprint == cifar10.read_cifar10(data).fingerprint
    assert before.fingerprint != before.first(9, 3).fingerprint
    content = bytearray((data / "test_batch.bin").read_bytes())
    content[-1] ^= 1
    (data / "test_batch.bin").write_bytes(content)
    assert before.fingerprint != cifar10.read_cifar10(data).fingerprint


def test_drawn_images_are_balanced_and_repeatable():
    images, labels = cifar10.draw_images(1205, seed=1)
    assert images.shape == (1205, 3, 32, 32)
    assert images.dtype == torch.uint8
    counts = labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(labels, labels.sort().values)
    again = cifar10.draw_images(1205, seed=1)
    assert torch.equal(images, again.images)
    assert torch.equal(labels, again.labels)
    assert not torch.equal(images, cifar10.draw_images(1205, seed=2).images)
    assert len({image.numpy().tobytes() for image in images}) == 1205


def test_drawn_labels_say_what_is_drawn():
    images, labels = cifar10.draw_images(1000, seed=3)
    names = list(cifar10.FIGURES)
    pixels = images.float()
    down = pixels.diff(dim=2).abs().mean((1, 2, 3))
    across = pixels.diff(dim=3).abs().mean((1, 2, 3))
    for name, right in (("level stripes", down > across), ("upright stripes", across > down)):
        assert right[labels == names.index(name)].float().mean() > 0.8
    # The one figure with a hole: where it has one, discs are filled.
    points = torch.tensor([0.0])
    assert cifar10.FIGURES["disc"](points, points) < 0 < cifar10.FIGURES["ring"](points, points)


def test_batches_are_normalised():
    drawn = cifar10.draw_images(200, seed=1)
    mean, std = cifar10.channel_statistics(drawn.images)
    pixels = drawn.images.double()
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0).float())
    batches = cifar10.Batches(drawn, mean, std, torch.device("cpu"))
    index = torch.randperm(200)
    images, labels = batches.gather(index)
    assert torch.equal(labels, drawn.labels[index])
    expected = (pixels[index] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(images, expected.float(), atol=1e-5, rtol=1e-5)


def test_images_of_one_colour_stay_finite():
    plain = cifar10.Images(torch.full((4, 3, 32, 32), 7, dtype=torch.uint8), torch.arange(4))
    mean, std = cifar10.channel_statistics(plain.images)
    batches = cifar10.Batches(plain, mean, std, torch.device("cpu"))
    assert (batches.gather(torch.arange(4))[0] == 0).all()


def test_counting_criterion_adds_up():
    criterion = train_cifar10.CountingCrossEntropy(torch.device("cpu"))
    logits = torch.randn(12, 10)
    labels = logits.argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    parts = [(logits[:8], labels[:8]), (logits[8:], labels[8:])]
    for part in parts:
        assert torch.equal(criterion(*part), F.cross_entropy(*part))
    assert criterion.correct == 7
    torch.testing.assert_close(criterion.loss_sum, F.cross_entropy(logits, labels, reduction="sum"))


# ---- runs ----------------------------------------------------------------------------------------


def test_both_models_train_and_leave_their_files(run, tmp_path):
    for model in ("fused", "stock"):
        output = tmp_path / "deep" / model
        arguments = [*SMALL, "--model", model, "--epochs", 2, "--output", output]
        status, out, err = run(*arguments, pictures=True)
        assert (status, err) == (0, "")
        assert out.count("epoch ") == 2
        with open(output / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == train_cifar10.COLUMNS
        assert [row["epoch"] for row in rows] == ["1", "2"]
        for row in rows:
            assert 0 < float(row["train_loss"]) < 5
            assert 0 < float(row["test_loss"]) < 5
            assert 0 <= float(row["train_accuracy"]) <= 1
            assert 0 <= float(row["test_accuracy"]) <= 1
            assert float(row["images_per_second"]) == pytest.approx(
                60 / float(row["seconds"]), rel=1e-5
            )
        for name in ("curves.png", "predictions.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert sorted(path.name for path in output.iterdir()) == [
            "checkpoint.pt", "curves.png", "metrics.csv", "predictions.png",
        ]  # fmt: skip
        weights = load(output)["model"]
        fusedcnn.SimpleCNN().load_state_dict(weights)
        fusedcnn.FusedSimpleCNN().load_state_dict(weights)
    fused, stock = (load(tmp_path / "deep" / model)["history"] for model in ("fused", "stock"))
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_trains_on_files(run, data, tmp_path):
    output = tmp_path / "out"
    result = run("--data", data, "--epochs", 1, "--threads", 1, "--output", output)
    assert result[0] == 0
    state = load(output)
    assert state["data"]["class_names"][0] == "name 0"
    assert (state["data"]["train"], state["data"]["test"]) == (10, 3)
    # The folder is known from the checkpoint, wherever the next run is started.
    assert run("--resume", output, "--epochs", 2)[0] == 0
    assert load(output)["epoch"] == 2


def test_metrics_are_means_over_the_epoch(run, tmp_path):
    """With a learning rate too small to move a float, every epoch measures one fixed model."""
    run(*SMALL, "--epochs", 1, "--lr", 1e-30, "--output", tmp_path / "a")
    state = load(tmp_path / "a")
    model = fusedcnn.SimpleCNN()
    model.load_state_dict(state["model"])
    dataset = cifar10.draw_dataset(60, 30)
    mean, std = cifar10.channel_statistics(dataset.train.images)
    images = (dataset.test.images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        logits = model.eval()(images)
    row = state["history"][0]
    loss = F.cross_entropy(logits, dataset.test.labels).item()
    assert row["test_loss"] == pytest.approx(loss, rel=1e-4)
    right = (logits.argmax(1) == dataset.test.labels).float().mean().item()
    assert row["test_accuracy"] == pytest.approx(right, abs=1e-6)
    assert row["train_loss"] == pytest.approx(loss, rel=0.05)


def test_seeds_matter(run, tmp_path):
    for seed in (0, 1):
        run(*SMALL, "--epochs", 1, "--seed", seed, "--output", tmp_path / str(seed))
    first, second = (load(tmp_path / str(seed)) for seed in (0, 1))
    assert first["data"]["fingerprint"] == second["data"]["fingerprint"]
    assert first["history"][0]["train_loss"] != second["history"][0]["train_loss"]


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["fused", "stock"])
def test_resumed_run_equals_uninterrupted_to_the_bit(run, tmp_path, monkeypatch, model):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run(*SMALL, "--model", model, "--epochs", 3, "--output", whole)[0] == 0
    assert run(*SMALL, "--model", model, "--epochs", 1, "--output", pieces)[0] == 0

    # Interrupted in the third step of the second epoch; the checkpoint is of the second.
    steps = []
    train_step = fusedcnn.train_step

    def interrupted_train_step(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fusedcnn, "train_step", interrupted_train_step)
        result = run("--resume", pieces, "--epochs", 3, "--checkpoint-steps", 2, "--threads", 1)
    assert_error(result, "interrupted", status=130)
    assert (load(pieces)["epoch"], load(pieces)["step"]) == (1, 2)

    torch.rand(7)  # the state of the generator is the checkpoint's, not the process's
    assert run("--resume", pieces / "checkpoint.pt", "--threads", 1)[0] == 0
    assert_same_result(pieces, whole)
    table = [(f / "metrics.csv").read_text().splitlines() for f in (pieces, whole)]
    ours, theirs = ([row.split(",")[:-2] for row in rows] for rows in table)
    assert ours == theirs


def test_resuming_a_finished_run_only_draws(run, tmp_path):
    run(*SMALL, "--epochs", 1, "--output", tmp_path / "a")
    before = load(tmp_path / "a")
    (tmp_path / "a" / "metrics.csv").unlink()
    status, out, _ = run("--resume", tmp_path / "a", "--threads", 1, pictures=True)
    assert status == 0
    assert "nothing to train" in out
    assert (tmp_path / "a" / "curves.png").exists()
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) == 2
    assert dict(flatten(before)).keys() == dict(flatten(load(tmp_path / "a"))).keys()
    assert load(tmp_path / "a")["epoch"] == 1


def test_fused_model_continues_a_stock_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--model", "stock", "--epochs", 1)[0] == 0
    stock = tmp_path / "runs" / "drawn-stock-seed0"
    kept = (stock / "checkpoint.pt").read_bytes()
    status, out, _ = run("--model", "fused", "--resume", stock, "--epochs", 2, "--threads", 1)
    assert status == 0
    assert "note: model was stock, is fused" in out
    assert (stock / "checkpoint.pt").read_bytes() == kept
    fused = load(tmp_path / "runs" / "drawn-fused-seed0")
    assert fused["history"][0] == load(stock)["history"][0]
    assert fused["settings"]["model"] == "fused"
    assert run("--resume", stock, "--epochs", 2, "--threads", 1)[0] == 0
    assert fused["history"][1]["train_loss"] == pytest.approx(
        load(stock)["history"][1]["train_loss"], rel=1e-4
    )


def test_changed_settings_are_refused(run, data, tmp_path):
    output = tmp_path / "a"
    run(*SMALL, "--epochs", 1, "--output", output)
    kept = (output / "checkpoint.pt").read_bytes()
    for option, value in (("--lr", 0.5), ("--batch-size", 8), ("--seed", 5)):
        result = run("--resume", output, option, value)
        assert_error(result, f"{option}: expected", str(output), f"got {value}")
    assert_error(run("--resume", output, "--train-images", 61), "--train-images", "60", "61")
    assert_error(
        run("--resume", output, "--data", data, "--train-images", 10, "--test-images", 3),
        "--data",
        "drawn",
        "CIFAR-10",
    )
    # Nor does a new run take the place of an old one unasked.
    assert_error(run(*SMALL, "--output", output), "--output", "--overwrite", str(output))
    assert (output / "checkpoint.pt").read_bytes() == kept
    assert run(*SMALL, "--output", output, "--overwrite", "--epochs", 1, "--lr", 0.5)[0] == 0
    assert load(output)["settings"]["lr"] == 0.5


def _bare_weights(path: Path) -> None:
    torch.save(fusedcnn.SimpleCNN().state_dict(), path)


def _flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16  # in some tensor
    path.write_bytes(content)


def _missing_part(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["optimizer"]
    torch.save(state, path)


def _other_shapes(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["model"]["features.0.weight"] = torch.zeros(16, 3, 5, 5)
    torch.save(state, path)


def _other_class(path: Path) -> None:
    torch.save({"path": Path("x")}, path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b""), "is no checkpoint, or damaged"),
        (lambda path: path.write_bytes(b"epoch,loss\n1,2\n"), "is no checkpoint, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is no checkpoint, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[1000:]), "is no checkpoint, or damaged"),
        (_flipped_bit, "wrong checksum"),
        (_bare_weights, "expected a checkpoint of format"),
        (_missing_part, "expected 'optimizer' to be a dict, got nothing"),
        (_other_shapes, "does not fit"),
        (_other_class, "expected tensors and plain values"),
    ],
    ids=lambda value: None if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_unusable_checkpoints(run, tmp_path, damage, expected):
    # The first checkpoint of a run, written before the first step.
    settings = train_cifar10.Settings(train_images=60, test_images=30)
    about = {"fingerprint": cifar10.draw_dataset(60, 30).fingerprint}
    first = train_cifar10.Run(settings, about, torch.device("cpu"))
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, first.state_dict())
    damage(path)
    content = path.read_bytes() if path.exists() else None
    assert_error(run("--resume", tmp_path), "--resume: ", str(path), expected)
    assert (path.read_bytes() if path.exists() else None) == content


def test_bare_resume_takes_the_output_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_error(run("--resume"), "--resume: ", "runs/drawn-fused-seed0", "No such file")
    assert run(*SMALL, "--epochs", 1)[0] == 0
    assert run("--resume", "--epochs", 2, "--threads", 1)[0] == 0
    assert load(tmp_path / "runs" / "drawn-fused-seed0")["epoch"] == 2


# ---- kills and full disks ------------------------------------------------------------------------


def _wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_run_continues_to_the_bit(run, tmp_path):
    """SIGKILL thrice while checkpoints are written after every step, most of the time thus."""
    output = tmp_path / "killed"
    path = output / "checkpoint.pt"

    def version() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime_ns

    start = [*SMALL, "--output", str(output)]
    for writes, arguments in enumerate((start, ["--resume", str(output)], ["--resume"])):
        command = [sys.executable, EXAMPLES / "train_cifar10.py", *arguments, "--epochs", "1000"]
        command += ["--checkpoint-steps", "1", "--device", "cpu", "--threads", "1"]
        command += [] if writes == 1 else ["--output", str(output)]
        before = version()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                _wait_for(lambda before=before: version() != before, process)
                time.sleep(0.05 * writes + 0.007)
            finally:
                process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        load(output)  # whole

    epochs = load(output)["epoch"] + 1
    assert run("--resume", output, "--epochs", epochs, "--threads", 1)[0] == 0
    assert run(*SMALL, "--epochs", epochs, "--output", tmp_path / "whole")[0] == 0
    assert_same_result(output, tmp_path / "whole")
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    ("at", "survivor"),
    [("write", b"old"), ("fsync", b"old"), ("replace", b"old"), ("open", b"new")],
)
def test_kill_within_a_write_leaves_a_whole_file(tmp_path, at, survivor):
    """Killed half-way through the bytes, before and after the rename."""
    (tmp_path / "file").write_bytes(b"old")
    script = f"""
import atomic, builtins, os, pathlib, signal

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

if {at!r} == "write":
    def half(path, mode, open=open):
        file = open(path, mode, buffering=0)
        class Half:
            def __enter__(self): return self
            def __exit__(self, *args): file.close()
            def write(self, data): file.write(data[:1]), die()
        return Half()
    builtins.open = half
else:  # os.open comes after the rename, for the folder
    setattr(os, {at!r}, die)
atomic.write_atomically(pathlib.Path({str(tmp_path / "file")!r}), b"new")
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == survivor
    atomic.write_atomically(tmp_path / "file", b"next")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"next"


def test_write_that_fails_half_way_changes_nothing(tmp_path):
    pytest.importorskip("resource", reason="needs POSIX resource limits")
    (tmp_path / "file").write_bytes(b"old")
    script = f"""
import atomic, pathlib, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
atomic.write_atomically(pathlib.Path({str(tmp_path / "file")!r}), bytes(100_000))
"""
    failed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=EXAMPLES,
        capture_output=True,
        check=False,
    )
    assert b"File too large" in failed.stderr
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_stops_the_run_and_loses_nothing(run, tmp_path, monkeypatch):
    output = tmp_path / "full"
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 8:  # two files, each with its folder, at the start and after an epoch
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


def test_diverging_run_stops(run, tmp_path):
    result = run(*SMALL, "--epochs", 3, "--lr", 1e15, "--output", tmp_path / "a")
    assert_error(result, "the loss is", "--lr", status=1)
    assert all(v.isfinite().all() for v in load(tmp_path / "a")["model"].values())


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "0"], ["--epochs", "at least 1", "'0'"]),
        (["--epochs", "-3"], ["--epochs", "'-3'"]),
        (["--epochs", "1.5"], ["--epochs", "'1.5'"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1", "'0'"]),
        (["--batch-size", "-1"], ["--batch-size", "'-1'"]),
        (["--lr", "0"], ["--lr", "over 0", "'0'"]),
        (["--lr", "-1e-3"], ["--lr", "-1e-3"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "inf"], ["--lr", "'inf'"]),
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--seed", "-1"], ["--seed", "at least 0", "'-1'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--train-images", "0"], ["--train-images", "'0'"]),
        (["--train-images", "10000000000"], ["--train-images", "at most 1000000"]),
        (["--checkpoint-steps", "-1"], ["--checkpoint-steps", "'-1'"]),
        (["--model", "resnet"], ["--model", "resnet", "fused", "stock"]),
        (["--device", "abacus"], ["--device", "'abacus'"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["--device", "meta"], ["--device", "'meta'"]),
        (["--epoch", "3"], ["--epoch"]),
        (["extra"], ["extra"]),
    ],
    ids=" ".join,
)
def test_bad_arguments(tmp_path, monkeypatch, capfd, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status = train_cifar10.main(arguments)
    assert_error((status, *capfd.readouterr()), *expected)
    assert not list(tmp_path.iterdir())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        ("data_batch_2.bin", lambda path: path.write_bytes(b""), "got 0 bytes"),
        ("data_batch_2.bin", _truncate, "got 6145 bytes"),
        ("data_batch_2.bin", lambda path: make_batch(path, [3, 10]), "got 10 in record 1"),
        ("data_batch_2.bin", lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        ("test_batch.bin", Path.unlink, "No such file"),
        ("test_batch.bin", _truncate, "got 9218 bytes"),
        ("test_batch.bin", lambda path: make_batch(path, [255]), "got 255 in record 0"),
        ("batches.meta.txt", lambda path: path.write_text("cat\ndog\n"), "got 2"),
        ("batches.meta.txt", lambda path: path.write_bytes(b"\xff\xfe"), "cannot read"),
    ],
)
def test_bad_data_files(run, data, tmp_path, file, damage, expected):
    damage(data / file)
    output = tmp_path / "out"
    result = run("--data", data, "--output", output)
    assert_error(result, "--data: ", str(data / file), expected)
    assert not list(output.iterdir())


def test_bad_data_folders(run, data, tmp_path):
    output = tmp_path / "out"
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for folder, expected in (
        (missing, "No such file"),
        (data / "test_batch.bin", "Not a directory"),
        (empty, "expected data_batch_*.bin"),
    ):
        result = run("--data", folder, "--output", output)
        assert_error(result, "--data: ", str(folder), expected)
    result = run("--data", data, "--train-images", 11, "--output", output)
    assert_error(result, "--train-images: expected at most 10", str(data), "got 11")
    assert not list(output.iterdir())


def test_unusable_output_folders(run, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("kept")
    for output, expected in ((file, "File exists"), (file / "below", "Not a directory")):
        assert_error(run(*SMALL, "--output", output), "--output: ", str(output), expected)
    assert file.read_text() == "kept"

    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        assert_error(run(*SMALL, "--output", locked), "--output: ", "Permission denied")
        assert_error(run(*SMALL, "--output", locked / "new"), "--output: ", "Permission denied")

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    result = run(*SMALL, "--output", tmp_path / "full")
    assert_error(result, "--output: ", str(tmp_path / "full"), "No space left on device")


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_extra_is_named(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_error(run(*SMALL), package, "pip install 'fusedcnn[examples]'")


def test_command_line_exit_status():
    """The script itself, as people start it: one line, no traceback, status 2."""
    bad = subprocess.run(
        [sys.executable, EXAMPLES / "train_cifar10.py", "--epochs", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_error((bad.returncode, bad.stdout, bad.stderr), "--epochs", "'0'")


def test_pictures_survive_odd_names():
    pictures = importlib.import_module("pictures")
    names = ["$x", "a_b", "\\", *"defghij"]
    png = pictures.draw_predictions(
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
        torch.tensor([0, 1, 2]),
        torch.eye(10)[[0, 2, 1]],
        names,
        "$",
    )
    assert png.startswith(b"\x89PNG")
