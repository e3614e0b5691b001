"""Train SimpleCNN on CIFAR-10, from stock layers or fused.

    pip install 'fusedcnn[examples]'
    python examples/train_cifar10.py                                  # on images drawn here
    python examples/train_cifar10.py --data cifar-10-batches-bin --model stock
    python examples/train_cifar10.py --data cifar-10-batches-bin --compare runs/cifar10-stock-seed0
    python examples/train_cifar10.py --resume runs/cifar10-fused-seed0 --epochs 20
    torchrun --nproc-per-node 2 examples/train_cifar10.py --data cifar-10-batches-bin

CIFAR-10's "binary version" is at https://www.cs.toronto.edu/~kriz/cifar.html. The recipe is plain:
Adam, cross-entropy, pixels normalised per channel, no augmentation. Under one seed both models
start from the same parameters, see the same batches and draw the same dropout masks. What is left
between them is rounding, and time.

Results of 5 epochs on one data_batch file (10,000 images), seed 0, one thread of an Intel Xeon
(Granite Rapids, AVX-512), torch 2.13: 52.9 % of the test images right fused, 52.6 % stock. The best
epoch took 1.4 s of processor time fused and 6.8 s stock, on a machine with other work.

The folder ``--output`` receives

- ``checkpoint.pt``: all that is needed to go on, written after every epoch. A run killed at any
  moment continues with ``--resume``; on the CPU of one machine, with the same number of threads,
  its result is the uninterrupted run's to the bit. Its settings stay, save ``--epochs``, ``--data``
  (the same images elsewhere) and ``--model``: either model continues what the other began, in a
  folder of its own. The entry "model" is a state_dict for both.
- ``metrics.csv``: one row an epoch. Training loss and accuracy are means over the epoch, with
  dropout on; ``seconds`` is the training alone.
- ``curves.png``, with the curves of the ``--compare`` run besides, and ``predictions.png``.

Under torchrun the processes share each batch and average their gradients, which are those of one
process on the whole batch; only the dropout masks differ.

Exit status: 0 done; 1 stopped on the way, with the last checkpoint whole; 2 bad input, found before
training; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import fusedcnn
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

try:
    from matplotlib.figure import Figure  # without pyplot, which wants a display
    from tqdm import tqdm
except ImportError as error:
    hint = f"{error.name} is missing: pip install 'fusedcnn[examples]'"
    print(f"train_cifar10.py: error: {hint}", file=sys.stderr)
    sys.exit(2)

# What torchrun says; one process alone where it says nothing. Rank 0 speaks and writes files.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Stop(Exception):  # noqa: N818 (an interruption, as StopIteration is)
    """Ends the script: an exit status, 2 for bad input and 1 for what comes later, and a line."""


# ---- data ----------------------------------------------------------------------------------------


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of CIFAR-10's binary format: uint8 images [N, 3, 32, 32], int64 labels [N].

    A record is one byte for the label, then 1024 bytes each of red, green and blue, row by row.
    """
    data, size = bytearray(path.read_bytes()), 1 + 3 * 32 * 32
    if not data or len(data) % size:
        raise Stop(2, f"--data: {path}: expected {size} bytes a record, got {len(data)} bytes")
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, size)
    labels = records[:, 0].long()
    if (label := labels.max()) > 9:
        where = f"{path}, record {labels.argmax()}"
        raise Stop(2, f"--data: expected labels 0 to 9, got {label} in {where}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def read_cifar10(folder: Path) -> tuple[list[Tensor], list[str]]:
    """Read training images and labels, test images and labels; and the names of the classes."""
    names, meta = [f"class {label}" for label in range(10)], folder / "batches.meta.txt"
    try:
        files = [name for name in os.listdir(folder) if re.fullmatch(r"data_batch_.*\.bin", name)]
        if not files:
            raise Stop(2, f"--data: expected data_batch_*.bin files in {folder}, got none")
        files.sort(key=lambda name: (len(name), name))  # data_batch_10 after data_batch_2
        parts = zip(*(read_batch(folder / name) for name in files), strict=True)
        tensors = [*map(torch.cat, parts), *read_batch(folder / "test_batch.bin")]
        if meta.exists():
            names = [n for n in meta.read_text("utf-8", "replace").splitlines() if n.strip()]
    except (OSError, ValueError) as error:  # ValueError: a checkpoint may name impossible folders
        name, why = getattr(error, "filename", folder), getattr(error, "strerror", error)
        raise Stop(2, f"--data: cannot read {name}: {why}") from error
    if len(names) != 10:
        raise Stop(2, f"--data: {meta}: expected 10 class names, got {len(names)}")
    return tensors, names


def draw_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw stripes whose direction, a multiple of 18 degrees, is the class; equally many of each.

    Width, place, colours, contrast and noise are random, so that no pixel gives a class away.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % 10
    parts, line = [], torch.arange(32.0) - 15.5
    for part in labels.view(-1, 1, 1, 1).split(1000):  # floats of all would take gigabytes
        r = torch.rand(len(part), 10, 1, 1, generator=generator).split([1, 1, 1, 1, 3, 3], 1)
        angle = math.pi / 10 * (part + 0.8 * r[0] - 0.4)
        across = line * angle.cos() + line.view(-1, 1) * angle.sin()
        stripes = torch.sin(across * (0.4 + 0.8 * r[1]) + 2 * math.pi * r[2])
        noise = torch.randn(len(part), 3, 32, 32, generator=generator) * (0.05 + 0.35 * r[3])
        image = 0.2 + 0.6 * r[4] + (0.8 * r[5] - 0.4) * stripes + noise
        parts.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts), labels


