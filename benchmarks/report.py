"""The report of all scripts: JSON, written after every result, and tables for people."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from argparse import Namespace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import fusedcnn
import torch
from options import CORES
from rich.console import Console
from rich.table import Table
from timing import Precision, force_kernel, measure_limits
from tqdm import tqdm

# A choice this near to the quickest kernel's time is a good one.
SELECTION_MARGIN = 1.1

# Columns of a table on a pipe or in a file, which have no width of their own.
WIDTH = 200

LEGEND = """\
IQR: between the quartiles of the rounds, in % of the median. Of peak: FLOPs of the direct
convolutions and full gradients / time / peak (the FMA's, half of it in float64; on a GPU the
GEMM's), over 100 % where work is skipped. Of copy: bytes read and written once / time / copy."""


class Report:
    """What a run measured: plain values, which become JSON and tables.

    A result is a head of names and numbers, such as case, batch and threads; ``status``; ``rows``,
    each with ``name``, ``status`` and either a median with its quartiles or a ``reason``; and what
    :func:`timing.at_best`, :func:`contenders.race` and the scripts add. ``total`` results are to
    come.
    """

    def __init__(self, options: Namespace, total: int) -> None:
        asked = {name: value for name, value in vars(options).items() if value and name != "json"}
        self.values: dict[str, Any] = {
            "status": "right",
            "options": _plain(dict(sorted(asked.items()))),
            "machine": describe_machine(options.device),
            "limits": [],
            "results": [],
            "not_run": [],
        }
        self._options = options
        self._limits: dict[tuple, dict[str, Any]] = {}
        self._end = time.monotonic() + (options.time_limit or float("inf"))
        self._bar = tqdm(total=total, unit="result", dynamic_ncols=True)
        self._label = ""

    def begin(self, head: dict[str, Any]) -> bool:
        """Say which result comes next; False where the time is over."""
        self._label = _text(head)
        self.say("setting up")
        if time.monotonic() < self._end:
            return True
        self.values["not_run"].append(head)
        self._bar.update()
        return False

    def say(self, text: str) -> None:
        """Say what is going on in this result."""
        self._bar.set_description(f"{self._label}: {text}")

    def limits(self, threads: int, precision: Precision, isa: str | None = None) -> dict[str, Any]:
        """What the machine can do at most, measured once: see :func:`timing.measure_limits`."""
        key = (threads, precision.name, isa)
        if key not in self._limits:
            self.say("limits of the machine")
            with force_kernel(self._options.device, isa=isa):
                self._limits[key] = measure_limits(threads, precision, self._options.device)
            head = {"threads": threads, "precision": precision.name} | ({"isa": isa} if isa else {})
            self.values["limits"].append(head | self._limits[key])
        return self._limits[key]

    def add(self, head: dict[str, Any], result: dict[str, Any]) -> None:
        """Take a result in, and write what there is so far."""
        self.values["results"].append(head | result)
        self._bar.update()
        self._write()

    def finish(self) -> int:
        """Write and print everything; return the exit status."""
        self._bar.close()
        info, kind = fusedcnn.build_info(), self._options.device.type
        self.values["notes"] = [f"fused on {kind}: {info['devices'][kind]}"] + [
            f"fused: {count} calls were computed by the stock layers: {reason}"
            for reason, count in info["stock_calls"].items()
        ]
        self._write()
        print_report(self.values)
        return 0 if self.values["status"] == "right" else 1

    def _write(self) -> None:
        statuses = {result["status"] for result in self.values["results"]}
        if "wrong" in statuses:
            self.values["status"] = "wrong"
        elif "incomplete" in statuses or self.values["not_run"]:
            self.values["status"] = "incomplete"
        if self._options.json:
            write_json(self.values, self._options.json)


def _plain(value: Any) -> Any:
    """A value as JSON has it; objects by their name, floats with six digits."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str | int | None):
        return value
    return getattr(value, "name", None) or str(value)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write values with a record to a line: each entry, or what it lists."""
    entries = []
    for name, value in _plain(values).items():
        lines = [json.dumps(value)]
        if isinstance(value, list) and value:
            records = [f"  {json.dumps(one)}," for one in value]
            lines = ["[", *records[:-1], records[-1].removesuffix(","), " ]"]
        entries.append(f" {json.dumps(name)}: " + "\n".join(lines))
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


# ---- tables --------------------------------------------------------------------------------------


def print_report(values: dict[str, Any]) -> None:
    """Print everything that a person wants to know."""
    machine, results = values["machine"], values["results"]
    software = (f"{name} {machine[name]}" for name in ("torch", "fusedcnn", "commit", "isa"))
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['gpu'] or 'no GPU used'}")
    print(", ".join(software))
    for limits in values["limits"]:
        rates = (f"{k.replace('_', ' ')} {v:.1f}" for k, v in limits.items() if "_" in k and v)
        head = {name: value for name, value in limits.items() if "_" not in name}
        print(f"limits, {_text(head)}: {', '.join(rates)}")
    for note in values["notes"]:
        print(f"note: {note}")
    if results:
        heads = [_head(result) for result in results]
        same = {k: v for k, v in heads[0].items() if all(head.get(k) == v for head in heads)}
        varying = [name for name in heads[0] if name not in same]
        print(f"for all: {_text(same)}")
        _print_rows(results, varying)
        _print_speedups(results, varying)
        _print_reasons(results)
    for head in values["not_run"]:
        print(f"NOT RUN, --time-limit was over: {_text(head)}")
    if saved := values.get("saved_bytes"):
        print("Bytes saved for the backward, parameters left out:")
        _print_table([[row] for row in saved])


