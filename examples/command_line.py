"""What the command line of train_cifar10.py means, and what is wrong with it."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from checkpoints import CHECKPOINT, CheckpointError, first_line, load_checkpoint


class UsageError(ValueError):
    """Bad input, found before anything was computed; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What the result of a run depends on; its checkpoint carries it.

    Attributes:
        model: "fused" or "stock".
        epochs: in all, those before a resumption included.
        batch_size: images in a batch; the last of an epoch may be smaller.
        lr: Adam's learning rate.
        seed: of the parameters, the order of the images and the dropout.
        data: folder with CIFAR-10's binary files; None: drawn images.
        train_images: how many; None: all of the folder, or the default of the drawn ones.
        test_images: likewise.
    """

    model: str = "fused"
    epochs: int = 8
    batch_size: int = 128
    lr: float = 1e-3
    seed: int = 0
    data: str | None = None
    train_images: int | None = None
    test_images: int | None = None


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        settings: from the command line and, where it is silent, the checkpoint.
        output: folder for the files.
        checkpoint: the file that is resumed, if any.
        state: its contents.
    """

    settings: Settings
    output: Path
    checkpoint: Path | None = None
    state: dict[str, Any] | None = None


# ---- arguments -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UsageErrors: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def whole_number(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type for whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limit = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number, {limit}, got {text!r}")
        return value

    return parse


def positive_number(text: str) -> float:
    """An argparse type for finite numbers over 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number over 0, got {text!r}")
    return value


def usable_device(text: str) -> torch.device:
    """An argparse type for devices that this torch can compute on."""
    try:
        device = torch.device(text)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # by device: RuntimeError, AssertionError, NotImplementedError, ...
        raise argparse.ArgumentTypeError(
            f"expected a device that this torch can use, got {text!r}: {first_line(error)}"
        ) from error
    return device


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a setting that is not given is absent from the result.

    Raises:
        UsageError: an argument is unknown or its value is not what is expected.
    """
    parser = Parser(
        prog="train_cifar10.py",
        description="Train SimpleCNN on CIFAR-10, from stock layers or fused.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    settings = parser.add_argument_group("settings (with --resume, the checkpoint's by default)")
    add = settings.add_argument
    add("--data", metavar="DIR", help="CIFAR-10's binary files; default: images drawn here")
    add("--model", choices=("fused", "stock"), help="default: fused")
    add("--epochs", type=whole_number(1), metavar="N", help="in all, resumed ones too; default: 8")
    add("--batch-size", type=whole_number(1), metavar="N", help="default: 128")
    add("--lr", type=positive_number, metavar="X", help="Adam's; default: 1e-3")
    add("--seed", type=whole_number(0), metavar="N", help="of parameters and order; default: 0")
    number = whole_number(1, 1_000_000)  # 3 GB
    limit = "take the first N {} images of --data (default: all), or draw N (default: {})"
    add("--train-images", type=number, metavar="N", help=limit.format("training", 10_000))
    add("--test-images", type=number, metavar="N", help=limit.format("test", 2_000))

    add = parser.add_argument
    add("--device", type=usable_device, help="such as cpu or cuda:0; default: cuda, else cpu")
    add("--threads", type=whole_number(1, 1024), metavar="N", help="default: torch's choice")
    add("--output", type=Path, metavar="DIR", help="default: runs/<data>-<model>-seed<seed>")
    add("--overwrite", action="store_true", help="replace the run that --output holds")
    add(
        "--resume",
        nargs="?",
        type=Path,
        metavar="PATH",
        help="continue a checkpoint, or the one in a folder; without PATH, the one in --output",
    )
    add(
        "--checkpoint-steps",
        type=whole_number(0),
        metavar="N",
        default=0,
        help="write a checkpoint every N steps, too; default: only after each epoch",
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--lr" in arguments[:-1]:
        # argparse takes "-1e-3" for an option, and would not say what came.
        at = arguments.index("--lr")
        arguments[at : at + 2] = [f"--lr={arguments[at + 1]}"]
    return parser.parse_args(arguments)


# ---- files ---------------------------------------------------------------------------------------


def default_output(settings: Settings) -> Path:
    """The folder for a run's files."""
    data = "drawn" if settings.data is None else "cifar10"
    return Path("runs") / f"{data}-{settings.model}-seed{settings.seed}"


def make_plan(options: argparse.Namespace) -> Plan:
    """Bring the command line and the checkpoint together.

    Raises:
        UsageError: they do not agree, or the output folder holds another run.
        CheckpointError: the checkpoint cannot be used.
    """
    given = {key: vars(options)[key] for key in asdict(Settings()) if key in options}
    if "data" in given:
        given["data"] = os.path.abspath(given["data"])  # to be found from other folders, too
    settings = replace(Settings(), **given)
    plan = Plan(settings, getattr(options, "output", default_output(settings)))
    if "resume" in options:
        path = options.resume or plan.output
        # os.path's tests, unlike Path's, hold where a folder on the way cannot be entered.
        plan.checkpoint = path / CHECKPOINT if os.path.isdir(path) else path
        plan.state = load_checkpoint(plan.checkpoint)
        plan.settings = _resumed_settings(given, plan.state["settings"], plan.checkpoint)
        if "output" not in options:
            same = plan.settings.model == plan.state["settings"]["model"]
            plan.output = plan.checkpoint.parent if same else default_output(plan.settings)
    existing = plan.output / CHECKPOINT
    resumes_it = plan.checkpoint is not None and (
        os.path.realpath(existing) == os.path.realpath(plan.checkpoint)
    )
    if os.path.exists(existing) and not resumes_it and "overwrite" not in options:
        raise UsageError(
            f"--output: {plan.output} holds a run already: --resume continues it, --overwrite "
            "replaces it, another --output keeps it"
        )
    return plan


def _resumed_settings(given: dict[str, Any], saved: dict[str, Any], path: Path) -> Settings:
    """The checkpoint's settings with the command line's in front, if those may differ."""
    expected = asdict(Settings())
    if saved.keys() != expected.keys():
        raise CheckpointError(f"{path}: expected settings {list(expected)}, got {list(saved)}")
    for name in ("batch_size", "lr", "seed"):
        if given.get(name, saved[name]) != saved[name]:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected {saved[name]} as in {path}, which is to be "
                f"resumed, got {given[name]}"
            )
    return Settings(**{**saved, **given})


def prepare_output(output: Path) -> None:
    """Create the folder and see that files can be written there.

    Raises:
        UsageError: it cannot be created or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"for a file may be created on a full disk, but not filled")
    except OSError as error:
        raise UsageError(
            f"--output: expected a folder that files can be written to, got {output}: "
            f"{error.strerror}"
        ) from error