def load_data(settings: dict) -> tuple[list[Tensor], dict[str, Any]]:
    """Read or draw the tensors of ``read_cifar10``; and what a checkpoint says of them."""
    folder, wanted = settings["data"], [settings["train_images"], settings["test_images"]]
    if folder is None:
        wanted = [wanted[0] or 10_000, wanted[1] or 2_000]
        # Seeds of their own: runs that differ in their seed stay comparable.
        tensors = [*draw_images(wanted[0], seed=1), *draw_images(wanted[1], seed=2)]
        names, source = [f"{18 * label} deg" for label in range(10)], "images drawn by the example"
        # Not a hash of the pixels: another CPU may round a few of them otherwise.
        fingerprint = f"drawn, version 2, {wanted[0]} + {wanted[1]}"
    else:
        tensors, names = read_cifar10(Path(folder))
        for option, count, images in zip(("train", "test"), wanted, tensors[::2], strict=True):
            if count is not None and count > len(images):
                line = f"expected at most {len(images)}, as {folder} has, got {count}"
                raise Stop(2, f"--{option}-images: {line}")
        tensors = [tensor[: wanted[i // 2]] for i, tensor in enumerate(tensors)]
        source, digest = f"CIFAR-10 files of {Path(folder).name!r}", hashlib.sha256()
        for tensor in tensors:
            digest.update(str(list(tensor.shape)).encode() + tensor.numpy().tobytes())
        fingerprint = digest.hexdigest()
    # One channel at a time, to spare memory. No std below 1: images may be of one colour.
    moments = [torch.std_mean(c.float(), correction=0) for c in tensors[0].unbind(1)]
    std, mean = torch.tensor(moments).T.reshape(2, 3, 1, 1)
    about = {"source": source, "fingerprint": fingerprint, "class_names": names}
    about |= {"train": len(tensors[0]), "test": len(tensors[2])}
    return tensors, about | {"mean": mean, "std": std.clamp_min(1)}


# ---- model ---------------------------------------------------------------------------------------

MODELS = {"fused": fusedcnn.FusedSimpleCNN, "stock": fusedcnn.SimpleCNN}


class Run:
    """A training run: the model and all else that a checkpoint holds."""

    def __init__(self, settings: dict, about: dict, device: torch.device) -> None:
        self.settings, self.about, self.device = settings, about, device
        self.mean, self.std = about["mean"].to(device), about["std"].to(device)
        torch.manual_seed(settings["seed"])
        self.model = MODELS[settings["model"]]().to(device)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=settings["lr"], fused=True)
        if RANK:  # the same parameters, but other dropout masks
            torch.manual_seed(settings["seed"] + 1_000_003 * RANK)
        self.shuffle = torch.Generator().manual_seed(settings["seed"])
        self.epoch_start = self.shuffle.get_state()  # before the epoch under way was shuffled
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.sums = torch.zeros(2, device=device)  # its losses and right answers, in this process
        self.seconds = 0.0  # spent on it
        self.history: list[dict[str, float]] = []
        self.environment = {  # may change the last bits of a result, besides the settings
            "torch": str(torch.__version__),  # a subclass of str, which weights_only would refuse
            "device": device.type,
            "threads": torch.get_num_threads(),
            "processes": WORLD_SIZE,
        }

    def totals(self) -> list[float]:
        """The sums over all processes, which all have to ask for them; waits for the device."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs; ``check`` says what each entry may be."""
        loss_sum, correct = self.totals()
        state = {"format": FORMAT, "settings": self.settings, "data": self.about}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random = {"cpu": torch.get_rng_state(), "cuda": cuda, "epoch_start": self.epoch_start}
        state |= {"environment": self.environment, "random": random, "history": self.history}
        state |= {"epoch": self.epoch, "step": self.step, "seconds": self.seconds}
        return state | {"loss_sum": loss_sum, "correct": int(correct)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where a checked ``state`` was written; the settings stay as they are."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        random = state["random"]
        if RANK == 0:  # the others' dropout starts anew
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and random["cuda"] is not None:
                torch.cuda.set_rng_state(random["cuda"], self.device)
            self.sums.copy_(torch.tensor([state["loss_sum"], state["correct"]]))
        self.epoch_start = random["epoch_start"]
        self.shuffle.set_state(self.epoch_start)
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.history = state["seconds"], state["history"]

    def normalise(self, images: Tensor) -> Tensor:
        """Images as the model takes them; they are kept as bytes, a quarter of the memory."""
        return (images - self.mean).div_(self.std)


# ---- training step -------------------------------------------------------------------------------


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch: int
) -> Tensor:
    """One step on a batch; returns the sum of the losses and the number of right answers, [2].

    With several processes, ``images`` are this one's share of the ``batch`` that all have together,
    perhaps none, and ``model`` is wrapped in DistributedDataParallel.
    """
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    # DistributedDataParallel averages gradients, which divides them by WORLD_SIZE.
    (loss * WORLD_SIZE / batch).backward()
    optimizer.step()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum().to(loss)])


