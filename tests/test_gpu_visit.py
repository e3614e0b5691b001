"""scripts/gpu_visit.py: what it plans, runs, refuses and reports. Nothing is built here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_visit.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_visit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def visit(script, tmp_path):
    """A visit to a machine that has a GPU and everything, on paper."""
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    return script.Visit(
        out=tmp_path / "out",
        minutes=1,
        batch_sizes=["4096", "4"],
        precisions=["float32", "tf32"],
        wheels=None,
        build="auto",
        work=tmp_path / "work",
        architectures=[],
        tools=dict.fromkeys(script.TOOLS),
        packages=dict.fromkeys(script.PACKAGES, "found"),
        gpus=[{"name": "Test", "compute_cap": "9.0"}] * 2,
    )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the script on a machine without nvidia-smi."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": "", "CUDA_HOME": "/nowhere"} | environment,
    )


RESULTS = [
    {
        "precision": "tf32", "block": "simplecnn-1", "pass": "forward", "peak_us": 1.0,
        "copy_us": 2.0, "rows": [{"name": "general", "status": "timed", "median_us": 3.0}],
    },
    {
        "case": "block1-forward", "batch": 4, "rows": [],
        "speedups": [{"own": "fused-graph", "best_peer": "eager-graph", "ratio": 3.0}],
    },
]  # fmt: skip


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ---- without a GPU -------------------------------------------------------------------------------


def test_without_a_gpu_every_stage_is_refused_with_its_reason(script, tmp_path):
    process = run(str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert process.returncode == 1, process.stderr
    report = json.loads((tmp_path / "out" / "visit.json").read_text())
    names = [stage.name for stage in script.stages(["float32", "tf32", "bfloat16"])]
    assert list(report["stages"]) == names
    for name, result in report["stages"].items():
        assert result["status"] == "not run"
        assert result["reason"] == "no GPU: nvidia-smi is missing or lists none"
        assert f"{name:<16} not run" in process.stdout
    assert f"0 passed, 0 failed, {len(names)} not run" in process.stdout
    assert report["machine"]["gpus"] == []
    assert (tmp_path / "out" / "visit.log").is_file()


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    process = run(str(out), "--work", str(work), "--dry-run", "--architectures", "90")
    assert process.returncode == 0, process.stderr
    assert "bench-tf32 (at most 120 s)" in process.stdout
    assert "--tool racecheck --error-exitcode 3" in process.stdout
    assert "the package, for this GPU\n    NOT RUN: no nvcc on the PATH" in process.stdout
    assert not out.exists()
    assert not work.exists()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "argument out: expected a folder, or OUT in the environment"),
        (["x", "--stages", "everything"], "--stages"),
        (["x", "--precisions", "int8"], "--precisions"),
        (["x", "--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["x", "--batch-sizes", "-4"], "--batch-sizes"),
        (["x", "--batch-sizes", "many"], "--batch-sizes: expected positive integers, got 'many'"),
        (["x", "--architectures", "sm_90"], "--architectures: expected numbers such as 90"),
        (["x", "--wheels", "/nowhere"], "--wheels: expected a folder of wheels, got /nowhere"),
    ],
)
def test_bad_arguments(arguments, answer, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    process = run(*arguments)
    assert process.returncode == 2
    assert answer in process.stderr


# ---- running stages ------------------------------------------------------------------------------


def test_a_failing_stage_stops_only_those_that_need_it(script, visit, capsys):
    stage = script.Stage
    report = visit.out / "r.json"
    text = json.dumps({"results": RESULTS})
    write = f"open({str(report)!r}, 'w').write({text!r})"
    plan = [
        stage("first", "", 20, lambda v: [python("print('made')"), python("exit(7)"), python("")]),
        stage("needs it", "", 20, lambda v: [python("")], after=("first",)),
        stage("other", "", 20, lambda v: [python(write)], after=(), report="r.json"),
        stage("after", "", 20, lambda v: [python("")], after=("other",)),
        stage("says so", "", 20, lambda v: [python("print('0 passed')")], bad=r"(?m)^0 passed"),
        stage("no such", "", 20, lambda v: [["/nowhere/program"]]),
    ]
    assert script.run(plan, visit) == 1
    stages = json.loads((visit.out / "visit.json").read_text())["stages"]
    statuses = {name: (one["status"], one["reason"]) for name, one in stages.items()}
    assert statuses["first"][0] == "failed"
    assert statuses["first"][1].startswith("exit status 7 of: ")
    assert statuses["needs it"] == ("not run", "needs stage first, which was failed")
    assert statuses["other"] == statuses["after"] == ("passed", "")
    assert statuses["says so"][0] == statuses["no such"][0] == "failed"
    assert stages["other"]["report"] == json.loads(text)
    assert not report.exists()
    log = (visit.out / "visit.log").read_text()
    assert "==== first" in log
    assert "\nmade\n" in log
    printed = capsys.readouterr().out
    assert "2 passed, 3 failed, 1 not run" in printed
    assert "other: block1-forward, batch 4: fused-graph 3.00 x eager-graph\n" in printed
    assert "other: tf32, simplecnn-1, forward, general: 3.0 us, 1.50 x its floor\n" in printed


def test_a_stage_beyond_its_limit_is_ended_with_its_children(script, visit):
    alive = visit.work / "alive"
    child = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    code = (
        "import subprocess, sys; print('begun', flush=True);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    plan = [script.Stage("slow", "", 1, lambda v: [python(code)])]
    begin = time.monotonic()
    assert script.run(plan, visit) == 1
    assert time.monotonic() - begin < 3
    result = visit.results["slow"]
    assert result["status"] == "failed"
    assert result["reason"].startswith("ran out of time in: ")
    assert "begun" in result["output_end"]
    time.sleep(max(0, begin + 4 - time.monotonic()))
    assert not alive.exists()


def test_when_the_visit_is_over_nothing_more_begins(script, visit):
    visit.minutes = 1e-9
    assert script.run([script.Stage("late", "", 20, lambda v: [python("")])], visit) == 1
    assert "minutes were over" in visit.results["late"]["reason"]


def test_stages_of_a_group_run_side_by_side(script, visit):
    """Each waits for the other's file."""

    def wait(own: str, other: str):
        code = (
            f"import pathlib, time; pathlib.Path({own!r}).touch()\n"
            f"while not pathlib.Path({other!r}).exists(): time.sleep(0.01)"
        )
        return lambda v: [python(code)]

    plan = [
        script.Stage("one", "", 20, wait("a", "b"), group="build"),
        script.Stage("two", "", 20, wait("b", "a"), group="build"),
        script.Stage("three", "", 20, lambda v: [python("")]),
    ]
    assert script.run(plan, visit) == 0


