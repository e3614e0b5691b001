"""Runs the benchmarks' scripts as their users do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ["--batch-sizes", "2", "--min-time", "0.001", "--rounds", "2", "--threads", "1"]

# Seconds for one run of a script with few rounds; it takes a few on an idle machine.
TIMEOUT = 300


def run_json(name: str, folder: Path, *arguments: str) -> tuple[str, dict]:
    """Run benchmarks/<name>.py, which must succeed; return what it printed, and its JSON."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", "out.json"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads((folder / "out.json").read_text())
