"""Train SimpleCNN on CIFAR-10, from stock layers or fused.

    pip install 'fusedcnn[examples]'
    python examples/train_cifar10.py                                  # on images drawn here
    python examples/train_cifar10.py --data cifar-10-batches-bin --model stock
    python examples/train_cifar10.py --data cifar-10-batches-bin --compare runs/cifar10-stock-seed0
    python examples/train_cifar10.py --resume runs/cifar10-fused-seed0 --epochs 20
    torchrun --nproc-per-node 2 examples/train_cifar10.py --data cifar-10-batches-bin

The recipe is plain: Adam, cross-entropy, pixels normalised per channel, no augmentation. Under one
seed both models start from the same parameters, see the same batches and draw the same dropout
masks. What is left between them is rounding, and time. CIFAR-10's "binary version" is at
https://www.cs.toronto.edu/~kriz/cifar.html.

Results of 5 epochs on one data_batch file (10,000 images), seed 0, one thread of an Intel Xeon
(Granite Rapids, AVX-512), torch 2.13: 53.4 % of the test images right fused, 53.6 % stock. The best
epoch took 1.4 s of processor time fused and 6.8 s stock, on a machine with other work.

The folder ``--output`` receives

- ``checkpoint.pt``, written after every epoch. A run killed at any moment continues with
  ``--resume``; on the CPU of one machine, with the same number of threads, its result is the
  uninterrupted run's to the bit. Its settings stay, save ``--epochs``, ``--data`` (the same images
  elsewhere) and ``--model``: either model continues what the other began, in a folder of its own.
  The entry "model" is a state_dict for both.
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
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
    print(f"train_cifar10.py: {error}: pip install 'fusedcnn[examples]'", file=sys.stderr)
    sys.exit(2)

# What torchrun says; one process alone where it says nothing. Rank 0 speaks and writes files.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class BadInput(Exception):  # noqa: N818
    """Ends the script with one line and exit status 2."""


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Make bad input of whatever goes wrong, in a line that begins with ``what``."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what}: {str(error) or type(error).__name__}") from error


# ---- data ----------------------------------------------------------------------------------------


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of CIFAR-10's binary format: uint8 images [N, 3, 32, 32], int64 labels [N].

    A record is one byte for the label, then 1024 bytes each of red, green and blue, row by row.
    """
    data, size = bytearray(path.read_bytes()), 1 + 3 * 32 * 32
    if not data or len(data) % size:
        raise BadInput(f"{path}: expected {size} bytes a record, got {len(data)} bytes")
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, size)
    labels = records[:, 0].long()
    if (label := labels.max()) > 9:
        raise BadInput(f"{path}, record {labels.argmax()}: expected labels 0 to 9, got {label}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def read_cifar10(folder: Path) -> tuple[list[Tensor], list[str]]:
    """Read training images and labels, test images and labels; and the names of the classes."""
    # data_batch_10 comes after data_batch_2.
    files = sorted(folder.glob("data_batch_*.bin"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise BadInput(f"expected data_batch_*.bin files in {folder}, got none")
    parts = zip(*map(read_batch, files), strict=True)
    tensors = [*map(torch.cat, parts), *read_batch(folder / "test_batch.bin")]
    names, meta = [f"class {label}" for label in range(10)], folder / "batches.meta.txt"
    if meta.exists():
        names = [n for n in meta.read_text("utf-8", "replace").splitlines() if n.strip()]
    if len(names) != 10:
        raise BadInput(f"{meta}: expected 10 class names, got {len(names)}")
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
    folder, train, test = (settings[name] for name in ("data", "train_images", "test_images"))
    if folder is None:
        # Seeds of their own: runs that differ in their seed stay comparable.
        tensors = [*draw_images(train or 10_000, seed=1), *draw_images(test or 2_000, seed=2)]
        names, source = [f"{18 * label} deg" for label in range(10)], "images drawn by the example"
        fingerprint = "drawn, version 2"  # no hash: another CPU may round a few pixels otherwise
    else:
        with blame("--data"):
            tensors, names = read_cifar10(Path(folder))
        for option, count, images in (("train", train, tensors[0]), ("test", test, tensors[2])):
            if count is not None and count > len(images):
                line = f"expected at most {len(images)}, as {folder} has, got {count}"
                raise BadInput(f"--{option}-images: {line}")
        tensors = [t[:n] for t, n in zip(tensors, (train, train, test, test), strict=True)]
        source = f"CIFAR-10 files of {Path(folder).name!r}"
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors))
        fingerprint = f"files with SHA-256 {digest.hexdigest()}"
    # One channel at a time, to spare memory. No std below 1: images may be of one colour.
    moments = [torch.std_mean(c.float(), correction=0) for c in tensors[0].unbind(1)]
    std, mean = torch.tensor(moments).T.reshape(2, 3, 1, 1)
    about = {"data": fingerprint, "train_images": len(tensors[0]), "test_images": len(tensors[2])}
    about |= {"source": source, "class_names": names, "mean": mean, "std": std.clamp_min(1)}
    return tensors, about


# ---- model ---------------------------------------------------------------------------------------

MODELS = {"fused": fusedcnn.FusedSimpleCNN, "stock": fusedcnn.SimpleCNN}
METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
METRICS += ["seconds", "images_per_second"]


class Run:
    """A training run: the model and all else that a checkpoint holds."""

    def __init__(self, settings: dict, about: dict, device: torch.device) -> None:
        self.settings, self.about, self.device = settings, about, device
        self.mean, self.std = about["mean"].to(device), about["std"].to(device)
        torch.manual_seed(settings["seed"])
        self.model = MODELS[settings["model"]]().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings["lr"], fused=True)
        for parameter in self.model.parameters():  # Adam's first step would, too late to load them
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=device)} | moments
        self.history: list[dict[str, float]] = []  # METRICS of each finished epoch
        self.step = 0  # finished steps of the epoch under way
        self.sums = torch.zeros(2, device=device)  # its losses and right answers, in this process
        self.seconds = 0.0  # spent on it
        # What may change the last bits of a result, besides the settings.
        self.environment = f"{type(self.model).__name__} on {device.type}, torch "
        self.environment += f"{torch.__version__}, processes {WORLD_SIZE}, threads "
        self.environment += f"{torch.get_num_threads()}"

    def seed(self, *where: int) -> int:
        """A seed for an epoch or a step: a checkpoint need not hold the state of a generator."""
        return zlib.crc32(repr((self.settings["seed"], len(self.history), *where)).encode())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; all processes have to ask for it."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        state = {"format": FORMAT, "settings": self.settings, "data": self.about, "sums": sums}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"history": self.history, "step": self.step, "seconds": self.seconds}
        return state | {"environment": self.environment}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was written, if all that counts of it fits."""
        then, now = state["settings"] | state["data"], self.settings | self.about
        for name in ("batch_size", "lr", "seed", "train_images", "test_images", "data"):
            if then[name] != now[name]:
                option = name.replace("_", "-")
                raise BadInput(f"expected --{option} {then[name]} as before, got {now[name]}")
        own = self.state_dict()
        like = {key: own[key] for key in ("model", "optimizer", "sums", "step", "seconds")}
        check_like({key: state[key] for key in like}, like)
        steps = -(-now["train_images"] // now["batch_size"])
        if not 0 <= state["step"] <= steps:
            raise BadInput(f"expected step 0 to {steps} of an epoch, got {state['step']}")
        self.model.load_state_dict(state["model"])
        saved = state["optimizer"]["state"].values()
        for ours, theirs in zip(self.optimizer.state.values(), saved, strict=True):
            for key in ours:  # copied, for tensors of a file may share memory
                ours[key].copy_(theirs[key])
        if RANK == 0:
            self.sums.copy_(state["sums"])
        self.history, self.step, self.seconds = state["history"], state["step"], state["seconds"]


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
    return torch.cat([run.model((part - run.mean) / run.std) for part in images.split(250)])


# ---- checkpoints ---------------------------------------------------------------------------------

FORMAT = "fusedcnn examples/train_cifar10.py, version 3"
# Raises an error unless keys, types and shapes agree and all numbers are finite.
check_like = functools.partial(torch.testing.assert_close, rtol=0, atol=3e38, check_device=False)


def load_checkpoint(path: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint, or that of a folder, without running code that it may carry."""
    path = path / "checkpoint.pt" if os.path.isdir(path) else path
    with blame(f"{option}: {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load ignores the checksums
            if (damaged := archive.testzip()) is not None:
                raise BadInput(f"wrong checksum of {damaged}")
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise BadInput("expected tensors and plain values, got others") from error
        found = state.get("format") if isinstance(state, dict) else type(state)
        if found != FORMAT:
            raise BadInput(f"expected the format {FORMAT!r}, got {found!r}")
        state["history"] = [*state["history"]]
        check_like(state["history"], [dict.fromkeys(METRICS, 0.0)] * len(state["history"]))
        return path, state


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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def save(run: Run, output: Path) -> None:
    """Write the checkpoint, then the metrics that belong to it; all processes have to call."""
    state, file, lines = run.state_dict(), io.BytesIO(), [",".join(["epoch", *METRICS])]
    tensors = [tensor for moments in run.optimizer.state.values() for tensor in moments.values()]
    tensors += [*run.model.parameters(), state["sums"]]
    tensors += [torch.tensor([*row.values()]) for row in run.history[-1:]]
    if not all(tensor.isfinite().all() for tensor in tensors):
        where = f"after epoch {len(run.history)}, step {run.step}"
        lower = f"start again with a --lr below {run.settings['lr']:g}"
        line = f"the loss is not finite {where}: {lower}; {output} holds what was before"
        raise FloatingPointError(line)
    if RANK == 0:
        torch.save(state, file)
        write(output / "checkpoint.pt", file.getvalue())
        for epoch, row in enumerate(run.history, 1):
            lines.append(",".join([str(epoch), *(f"{row[key]:.7g}" for key in METRICS)]))
        write(output / "metrics.csv", "".join(f"{line}\n" for line in lines).encode())


# ---- training loop -------------------------------------------------------------------------------


def train(run: Run, tensors: Sequence[Tensor], output: Path, every: int) -> None:
    """Train all epochs; save after each, and after ``every`` so many steps (0: not)."""
    images, labels, test_images, test_labels = tensors
    epochs, count = run.settings["epochs"], len(labels)
    model = run.model if WORLD_SIZE == 1 else DistributedDataParallel(run.model)
    gpus = torch.cuda.default_generators if run.device.type == "cuda" else ()
    dropout = gpus[run.device.index or 0] if gpus else torch.default_generator
    while (epoch := len(run.history) + 1) <= epochs:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(run.seed()))
        batches = order.to(run.device).split(min(run.settings["batch_size"], count))
        bar = {"desc": f"epoch {epoch}/{epochs}", "initial": run.step, "total": len(batches)}
        bar |= {"leave": False, "disable": RANK > 0 or None}  # None: where stderr is a file
        model.train()
        started = time.perf_counter()
        for index in tqdm(batches[run.step :], **bar):
            dropout.manual_seed(run.seed(run.step, RANK))
            share = index[RANK::WORLD_SIZE]
            inputs = (images[share] - run.mean) / run.std  # bytes before, to spare memory
            run.sums += train_step(model, run.optimizer, inputs, labels[share], len(index))
            run.step += 1
            if every and run.step % every == 0:
                run.seconds += time.perf_counter() - started
                save(run, output)
                started = time.perf_counter()
        loss, right = (run.state_dict()["sums"] / count).tolist()  # waits for the device
        seconds = run.seconds + time.perf_counter() - started
        logits = predict(run, test_images)
        test_loss = F.cross_entropy(logits, test_labels).item()
        test_right = (logits.argmax(1) == test_labels).double().mean().item()
        row = [loss, right, test_loss, test_right, seconds, count / seconds]
        run.history.append(dict(zip(METRICS, row, strict=True)))
        run.step, run.seconds = 0, 0.0
        run.sums.zero_()
        save(run, output)
        line = f"epoch {epoch}/{epochs}   train loss {loss:.4f}  accuracy {right:6.2%}   test loss "
        line += f"{test_loss:.4f}  accuracy {test_right:6.2%}   {seconds:.2f} s"
        print(f"{line}, {count / seconds:,.0f} images/s", flush=True)