def _print_rows(results: list[dict[str, Any]], varying: list[str]) -> None:
    """What was measured: a row for each contender or kernel, and a section for each result."""
    sections = []
    for result in results:
        sections.append([])
        for row in result["rows"]:
            mark = " *" if row["name"] == result.get("selected") else ""
            cells = {name: result[name] for name in varying} | {"": row["name"] + mark}
            micros = row.get("median_us")
            cells["median us"] = row["status"] if micros is None else f"{micros:,.1f}"
            if micros is not None:
                cells["IQR"] = f"{100 * (row['q3_us'] - row['q1_us']) / micros:.0f} %"
                if "flops" in result:
                    cells["GFLOP/s"] = f"{1e-3 * result['flops'] / micros:,.1f}"
                    cells["of peak"] = f"{100 * result['peak_us'] / micros:.0f} %"
                    cells["of copy"] = f"{100 * result['copy_us'] / micros:.0f} %"
                cells |= {part: f"{us:,.1f}" for part, us in row.get("parts_us", {}).items()}
            sections[-1].append(cells)
    _print_table(sections)
    if "flops" in results[0]:
        print(LEGEND)
    if "selected" in results[0]:
        print("*: what selection chooses.")
        _print_selection(results)


def _print_selection(results: list[dict[str, Any]]) -> None:
    """How often selection chose the quickest kernel, or one that is nearly as quick."""
    good, compared = 0, 0
    for result in results:
        medians = {row["name"]: row["median_us"] for row in result["rows"] if "median_us" in row}
        if len(medians) < 2 or result["selected"] not in medians:
            continue
        compared += 1
        quickest = min(medians, key=medians.__getitem__)
        behind = medians[result["selected"]] / medians[quickest]
        good += behind <= SELECTION_MARGIN
        if behind > SELECTION_MARGIN:
            print(
                f"selection: {_text(_head(result))}: {result['selected']}, "
                f"but {quickest} is {behind:.2f} times as fast"
            )
    print(f"selection: {good} of {compared} choices within 10 % of the quickest kernel")


def _print_speedups(results: list[dict[str, Any]], varying: list[str]) -> None:
    rows = []
    for result in results:
        head = {name: result[name] for name in varying}
        if result["status"] == "wrong":
            rows.append(head | {"": "WRONG, not timed"})
        medians = {row["name"]: row.get("median_us") for row in result["rows"]}
        for one in result.get("speedups", ()):
            own, peer = one["own"], one["best_peer"]
            rows.append(head | {
                "": own, "us": f"{medians[own]:,.1f}", "best other": peer,
                "its us": f"{medians[peer]:,.1f}", "times as fast": f"{one['ratio']:.2f}",
                "quartiles": f"{one['q1']:.2f} to {one['q3']:.2f}",
                "kernels": ", ".join(result.get("kernels", ())),
            })  # fmt: skip
    _print_table([rows])


def _print_reasons(results: list[dict[str, Any]]) -> None:
    """Why rows have no time, each reason once; and what a GPU's calls launch."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        head = _text(_head(result))
        for row in result["rows"]:
            if "reason" in row:
                text = f"{row['name']}: {row['status']}: {row['reason']}"
                reasons.setdefault(text, []).append(head)
            for launch, micros in row.get("launches_us", {}).items():
                print(f"{head}, {row['name']}: {micros:.1f} us in {launch[:80]}")
    for text, heads in reasons.items():
        print(f"{text} [{heads[0]}{f', and {len(heads) - 1} more' if heads[1:] else ''}]")


def _print_table(sections: list[list[dict[str, Any]]]) -> None:
    """Print rows, each its cells by column, with a line between sections; nothing for no rows."""
    columns = list(dict.fromkeys(name for rows in sections for row in rows for name in row))
    if not columns:
        return
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for rows in sections:
        for row in rows:
            table.add_row(*(str(row.get(name, "")) for name in columns))
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def _head(result: dict[str, Any]) -> dict[str, Any]:
    """What a result is of: the entries before its status."""
    names = list(result)
    return {name: result[name] for name in names[: names.index("status")]}


def _text(head: dict[str, Any]) -> str:
    counted = {"batch": "batch {}", "threads": "{} thread(s)"}
    return ", ".join(counted.get(name, "{}").format(value) for name, value in head.items())


# ---- the machine ---------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on: hardware, software, commit, date; no paths."""
    build = fusedcnn.build_info()
    commit = _first_line("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu[1].strip() if cpu else platform.processor() or platform.machine(),
        "cores": CORES,
        "isa": next(isa["name"] for isa in build["isas"] if isa["selected"]),
        "gpu": None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": next((d.version for d in metadata.distributions(name="onnxruntime")), None),
        "fusedcnn": build["version"],
        "compiler": build["compiler"],
        "commit": commit or os.environ.get("FUSEDCNN_COMMIT"),  # in a copy of the files
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        machine |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _first_line(*query),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return machine


def _first_line(*command: str) -> str | None:
    """The first line that a command prints, or None where it cannot be run."""
    how = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, **how)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.splitlines()), None)
