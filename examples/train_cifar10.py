"""Train SimpleCNN on CIFAR-10, from stock layers or fused.

Usage::

    pip install 'fusedcnn[examples]'
    python examples/train_cifar10.py                                   # on images drawn here
    python examples/train_cifar10.py --data cifar-10-batches-bin       # on CIFAR-10
    python examples/train_cifar10.py --data cifar-10-batches-bin --model stock
    python examples/train_cifar10.py --resume runs/cifar10-fused-seed0 --epochs 20
    torchrun --nproc-per-node 2 examples/train_cifar10.py --data cifar-10-batches-bin

CIFAR-10's "binary version" is at https://www.cs.toronto.edu/~kriz/cifar.html.

Results on the first 10,000 training images (one data_batch file) and all test images, 5 epochs,
seeds 0, 1, 2, one thread of an AMD EPYC (Zen 5, AVX-512), torch 2.13: test accuracy fused 52.80,
53.35, 52.50 %, stock 52.69, 53.55, 53.08 %; an epoch took 0.5 s fused and 2.1 s stock.

The recipe is plain: Adam, cross-entropy, pixels normalised per channel, no augmentation. Under one
seed both models start from the same parameters, see the same batches and draw the same dropout
masks; what is left between them is rounding, and time.

Under torchrun the processes share each batch (``--batch-size`` images in all) and average their
gradients, which are those of one process on the whole batch; only the dropout masks differ. The
first process writes the files.

The output folder (``--output``) receives

- ``checkpoint.pt``: after every epoch, all that is needed to go on. It is replaced whole or not at
  all, so a run killed at any moment continues with ``--resume``, and on the same machine with the
  same number of threads its result is, on the CPU, the uninterrupted run's to the bit. ``--resume``
  takes the settings from the checkpoint; those given on the command line must agree with it, save
  ``--epochs``, ``--device``, ``--threads`` and ``--model``: the parameters of both models have the
  same names and shapes, so that either continues what the other began (its files then go to a
  folder of their own, unless ``--output`` says otherwise). The checkpoint's entry ``"model"`` is a
  ``state_dict`` for SimpleCNN and FusedSimpleCNN alike.
- ``metrics.csv``: one row an epoch. Training loss and accuracy are means over the epoch, with
  dropout on; ``seconds`` is the training alone, without the test.
- ``curves.png`` and ``predictions.png``: drawn at the end, for a person to look at.

Exit status: 0 done; 1 stopped on the way, with the last checkpoint whole; 2 bad input, found before
training; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fusedcnn
import torch
import torch.nn.functional as F
from atomic import write_atomically
from checkpoints import CHECKPOINT, CheckpointError, first_line, save_checkpoint
from cifar10 import Batches, DataError, Dataset, channel_statistics, draw_dataset, read_cifar10
from command_line import (
    Plan,
    Settings,
    UsageError,
    make_plan,
    parse_arguments,
    prepare_output,
)
from counting import CountingCrossEntropy
from processes import Processes, described_by_environment, joined
from torch import Tensor, nn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": fusedcnn.FusedSimpleCNN,
    "stock": fusedcnn.SimpleCNN,
}
EVALUATION_BATCH = 250
PICTURED_IMAGES = 40
COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_second",
)


class StoppedError(RuntimeError):
    """Training cannot go on; the message is one line."""


# ---- model ---------------------------------------------------------------------------------------


class Run:
    """A training run: the model and all else that a checkpoint holds."""

    def __init__(
        self,
        settings: Settings,
        data: dict[str, Any],
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.settings = settings
        self.processes = processes
        self.data = data
        self.device = device
        torch.manual_seed(settings.seed)
        self.model = MODELS[settings.model]().to(device)
        self.parallel = processes.wrap(self.model)
        if not processes.first:  # the same parameters, but other dropout masks
            torch.manual_seed(settings.seed + 1_000_003 * processes.rank)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.lr, fused=device.type in ("cpu", "cuda")
        )
        self.criterion = CountingCrossEntropy(device)
        self.shuffle = torch.Generator().manual_seed(settings.seed)
        self.epoch_start = self.shuffle.get_state()  # before the epoch under way was shuffled
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.seconds = 0.0  # spent on them
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs; the inverse of :meth:`load_state_dict`."""
        cuda = self.device.type == "cuda"
        return {
            "settings": asdict(self.settings),
            "data": self.data,
            "environment": environment(self.device, self.processes),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
                "epoch_start": self.epoch_start,
            },
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.processes.total(self.criterion.loss_sum).item(),
            "correct": self.processes.total(self.criterion.correct).item(),
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was written; settings stay as they are."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        random = state["random"]
        if self.processes.first:  # the others' dropout starts anew
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and random["cuda"] is not None:
                torch.cuda.set_rng_state(random["cuda"], self.device)
            self.criterion.set(state["loss_sum"], state["correct"])
        self.epoch_start = random["epoch_start"]
        self.shuffle.set_state(self.epoch_start)
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds = state["seconds"]
        self.history = list(state["history"])


