"""scripts/gpu_visit.py: what it plans, runs, refuses and reports. Nothing is built here."""

from __future__ import annotations

import json
import re
import runpy
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "gpu_visit.py"))
Step, main, visit = SCRIPT["Step"], SCRIPT["main"], SCRIPT["visit"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("part", ["test", "profile", "benchmark", "compile"])
def test_dry_run_prints_a_plan_that_fits_and_leaves_nothing(tmp_path, capsys, part):
    work = tmp_path / "work"
    assert main([str(tmp_path / "out"), part, "--work", str(work), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for script in re.findall(r"\S+/benchmarks/\w+\.py", printed):
        assert Path(script).is_file()
    assert "pip install" in printed  # each part builds what it needs
    assert {"test": "racecheck", "profile": "ncu", "benchmark": "eager-cl-graph",
            "compile": "compile-cl-graph"}[part] in printed  # fmt: skip
    limits = [int(limit) for limit in re.findall(r"at most (\d+) s", printed)]
    assert all(0 < limit < 9.5 * 60 for limit in limits)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["everything"], "argument part: invalid choice: 'everything'"),
        (["test", "--batch-sizes", "-4"], "--batch-sizes: expected positive integers, got -4"),
        (["test", "--wheels", "/nowhere"], "--wheels: expected a folder of wheels, got /nowhere"),
        (["test", "--precision", "int8"], "--precision"),
    ],
)
def test_bad_arguments(tmp_path, arguments, answer, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "out"), *arguments])
    assert answer in capsys.readouterr().err


def test_a_failing_step_stops_no_other(tmp_path, capsys):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    slow = (
        "import subprocess, sys; print('begun', flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    plan = [
        Step("fails", 20, python("print('made'); exit(7)")),
        Step("slow", 1, python(slow)),
        Step("no such", 20, ["/nowhere/program"]),
        Step("skips", 20, python("print('3 skipped in 1 s')")),
        Step("right", 20, python("import os; print(os.environ['PYTHONPATH'])")),
    ]
    begin = time.monotonic()
    assert not visit(plan, tmp_path, tmp_path, 1)
    steps = json.loads((tmp_path / "visit.json").read_text())["steps"]
    assert [one["result"] for one in steps.values()] == [
        "failed: exit status 7",
        "failed: more than 1 s",
        "not run: no /nowhere/program",
        "failed: it says '3 skipped'",
        "passed",
    ]
    assert (tmp_path / steps["slow"]["log"]).read_text() == "begun\n"
    assert (tmp_path / steps["right"]["log"]).read_text() == f"{tmp_path}/site\n"
    assert "1 of 5 steps passed" in capsys.readouterr().out
    time.sleep(max(0, begin + 5 - time.monotonic()))
    assert not alive.exists()


def test_all_pass_and_then_the_time_is_over(tmp_path):
    plan = [Step("right", 20, python(""))]
    assert visit(plan, tmp_path, tmp_path, 1)
    assert not visit(plan, tmp_path, tmp_path, 1e-9)
    assert "not run: the time is over" in (tmp_path / "visit.json").read_text()