@pytest.mark.parametrize("what", ["tools", "packages"])
def test_what_is_missing_is_named(script, visit, what):
    stage = script.Stage("x", "", 1, lambda v: [], ("ncu",), ("pytest",))
    visit.tools["ncu"] = "/bin/ncu"
    assert script.why_not(stage, visit) == ""
    getattr(visit, what)[{"tools": "ncu", "packages": "pytest"}[what]] = None
    named = {"tools": "no ncu", "packages": "no Python package pytest"}[what]
    assert script.why_not(stage, visit).startswith(named)


# ---- the plan ------------------------------------------------------------------------------------


def test_builds_are_for_the_gpus_present_alone(script, visit):
    assert visit.cmake_architectures == "90-real"
    for commands in (script.build_tests(visit), script.build_package(visit)):
        assert any("CMAKE_CUDA_ARCHITECTURES=90-real" in part for part in chain(*commands))


def test_without_the_build_backend_cmake_builds_alone(script, visit):
    assert script.build_package(visit)[0][1:3] == ["-m", "pip"]
    visit.packages["pybind11"] = None
    commands = script.build_package(visit)
    assert not any("pip" in command for command in commands)
    assert any(part.startswith("-Dpybind11_DIR=") for part in chain(*commands))


def test_stages_come_after_those_that_they_need(script):
    plan = {stage.name: stage for stage in script.stages(["float32", "tf32", "bfloat16"])}
    assert all(0 < stage.limit < 570 for stage in plan.values())
    for stage in plan.values():
        assert set(stage.after) <= set(plan)
        assert list(plan).index(stage.name) > max(map(list(plan).index, stage.after), default=-1)


def test_every_file_with_cuda_tests_is_run(script):
    names = {Path(file).name for file in script.cuda_tests()}
    assert {"test_cuda.py", "test_graphs.py", "test_bench_cuda.py"} <= names
    assert "test_gpu_visit.py" not in names


def test_preparing_for_cmake_alone(script, tmp_path):
    script.prepare(tmp_path / "work", tmp_path / "site")
    text = (tmp_path / "work/pybind11/pybind11Config.cmake").read_text()
    include = Path(text.split('"')[1])
    assert (include / "pybind11/pybind11.h").is_file()
    assert (tmp_path / "site/fusedcnn/_cuda.py").is_file()
