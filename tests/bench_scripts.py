"""Runs the benchmarks' scripts as their users do, and loads their modules one by one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Seconds for one run of a script with few rounds; it takes a few on an idle machine.
TIMEOUT = 300

# Runs a script as __main__ after PREPARE, from any folder.
DRIVER = """
import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = [{script!r}, *sys.argv[1:]]
{prepare}
runpy.run_path({script!r}, run_name="__main__")
"""

REFUSE_TIMING = """
import timing
def refuse(*args, **kwargs):
    raise AssertionError("timed")
timing.time_by_turns = refuse
"""

# A fused block that is off by a thousandth, far beyond rounding and far below what an eye sees.
SPOIL_FUSED = """
import fusedcnn.modules
right = fusedcnn.modules.conv_relu_max_pool2d
fusedcnn.modules.conv_relu_max_pool2d = lambda *args, **kwargs: 1.001 * right(*args, **kwargs)
"""

# Calls main with each list of arguments, in one process because importing torch takes a while.
BAD_ARGUMENTS_DRIVER = """
import contextlib, importlib, io, json, sys
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])

def run(options):
    raise AssertionError("computed")

script.run = run
answers = {}
for name, arguments in json.load(sys.stdin).items():
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            status = script.main(arguments)
        except SystemExit as exit:
            status = exit.code
    answers[name] = [status, errors.getvalue()]
print(json.dumps(answers))
"""


def run_script(
    name: str, folder: Path, *arguments: str, prepare: str = ""
) -> subprocess.CompletedProcess:
    """Run benchmarks/<name>.py in a folder, after some Python that changes what it will meet."""
    script = str(BENCHMARKS / f"{name}.py")
    driver = DRIVER.format(folder=str(BENCHMARKS), script=script, prepare=prepare)
    return subprocess.run(
        [sys.executable, "-c", driver, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def run_json(name: str, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run a script that must succeed; return the process and its JSON."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments, "--json", "out.json"]
    process = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert process.returncode == 0, process.stderr
    return process, json.loads((folder / "out.json").read_text())


def answers_to(
    name: str, folder: Path, arguments: dict[str, list[str]]
) -> dict[str, tuple[int, str]]:
    """Exit status and stderr of a script for each list of arguments; nothing is computed."""
    process = subprocess.run(
        [sys.executable, "-c", BAD_ARGUMENTS_DRIVER, str(BENCHMARKS), name],
        cwd=folder,
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def without(*packages: str) -> str:
    """Make imports of these packages fail as if they were not installed."""
    return f"for name in {packages!r}:\n    sys.modules[name] = None"


def load(name: str) -> ModuleType:
    """Import one of the benchmarks' modules that needs none of its siblings."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