# ---- pictures ------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[tuple[str, list[dict]]], title: str) -> Figure:
    """Loss by epoch and test accuracy by time, from the name and the metrics of each run."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    for i, (name, history) in enumerate(runs):
        column = {key: [row[key] for row in history] for key in METRICS}
        for kind, style in (("train", "--"), ("test", "o-")):
            line = {"color": f"C{i}", "label": f"{name}, {kind}"}
            loss.plot(range(1, len(history) + 1), column[f"{kind}_loss"], style, **line)
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
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    grid = figure.subplots(rows, 10, squeeze=False, subplot_kw=bare).flat
    for axes, image, label, sure in zip(grid, images, labels, logits.softmax(1), strict=False):
        answer, text = sure.argmax(), {"fontsize": 8, "parse_math": False}
        text["color"] = "black" if answer == label else "tab:red"
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"{names[answer]} {sure[answer]:.0%}", **text)
        axes.set_xlabel("" if answer == label else f"is: {names[label]}", **text)
    return figure


def draw(run: Run, tensors: Sequence[Tensor], output: Path, others: list[tuple]) -> None:
    """Write the curves, and the first test images with what the model takes them for."""
    last, what = run.history[-1], f"{type(run.model).__name__}, {run.about['source']}"
    title = f"{what}: {last['images_per_second']:,.0f} images/s in training"
    curves = draw_curves([(output.resolve().name, run.history), *others], title)
    images, labels = (tensor[:40] for tensor in tensors[2:])
    sample = (tensor.cpu() for tensor in (images, labels, predict(run, images)))
    title = f"{what}: {last['test_accuracy']:.1%} of {len(tensors[2]):,} test images right"
    predictions = draw_predictions(*sample, run.about["class_names"], title)
    for name, figure in (("curves.png", curves), ("predictions.png", predictions)):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        write(output / name, file.getvalue())


# ---- command line --------------------------------------------------------------------------------

SETTINGS = ["data", "model", "epochs", "batch_size", "lr", "seed", "train_images", "test_images"]


def number(kind: type, low: float, high: float = 2**63 - 1) -> dict[str, Any]:
    """What argparse has to know of numbers from ``low`` to ``high``."""

    def parse_number(text: str) -> Any:
        if low <= (value := kind(text)) <= high:
            return value
        raise ValueError

    parse_number.__name__ = f"{kind.__name__} ({low} to {high})"  # for argparse's message
    return {"type": parse_number, "metavar": "N"}


def refuse(message: str) -> NoReturn:
    """Replaces argparse's way out, which prints more than a line."""
    raise BadInput(message.removeprefix("argument "))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``folder`` is where the files of the run go."""
    text = "Train SimpleCNN on CIFAR-10, from stock layers or fused."
    parser = argparse.ArgumentParser("train_cifar10.py", description=text, allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    images, rate = number(int, 1, 10**6), number(float, 1e-300, 1e300)
    add("--data", type=os.path.abspath, metavar="DIR", help="default: images drawn here")
    add("--model", choices=MODELS, default="fused", help="default: fused")
    add("--epochs", **number(int, 1), default=8, help="in all, resumed ones too; default: 8")
    add("--batch-size", **number(int, 1), default=128, help="default: 128")
    add("--lr", **rate, default=1e-3, help="Adam's learning rate; default: 1e-3")
    add("--seed", **number(int, 0), default=0, help="of parameters, order and dropout; default: 0")
    add("--train-images", **images, help="so many; default: all of --data, or 10000 drawn ones")
    add("--test-images", **images, help="so many; default: all of --data, or 2000 drawn ones")
    add("--device", metavar="X", help="such as cpu or cuda:0; default: cuda, else cpu")
    add("--threads", **number(int, 1, 1024), help="default: torch's choice")
    add("--output", type=Path, metavar="DIR", help="default: runs/<data>-<model>-seed<seed>")
    add("--overwrite", action="store_true", help="replace the run that --output holds")
    add("--resume", nargs="?", const="", metavar="PATH", help="file or folder; default: --output")
    add("--compare", type=Path, metavar="PATH", help="draw the curves of this run, too")
    add("--checkpoint-steps", **number(int, 0), default=0, help="write one every N steps, too")
    options = parser.parse_args(arguments)
    data = "drawn" if options.data is None else "cifar10"
    options.folder = Path("runs", f"{data}-{options.model}-seed{options.seed}")
    options.folder = options.folder if options.output is None else options.output
    return options


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


def run_training(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    options, checkpoint, state, others = parse(arguments), None, None, []
    if options.resume is not None:
        checkpoint, state = load_checkpoint(Path(options.resume or options.folder), "--resume")
        with blame(f"--resume: {checkpoint}"):
            settings = dict(state["settings"])
            saved = [(name.replace("_", "-"), settings[name]) for name in SETTINGS]
            saved = [f"--{name}={value}" for name, value in saved if value is not None]
            before = parse(saved)
        options = parse([*saved, *arguments])
        if options.output is None and options.model == before.model:
            options.folder = checkpoint.parent
    output, there = options.folder, options.folder / "checkpoint.pt"
    resumed = state and os.path.realpath(there) == os.path.realpath(checkpoint)
    if os.path.exists(there) and not resumed and not options.overwrite:
        line = "--resume continues it, --overwrite replaces it, another --output keeps it"
        raise BadInput(f"--output: {output} holds a run already: {line}")
    if options.compare is not None:
        path, other = load_checkpoint(options.compare, "--compare")
        if not other["history"]:
            raise BadInput(f"--compare: expected a run of an epoch or more, got none in {path}")
        others = [(path.resolve().parent.name, other["history"])]
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    name = options.device or gpu
    with blame(f"--device: expected one that torch can use here, got {name!r}"):
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with blame("--output"):
        output.mkdir(parents=True, exist_ok=True)
    with joined(device):
        settings = {name: vars(options)[name] for name in SETTINGS}
        tensors, about = load_data(settings)
        tensors = [tensor.to(device) for tensor in tensors]
        run = Run(settings, about, device)
        if state is not None:
            with blame(f"--resume: {checkpoint}"):
                run.load_state_dict(state)
        if WORLD_SIZE > 1:
            dist.barrier()  # nothing is written before all have looked at what is there
        with blame("--output"):  # for a kill before the next checkpoint, or before its metrics
            save(run, output)
            for name in ("curves.png", "predictions.png"):  # of a run that this one replaces
                if state is None and RANK == 0:
                    (output / name).unlink(missing_ok=True)
        counts = f"{about['train_images']} training and {about['test_images']} test images"
        print(f"{run.environment}; {about['source']}: {counts}")
        if state is not None:
            print(f"resumed {checkpoint}: {len(run.history)} epochs and {run.step} steps are done")
            if state["environment"] != run.environment:
                print(
                    f"note: was {state['environment']!r} before: the result may differ by rounding"
                )
        if len(run.history) >= options.epochs:
            print(f"nothing to train: {len(run.history)} of --epochs {options.epochs} are done")
        train(run, tensors, output, options.checkpoint_steps)
        if RANK == 0:
            draw(run, tensors, output, others)
        print(f"checkpoint.pt, metrics.csv, curves.png and predictions.png are in {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run_training(sys.argv[1:] if arguments is None else arguments)
        return 0
    except BadInput as error:
        status, line = 2, f"error: {error}"
    except FloatingPointError as error:
        status, line = 1, f"stopped: {error}"
    except OSError as error:  # of a write; what was written before is whole
        status, line = 1, f"stopped: --output: {error}; --resume goes on from the last checkpoint"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; --resume goes on from the last checkpoint"
    print(f"train_cifar10.py: {' '.join(line.split())[:600]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