@torch.no_grad()
def predict(run: Run, images: Tensor) -> Tensor:
    """The logits [N, 10], with dropout off."""
    run.model.eval()
    return torch.cat([run.model(run.normalise(part)) for part in images.split(250)])


# ---- checkpoints: written whole or not at all, checked before anything in them is believed -------

FORMAT = "fusedcnn examples/train_cifar10.py, version 2"
COLUMNS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
COLUMNS += ["seconds", "images_per_second"]


class Kind(NamedTuple):
    """What a value may be, in a checkpoint and on the command line."""

    type: type
    text: str
    allows: Callable[[Any], bool]
    or_none: bool = False

    def __call__(self, text: str) -> Any:
        """Parse an argument, for argparse."""
        with contextlib.suppress(ValueError):
            if self.allows(value := self.type(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {self.text}, got {text!r}")


def whole(low: int, high: int = 2**63 - 1) -> Kind:
    """Whole numbers within limits."""
    return Kind(int, f"a whole number from {low} to {high}", lambda n: low <= n <= high)


def like(tensor: Tensor, low: float = -3e38, high: float = 3e38) -> Kind:
    """Tensors of the same shape and dtype, with values within limits."""

    def allows(got: Tensor) -> bool:
        return show(got) == show(tensor) and bool(((got >= low) & (got <= high)).all())

    return Kind(Tensor, f"{show(tensor)} with values from {low:g} to {high:g}", allows)


LINE = Kind(str, "a printable text", str.isprintable)
TEXT = Kind(str, "a text", lambda text: True)
MODEL = Kind(str, "'fused' or 'stock'", MODELS.__contains__)
RATE = Kind(float, "a finite number over 0", lambda x: 0 < x < math.inf)
AMOUNT = Kind(float, "a number from 0 to 3e38", lambda x: 0 <= x <= 3e38)
NOTHING = Kind(type(None), "nothing", lambda value: False)

# What the result depends on: default, values, help.
SETTINGS: dict[str, tuple[Any, Kind, str]] = {
    "data": (None, TEXT, "folder of CIFAR-10's binary files; default: images drawn here"),
    "model": ("fused", MODEL, "fused or stock; default: fused"),
    "epochs": (8, whole(1), "in all, resumed ones too; default: 8"),
    "batch_size": (128, whole(1), "images in a batch; default: 128"),
    "lr": (1e-3, RATE, "Adam's learning rate; default: 1e-3"),
    "seed": (0, whole(0), "of parameters, order and dropout; default: 0"),
    "train_images": (None, whole(1, 10**6), "the first of --data (default: all), or drawn (10000)"),
    "test_images": (None, whole(1, 10**6), "likewise; default: all, or 2000"),
}


def show(value: Any) -> str:
    """What a value is, or has to be, in less than a line."""
    if isinstance(value, Kind):
        return value.text
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        return f"a tensor ({value.dtype}, {shape}, {value.layout}, {value.device})"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    plain = isinstance(value, (str, int, float, type(None)))
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def checked(expected: Any, got: Any, at: str = "checkpoint") -> Any:
    """Return a copy of ``got``, in memory of its own, if it is as ``expected``.

    That is a Kind, a dict, list or tuple of what is expected in it, or the value itself. ``at``
    says where in a file ``got`` was.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        both = ((key, expected.get(key, NOTHING), got.get(key, NOTHING)) for key in expected | got)
        return {key: checked(one, other, f"{at}[{show(key)}]") for key, one, other in both}
    if isinstance(expected, Kind):
        if got is None and expected.or_none:
            return None
        if type(got) is expected.type and expected.allows(got):
            # A tensor's memory may be another's, too, or less than its shape says.
            copy = type(got) is Tensor
            return torch.empty(got.shape, dtype=got.dtype).copy_(got) if copy else got
    elif type(got) is type(expected) and isinstance(got, (list, tuple)):
        if len(got) == len(expected):
            both = enumerate(zip(expected, got, strict=True))
            return type(got)(checked(one, other, f"{at}[{i}]") for i, (one, other) in both)
    elif type(got) is type(expected) and got == expected:
        return got
    came = show(got)
    if type(got) is Tensor and came in show(expected):
        came = f"values from {got.min():g} to {got.max():g}"
    raise Stop(2, f"expected {at} to be {show(expected)}, got {came}")


def is_generator_state(state: Tensor) -> bool:
    """Whether a CPU generator can go on from this state."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    # Of 624 words, so many are left, and this one is next: torch does not see that they agree.
    left, _, following = struct.unpack_from("iiQ", state.numpy(), 8)
    return left + following <= 625


def check(state: Any) -> dict[str, Any]:
    """Return a copy of ``state`` if it is what ``Run.state_dict`` may have given."""
    about = {"source": LINE, "fingerprint": LINE, "class_names": [TEXT] * 10}
    about |= {"train": whole(1), "test": whole(1)}
    about |= {key: like(torch.zeros(3, 1, 1), low, 255) for key, low in (("mean", 0), ("std", 1))}
    settings = {n: kind._replace(or_none=value is None) for n, (value, kind, _) in SETTINGS.items()}
    # What the rest follows from.
    first = {"format": FORMAT, "settings": settings, "data": about, "step": whole(0)}
    first["history"] = Kind(list, "a list", lambda rows: True)
    got = {key: state.get(key, NOTHING) for key in first} if isinstance(state, dict) else state
    got = checked(first, got)
    settings, count, step = got["settings"], got["data"]["train"], got["step"]
    epochs, steps_per_epoch = len(got["history"]), -(-count // settings["batch_size"])
    steps = min(epochs * steps_per_epoch + step, 2**24)  # Adam counts in float32, no further

    run = Run(settings, got["data"], torch.device("cpu"))
    optimizer = run.optimizer.state_dict()
    for i, parameter in enumerate(run.model.parameters() if steps else ()):
        optimizer["state"][i] = {
            "step": like(torch.zeros(()), steps, steps),
            "exp_avg": like(parameter),
            "exp_avg_sq": like(parameter, low=0),
        }
    cpu = Kind(Tensor, "the state of a CPU generator", is_generator_state)
    cuda = like(torch.zeros(16, dtype=torch.uint8), 0, 255)._replace(or_none=True)
    row = dict.fromkeys(COLUMNS, AMOUNT) | {"seconds": RATE}
    expected = first | {
        "epoch": epochs,
        "environment": {"torch": LINE, "device": LINE, "threads": whole(1), "processes": whole(1)},
        "model": {name: like(tensor) for name, tensor in run.model.state_dict().items()},
        "optimizer": optimizer,
        "random": {"cpu": cpu, "cuda": cuda, "epoch_start": cpu},
        "history": [row | {"epoch": n + 1} for n in range(epochs)],
        "step": whole(0, steps_per_epoch),
        "seconds": AMOUNT if step else 0.0,
        "loss_sum": AMOUNT if step else 0.0,
        "correct": whole(0, min(step * settings["batch_size"], count)),
    }
    return checked(expected, state)


def load_checkpoint(path: str | Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Read and check a checkpoint, or that of a folder, without running code that it may carry."""
    # os.path's test, unlike Path's, holds where a folder on the way cannot be entered.
    path = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load ignores the checksums
            if (damaged := archive.testzip()) is not None:
                raise Stop(2, f"wrong checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return path, check(state)
    except OSError as error:
        why = f"cannot read {path}: {error.strerror}"
    except Stop as error:
        why = f"{path}: {error.args[1]}"
    except pickle.UnpicklingError:
        why = f"{path}: expected tensors and plain values, got others"
    except Exception as error:  # zipfile and torch raise a dozen classes on damaged files
        why = f"{path} is no checkpoint, or damaged: {error}"
    raise Stop(2, f"{option}: {why}")


def write(path: Path, data: bytes) -> None:
    """Replace a file; at any moment, a reader finds the old or the new one whole."""
    # In the same folder, since a rename is atomic within a file system; of a fixed name, so that
    # the next write takes away what a killed one left.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or the rename may reach the disk before the bytes
        os.replace(temporary, path)
    except OSError as error:
        line = f"--output: cannot write {path}: {error.strerror}; files already there are whole"
        raise Stop(1, f"{line}: --resume {path.parent} goes on from the last checkpoint") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(run: Run, output: Path) -> None:
    """Write the checkpoint, then the metrics that belong to it; all processes have to call."""
    state = run.state_dict()
    losses = [state["loss_sum"], *(value for row in run.history[-1:] for value in row.values())]
    moments = itertools.chain.from_iterable(m.values() for m in run.optimizer.state.values())
    finite = all(tensor.isfinite().all() for tensor in (*run.model.parameters(), *moments))
    if not finite or not all(map(math.isfinite, losses)):
        where = f"after epoch {run.epoch}, step {run.step}"
        lower = f"start again with a --lr below {run.settings['lr']:g}"
        raise Stop(1, f"the loss is not finite {where}: {lower}; {output} holds what was before")
    if RANK == 0:
        file = io.BytesIO()
        torch.save(state, file)
        write(output / "checkpoint.pt", file.getvalue())
        rows = [COLUMNS, *([f"{row[column]:.7g}" for column in COLUMNS] for row in run.history)]
        write(output / "metrics.csv", "".join(",".join(row) + "\n" for row in rows).encode())


# ---- training loop -------------------------------------------------------------------------------


def train(run: Run, tensors: Sequence[Tensor], output: Path, every: int) -> None:
    """Train all epochs; save after each, and after ``every`` so many steps (0: not)."""
    images, labels, test_images, test_labels = tensors
    epochs, count = run.settings["epochs"], len(labels)
    model = run.model if WORLD_SIZE == 1 else DistributedDataParallel(run.model)
    while run.epoch < epochs:
        order = torch.randperm(count, generator=run.shuffle).to(run.device)
        batches = order.split(min(run.settings["batch_size"], count))
        bar = {"desc": f"epoch {run.epoch + 1}/{epochs}", "leave": False}
        bar |= {"disable": RANK > 0 or None}  # None: where stderr is a file
        model.train()
        started = time.perf_counter()
        for index in tqdm(batches[run.step :], initial=run.step, total=len(batches), **bar):
            share = index[RANK::WORLD_SIZE]
            batch = run.normalise(images.index_select(0, share)), labels[share]
            run.sums += train_step(model, run.optimizer, *batch, len(index))
            run.step += 1
            if every and run.step % every == 0:
                run.seconds += time.perf_counter() - started
                save(run, output)
                started = time.perf_counter()
        train_loss, train_right = (total / count for total in run.totals())
        run.seconds += time.perf_counter() - started
        logits = predict(run, test_images)
        test_loss = F.cross_entropy(logits, test_labels).item()
        test_right = (logits.argmax(1) == test_labels).sum().item() / len(test_labels)
        row = [run.epoch + 1, train_loss, train_right, test_loss, test_right]
        row += [run.seconds, count / run.seconds]
        run.history.append(dict(zip(COLUMNS, row, strict=True)))
        run.epoch_start = run.shuffle.get_state()
        run.epoch, run.step, run.seconds = run.epoch + 1, 0, 0.0
        run.sums.zero_()
        save(run, output)
        losses = f"train loss {train_loss:.4f}  accuracy {train_right:6.2%}   test loss "
        losses += f"{test_loss:.4f}  accuracy {test_right:6.2%}"
        speed = f"{row[5]:.2f} s, {row[6]:,.0f} images/s"
        print(f"epoch {run.epoch}/{epochs}   {losses}   {speed}", flush=True)


# ---- pictures ------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[tuple[str, list[dict]]], title: str) -> Figure:
    """Loss by epoch and test accuracy by time, from the name and the metrics of each run."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, history) in enumerate(runs):
        column = {key: [row[key] for row in history] for key in COLUMNS}
        for kind, style in (("train", "--"), ("test", "o-")):
            values = column[f"{kind}_loss"]
            loss.plot(column["epoch"], values, style, color=f"C{i}", label=f"{name}, {kind}")
        seconds = [*itertools.accumulate(column["seconds"])]
        percent = [100 * share for share in column["test_accuracy"]]
        label = f"{name}: {percent[-1]:.1f} % in {seconds[-1]:.1f} s"
        accuracy.plot(seconds, percent, "o-", color=f"C{i}", label=label)
    loss.set(xlabel="epoch (train: mean over it, with dropout)", ylabel="cross-entropy")
    loss.xaxis.get_major_locator().set_params(integer=True)
    accuracy.set(xlabel="seconds of training", ylabel="test accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def draw_predictions(
    images: Tensor, labels: Tensor, logits: Tensor, names: Sequence[str], title: str
) -> Figure:
    """Images [N, 3, H, W] with the predicted class and how sure the model is; wrong ones in red."""
    rows = -(-len(images) // 10)
    figure = Figure(figsize=(12.5, 1.65 * rows + 0.6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    sure, answers = logits.softmax(1).max(1)
    for i, axes in enumerate(figure.subplots(rows, 10, squeeze=False).flat):
        axes.set(xticks=[], yticks=[], visible=i < len(images))
        if i < len(images):
            right = answers[i] == labels[i]
            text = {"fontsize": 8, "color": "black" if right else "tab:red", "parse_math": False}
            axes.imshow(images[i].permute(1, 2, 0).numpy())
            axes.set_title(f"{names[answers[i]]} {sure[i]:.0%}", **text)
            axes.set_xlabel("" if right else f"is: {names[labels[i]]}", **text)
            axes.spines[:].set(edgecolor=text["color"], linewidth=0 if right else 3)
    return figure


def draw(run: Run, tensors: Sequence[Tensor], output: Path, others: list[tuple]) -> None:
    """Write the curves, and the first test images with what the model takes them for."""
    images, labels = (tensor[:40] for tensor in tensors[2:])
    last, what = run.history[-1], f"{type(run.model).__name__}, {run.about['source']}"
    title = f"{what}: {last['images_per_second']:,.0f} images/s in training"
    curves = draw_curves([(output.resolve().name, run.history), *others], title)
    title = f"{what}: {last['test_accuracy']:.1%} of {run.about['test']:,} test images right"
    sample = (tensor.cpu() for tensor in (images, labels, predict(run, images)))
    predictions = draw_predictions(*sample, run.about["class_names"], title)
    for name, figure in (("curves.png", curves), ("predictions.png", predictions)):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        write(output / name, file.getvalue())


# ---- command line --------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is not given is None."""
    text = "Train SimpleCNN on CIFAR-10, from stock layers or fused."
    parser = argparse.ArgumentParser("train_cifar10.py", description=text, allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own misses -1e-3

    def refuse(message: str) -> NoReturn:
        raise Stop(2, message.removeprefix("argument "))

    parser.error = refuse
    add = parser.add_argument
    for name, (_, kind, text) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    add("--device", metavar="X", help="such as cpu or cuda:0; default: cuda, else cpu")
    add("--threads", type=whole(1, 1024), metavar="N", help="default: torch's choice")
    add("--output", type=Path, metavar="DIR", help="default: runs/<data>-<model>-seed<seed>")
    add("--overwrite", action="store_true", help="replace the run that --output holds")
    add("--resume", nargs="?", const="", metavar="PATH", help="file or folder; default: --output")
    add("--compare", metavar="PATH", help="draw the curves of this run, too")
    text = "write a checkpoint every N steps, too"
    add("--checkpoint-steps", type=whole(0), default=0, metavar="N", help=text)
    return parser.parse_args(arguments)


def plan(options: argparse.Namespace) -> tuple[dict, Path, Path | None, dict | None]:
    """Settings, output folder, and the checkpoint to resume with its state, if any."""

    def folder(settings: dict) -> Path:
        data = "drawn" if settings["data"] is None else "cifar10"
        return Path("runs", f"{data}-{settings['model']}-seed{settings['seed']}")

    given = {name: vars(options)[name] for name in SETTINGS if vars(options)[name] is not None}
    if "data" in given:
        given["data"] = os.path.abspath(given["data"])  # to be found from other folders, too
    settings = {name: default for name, (default, _, _) in SETTINGS.items()} | given
    output, checkpoint, state = options.output or folder(settings), None, None
    if options.resume is not None:
        checkpoint, state = load_checkpoint(options.resume or output, "--resume")
        saved, settings = state["settings"], state["settings"] | given
        for name in ("batch_size", "lr", "seed"):
            if settings[name] != saved[name]:
                line = f"expected {saved[name]} as in {checkpoint}, got {settings[name]}"
                raise Stop(2, f"--{name.replace('_', '-')}: {line}")
        if options.output is None:
            same = settings["model"] == saved["model"]
            output = checkpoint.parent if same else folder(settings)
    existing = output / "checkpoint.pt"
    resumed = checkpoint is not None and os.path.realpath(existing) == os.path.realpath(checkpoint)
    if os.path.exists(existing) and not resumed and not options.overwrite:
        line = "--resume continues it, --overwrite replaces it, another --output keeps it"
        raise Stop(2, f"--output: {output} holds a run already: {line}")
    return settings, output, checkpoint, state


def resume(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    """Bring ``run`` to where a checkpoint was written, and say what is not as it was then."""
    keys = ("source", "train", "test", "fingerprint")
    then, now = ([about[key] for key in keys] for about in (state["data"], run.about))
    if then[1:] != now[1:]:
        texts = (f"{about[0]}, {about[1]} + {about[2]}" for about in (then, now))
        line = "expected the images of {} ({}), got others ({})".format(checkpoint, *texts)
        raise Stop(2, f"--data, --train-images, --test-images: {line}")
    try:
        run.load_state_dict(state)
    except RuntimeError as error:  # CUDA has its own opinion of a generator's state
        raise Stop(2, f"--resume: {checkpoint} does not fit: {error}") from error
    print(f"resumed {checkpoint}: {run.epoch} epochs and {run.step} steps are done")
    before = state["environment"] | {"model": state["settings"]["model"]}
    for name, value in (run.environment | {"model": run.settings["model"]}).items():
        if before[name] != value:
            print(f"note: {name} was {before[name]}, is {value}: the result may differ by rounding")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join torchrun's other processes, by nccl on GPUs and gloo elsewhere."""
    if WORLD_SIZE > 1:
        # Its functions keep the process group of the time when it is imported. If that came later,
        # in DistributedDataParallel, threads of the group would outlive it and abort the process.
        import torch.distributed.nn.functional  # noqa: F401

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:  # all but the first are silent
        with contextlib.redirect_stdout(None if RANK else sys.stdout):
            yield
    finally:
        if WORLD_SIZE > 1:
            dist.destroy_process_group()


def prepare(options: argparse.Namespace, output: Path) -> torch.device:
    """See that the device can compute and that files can be written."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    name = options.device or gpu
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # by device: RuntimeError, AssertionError, NotImplementedError, ...
        line = f"--device: expected a device that this torch can use, got {name!r}"
        raise Stop(2, f"{line}: {error}") from error
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"for a file may be created on a full disk, but not filled")
    except OSError as error:
        line = f"expected a folder that files can be written to, got {output}: {error.strerror}"
        raise Stop(2, f"--output: {line}") from error
    return device


def run_training(arguments: Sequence[str] | None) -> None:
    """Do what the command line says."""
    options = parse(arguments)
    settings, output, checkpoint, state = plan(options)
    others = []
    if options.compare is not None:
        path, other = load_checkpoint(options.compare, "--compare")
        others.append((path.resolve().parent.name, other["history"]))
        if not other["history"]:
            raise Stop(2, f"--compare: expected a run of an epoch or more, got none in {path}")
    device = prepare(options, output)
    with joined(device):
        tensors, about = load_data(settings)
        tensors = [tensor.to(device) for tensor in tensors]
        run = Run(settings, about, device)
        if WORLD_SIZE > 1:
            dist.barrier()  # nothing is written before all have looked at what is there
        if state is not None:
            resume(run, checkpoint, state)
        workers = f"{WORLD_SIZE} processes, " if WORLD_SIZE > 1 else ""
        workers += f"{torch.get_num_threads()} threads"
        images = f"{about['train']} training and {about['test']} test images"
        print(f"{type(run.model).__name__} on {device}, {workers}; {about['source']}: {images}")
        save(run, output)  # for a kill in the first epoch, or between a checkpoint and its metrics
        if state is None and RANK == 0:
            for name in ("curves.png", "predictions.png"):  # of the run that --overwrite replaced
                with contextlib.suppress(OSError):
                    (output / name).unlink()
        if run.epoch >= settings["epochs"]:
            print(f"nothing to train: {run.epoch} of --epochs {settings['epochs']} are done")
        train(run, tensors, output, options.checkpoint_steps)
        if RANK == 0:
            draw(run, tensors, output, others)
        print(f"checkpoint.pt, metrics.csv, curves.png and predictions.png are in {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run_training(arguments)
    except Stop as stop:
        status, line = stop.args
        line = f"{'stopped' if status == 1 else 'error'}: {line}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; --resume goes on from the last checkpoint"
    else:
        return 0
    print(f"train_cifar10.py: {' '.join(line.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