def environment(device: torch.device, processes: Processes) -> dict[str, str | int]:
    """What may change the last bits of a result besides the settings."""
    return {
        "torch": str(torch.__version__),  # a subclass of str, which weights_only would refuse
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": processes.size,
    }


# ---- training ------------------------------------------------------------------------------------


def train_epoch(run: Run, data: Batches, after_step: Callable[[], None]) -> dict[str, float]:
    """Train on every image once, or finish the epoch that a checkpoint was written in.

    Returns:
        The training columns of the metrics.
    """
    from tqdm import tqdm  # main() has seen that it is there

    size = run.settings.batch_size
    order = torch.randperm(len(data), generator=run.shuffle).to(run.device)
    batches = order.split(size)
    done = min(run.step * size, len(data))
    seen = done  # by this process's sums, which the first has taken over from a checkpoint
    run.parallel.train()
    # Set anew at every pause, so that pauses do not count.
    started = time.perf_counter()
    with tqdm(
        total=len(data),
        initial=done,
        desc=f"epoch {run.epoch + 1}/{run.settings.epochs}",
        unit=" images",
        leave=False,
        # No bar where stderr is a file.
        disable=None if run.processes.first else True,
    ) as bar:
        for index in batches[run.step :]:
            share = run.processes.share(index)
            if run.processes.size > 1:
                # The average over the processes is then the mean over the batch.
                run.criterion.divisor = len(index) / run.processes.size
            images, labels = data.gather(share)
            fusedcnn.train_step(run.parallel, run.criterion, run.optimizer, images, labels)
            run.step += 1
            done += len(index)
            seen += len(share)
            # Twenty looks at the running sums an epoch: each waits for the device.
            if not bar.disable and run.step % max(1, len(batches) // 20) == 0:
                loss, accuracy = run.criterion.loss_sum / seen, run.criterion.correct / seen
                sums = {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.2%}"}
                bar.set_postfix(sums, refresh=False)
                bar.update(done - bar.n)
            now = time.perf_counter()
            run.seconds += now - started
            after_step()
            started = time.perf_counter()
    loss_sum = run.processes.total(run.criterion.loss_sum).item()
    correct = run.processes.total(run.criterion.correct).item()
    run.seconds += time.perf_counter() - started  # the device has finished only now
    return {
        "train_loss": loss_sum / len(data),
        "train_accuracy": correct / len(data),
        "seconds": run.seconds,
        "images_per_second": len(data) / run.seconds,
    }


@torch.no_grad()
def predict(model: nn.Module, data: Batches) -> Tensor:
    """The logits [N, num_classes] of all images, with dropout off."""
    model.eval()
    everything = torch.arange(len(data), device=data.labels.device)
    return torch.cat([model(data.gather(index)[0]) for index in everything.split(EVALUATION_BATCH)])


def evaluate(model: nn.Module, data: Batches) -> dict[str, float]:
    """The test columns of the metrics."""
    logits = predict(model, data)
    return {
        "test_loss": F.cross_entropy(logits, data.labels).item(),
        "test_accuracy": (logits.argmax(1) == data.labels).sum().item() / len(data),
    }


def train(run: Run, train_data: Batches, test_data: Batches, output: Path, every: int) -> None:
    """Train up to ``settings.epochs``, writing checkpoint and metrics after each epoch.

    Args:
        run: starts from where it stands.
        train_data: to learn from.
        test_data: to measure with.
        output: folder for the files.
        every: steps between checkpoints within an epoch; 0: none.

    Raises:
        StoppedError: a file cannot be written, or the loss is no longer a number; the last
            checkpoint is whole.
    """

    def check(loss: float) -> None:
        if not math.isfinite(loss):
            raise StoppedError(
                f"the loss is {loss} in epoch {run.epoch + 1}: start again with a --lr below "
                f"{run.settings.lr:g}; the checkpoint in {output} is from before"
            )

    def after_step() -> None:
        if every and run.step % every == 0:
            check(run.processes.total(run.criterion.loss_sum).item())
            save(run, output)

    # So that a run killed in its first epoch can be resumed as well, and so that the metrics
    # agree with the checkpoint where a kill came between the two.
    save(run, output)
    while run.epoch < run.settings.epochs:
        row = {"epoch": run.epoch + 1, **train_epoch(run, train_data, after_step)}
        row |= evaluate(run.model, test_data)
        check(row["train_loss"] + row["test_loss"])
        run.history.append({column: row[column] for column in COLUMNS})
        run.epoch_start = run.shuffle.get_state()
        run.epoch, run.step, run.seconds = run.epoch + 1, 0, 0.0
        run.criterion.set(0.0, 0)
        save(run, output)
        print(describe(row, run.settings.epochs), flush=True)


def save(run: Run, output: Path) -> None:
    """Write the checkpoint, then the metrics that belong to it; all processes have to call."""
    state = run.state_dict()
    if not run.processes.first:
        return
    with writing(output):
        save_checkpoint(output / CHECKPOINT, state)
        write_atomically(output / "metrics.csv", metrics_csv(run.history))


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn a write that failed into one line that says what is safe."""
    try:
        yield
    except OSError as error:
        raise StoppedError(
            f"--output: cannot write {error.filename or output}: {error.strerror}; files already "
            f"in {output} are whole: --resume {output} goes on from its last checkpoint"
        ) from error


def metrics_csv(history: Sequence[dict[str, float]]) -> bytes:
    """The metrics as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([f"{row[column]:.7g}" for column in COLUMNS] for row in history)
    return text.getvalue().encode()


def describe(row: dict[str, float], epochs: int) -> str:
    """One epoch of the metrics as a line for people."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   "
        f"train loss {row['train_loss']:.4f}  accuracy {row['train_accuracy']:6.2%}   "
        f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:6.2%}   "
        f"{row['seconds']:.2f} s, {row['images_per_second']:,.0f} images/s"
    )


def draw(run: Run, data: Dataset, test_data: Batches, output: Path) -> None:
    """Write the curves, and the first test images with what the model takes them for."""
    import pictures  # main() has seen that matplotlib is there

    last = run.history[-1]
    speed = len(run.history) * run.data["train"] / sum(row["seconds"] for row in run.history)
    what = f"{type(run.model).__name__}, {data.source}"
    probabilities = predict(run.model, test_data).softmax(1).cpu()[:PICTURED_IMAGES]
    curves = pictures.draw_curves(run.history, f"{what}: {speed:,.0f} images/s in training")
    predictions = pictures.draw_predictions(
        data.test.images[:PICTURED_IMAGES],
        data.test.labels[:PICTURED_IMAGES],
        probabilities,
        data.class_names,
        f"{what}: {last['test_accuracy']:.1%} of {len(test_data):,} test images right\n"
        f"(the first {len(probabilities)}, with the predicted class; red: wrong)",
    )
    with writing(output):
        write_atomically(output / "curves.png", curves)
        write_atomically(output / "predictions.png", predictions)


# ---- from the command line on --------------------------------------------------------------------


def load_data(settings: Settings) -> Dataset:
    """Read or draw the images.

    Raises:
        UsageError: they cannot be read.
    """
    if settings.data is None:
        return draw_dataset(settings.train_images, settings.test_images)
    try:
        data = read_cifar10(Path(settings.data))
    except DataError as error:
        raise UsageError(f"--data: {error}") from error
    counts = []
    for name in ("train", "test"):
        there = len(getattr(data, name).labels)
        wanted = getattr(settings, f"{name}_images")
        if wanted is not None and wanted > there:
            raise UsageError(
                f"--{name}-images: expected at most {there}, as many as there are in "
                f"{settings.data}, got {wanted}"
            )
        counts.append(there if wanted is None else wanted)
    return data.first(*counts)


def resume(run: Run, plan: Plan) -> None:
    """Bring ``run`` to where the checkpoint was written, and say what is not as it was then.

    Raises:
        UsageError: the checkpoint belongs to other images.
        CheckpointError: its parameters do not fit.
    """
    state, path = plan.state, plan.checkpoint
    if state["data"].get("fingerprint") != run.data["fingerprint"]:
        raise UsageError(
            f"--data, --train-images, --test-images: expected the images of {path} "
            f"({state['data'].get('source')}, {state['data'].get('train')} + "
            f"{state['data'].get('test')}), got others "
            f"({run.data['source']}, {run.data['train']} + {run.data['test']})"
        )
    try:
        run.load_state_dict(state)
    except Exception as error:  # whatever odd content makes torch raise
        raise CheckpointError(f"{path} does not fit this model: {first_line(error)}") from error
    print(f"resumed {path}: {run.epoch} epochs and {run.step} steps are done")
    before = {"processes": 1, **state["environment"], "model": state["settings"]["model"]}
    now = {**environment(run.device, run.processes), "model": run.settings.model}
    for name, value in now.items():
        if before.get(name) != value:
            print(
                f"note: {name} was {before.get(name)}, is {value}: the result may differ from an "
                "uninterrupted run's by rounding"
            )


def run_training(arguments: Sequence[str] | None) -> None:
    """Do what the command line says."""
    for package in ("tqdm", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is missing: pip install 'fusedcnn[examples]'")
    options = parse_arguments(arguments)
    plan = make_plan(options)
    prepare_output(plan.output)
    if "threads" in options:
        torch.set_num_threads(options.threads)
    local_rank = described_by_environment().local_rank
    default_device = torch.device("cuda", local_rank) if torch.cuda.is_available() else "cpu"
    device = torch.device(getattr(options, "device", default_device))
    with joined(device) as processes:
        run_process(plan, device, processes, options.checkpoint_steps)


def run_process(
    plan: Plan, device: torch.device, processes: Processes, checkpoint_steps: int
) -> None:
    """Do this process's part of it: all of it, unless torchrun has started several."""
    settings = plan.settings
    data = load_data(settings)
    mean, std = channel_statistics(data.train.images)
    train_data = Batches(data.train, mean, std, device)
    test_data = Batches(data.test, mean, std, device)
    about = {
        "source": data.source,
        "fingerprint": data.fingerprint,
        "train": len(train_data),
        "test": len(test_data),
        "class_names": data.class_names,
        "mean": mean,
        "std": std,
    }
    run = Run(settings, about, device, processes)
    processes.wait()  # nothing is written before all have looked at what is there
    if plan.checkpoint is not None:
        resume(run, plan)
    elif processes.first:
        with writing(plan.output):
            for old in ("curves.png", "predictions.png"):  # of the run that --overwrite replaces
                (plan.output / old).unlink(missing_ok=True)

    workers = "" if processes.size == 1 else f"{processes.size} processes, "
    print(
        f"{type(run.model).__name__} on {device}, {workers}{torch.get_num_threads()} threads; "
        f"{data.source}: {len(train_data)} training and {len(test_data)} test images"
    )
    if run.epoch >= settings.epochs:
        print(f"nothing to train: {run.epoch} of --epochs {settings.epochs} are done")
    train(run, train_data, test_data, plan.output, checkpoint_steps)
    if processes.first:
        draw(run, data, test_data, plan.output)
    print(f"checkpoint.pt, metrics.csv, curves.png and predictions.png are in {plan.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run_training(arguments)
    except (UsageError, CheckpointError) as error:
        prefix = "--resume: " if isinstance(error, CheckpointError) else ""
        print(f"train_cifar10.py: error: {prefix}{error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(f"train_cifar10.py: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "train_cifar10.py: interrupted; --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
