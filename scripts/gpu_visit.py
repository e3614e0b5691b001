r"""One visit to a GPU machine: build, test, sanitize, measure and profile in under ten minutes.

    python scripts/gpu_visit.py OUT             # OUT: a folder for the results, or $OUT
    python scripts/gpu_visit.py OUT --stages build pytest --minutes 5
    python scripts/gpu_visit.py --dry-run       # what would run here, and what would not and why

Needs no network. Needed: Python 3.10, torch with CUDA, a GPU, nvcc, a C++20 compiler, cmake and
ninja; pytest for the tests; rich and tqdm for the benchmarks; compute-sanitizer for the sanitizers;
ncu for the counters. They are looked for first, and a stage that lacks one of its own is not run,
with the reason. With scikit-build-core and pybind11 the package is built by pip, as users build it;
without them by cmake alone, with the pybind11 headers that torch brings, into a folder that later
stages have on their PYTHONPATH. Missing Python packages can be brought along as wheels (--wheels
FOLDER). Where there is no git, FUSEDCNN_COMMIT in the environment says what the figures are of.

Each stage has a time limit of its own, and all together have --minutes; one that fails or runs out
of time stops no later one unless that needs what it makes. OUT receives visit.json (per stage:
passed, failed or not run, why, seconds, what was measured) and visit.log (all output).

Exit status: 0 when all stages passed; 1 when one failed or was not run; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("nvidia-smi", "nvcc", "c++", "cmake", "ninja", "compute-sanitizer", "ncu", "nsys")
PACKAGES = ("torch", "triton", "numpy", "pytest", "rich", "tqdm", "scikit_build_core", "pybind11")
BENCH_PACKAGES = ("rich", "tqdm")
# In --kill-after's place: seconds between asking a process group to end and making it end.
GRACE = 5
# Ends with the reason where the CUDA kernels cannot be used.
CHECK_PACKAGE = """\
import fusedcnn
info = fusedcnn.build_info()["cuda"]
print(info)
raise SystemExit(info["reason"])
"""
# What pybind11's own CMake package would define, from the headers inside torch.
PYBIND11_CONFIG = """\
function(pybind11_add_module target)
  Python_add_library(${target} MODULE WITH_SOABI ${ARGN})
  target_include_directories(${target} SYSTEM PRIVATE "@TORCH@/include")
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden)
endfunction()
"""


@dataclass(frozen=True)
class Stage:
    """One step of a visit.

    Attributes:
        name: on the command line and in the JSON.
        title: for people.
        limit: seconds.
        commands: run one after the other until one fails; see :class:`Visit` for the folders.
        tools: programs that it needs.
        packages: Python packages that it needs.
        after: stages that must have passed.
        report: a file that it writes, whose JSON goes into visit.json.
        group: stages of a group run side by side.
        bad: what no line of its output may match, whatever the exit status.
    """

    name: str
    title: str
    limit: float
    commands: Callable[[Visit], list[list[str]]]
    tools: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    report: str = ""
    group: str = ""
    bad: str = ""


@dataclass
class Visit:
    """What is there, where things go, and what has happened so far."""

    out: Path
    minutes: float
    batch_sizes: list[str]
    precisions: list[str]
    wheels: Path | None
    build: str
    work: Path
    architectures: list[str]
    tools: dict[str, str | None] = field(default_factory=dict)
    packages: dict[str, str | None] = field(default_factory=dict)
    gpus: list[dict[str, str]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def site(self) -> Path:
        """Where the package is installed: on the PYTHONPATH of every stage."""
        return self.work / "site"

    @property
    def cmake_architectures(self) -> str:
        """CMAKE_CUDA_ARCHITECTURES: what was asked for, or the GPUs present and no others."""
        found = set(self.architectures) or {g["compute_cap"].replace(".", "") for g in self.gpus}
        return ";".join(f"{one}-real" for one in sorted(found))

    @property
    def by_pip(self) -> bool:
        """Whether pip builds the package, or cmake alone."""
        if self.build == "auto":
            return all(self.packages.get(p) for p in ("scikit_build_core", "pybind11"))
        return self.build == "pip"

    def left(self) -> float:
        """Seconds until the visit is over."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    def environment(self) -> dict[str, str]:
        """Environment variables of every stage."""
        paths = [str(self.site), os.environ.get("PYTHONPATH", "")]
        compiler = self.tools.get("nvcc")
        chosen = {"CUDACXX": compiler} if compiler and "CUDACXX" not in os.environ else {}
        # cmake looks for ninja there.
        folders = dict.fromkeys(str(Path(tool).parent) for tool in self.tools.values() if tool)
        chosen["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *folders])
        return (
            os.environ
            | chosen
            | {
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "PYTHONUNBUFFERED": "1",
                "TERM": "dumb",
                "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            }
        )


# ---- stages --------------------------------------------------------------------------------------


def build_package(visit: Visit) -> list[list[str]]:
    """Commands that leave an importable package in ``visit.site``."""
    python, folder = sys.executable, str(visit.work / "package")
    define = f"-DCMAKE_CUDA_ARCHITECTURES={visit.cmake_architectures}"
    check = [python, "-c", CHECK_PACKAGE]
    if visit.by_pip:
        install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        install += ["--no-index", "--upgrade", "--target", str(visit.site), str(ROOT)]
        install += ["-C", f"build-dir={folder}", "-C", "cmake.define.FUSEDCNN_CUDA=ON"]
        install += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={visit.cmake_architectures}"]
        return [install, check]
    script = [python, str(Path(__file__).resolve())]
    configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DFUSEDCNN_CUDA=ON"]
    configure += [define, f"-DPython_EXECUTABLE={python}", "-DSKBUILD_PROJECT_VERSION=0+visit"]
    configure += [f"-DCMAKE_INSTALL_PREFIX={visit.site}"]
    if not visit.packages.get("pybind11"):
        configure += [f"-Dpybind11_DIR={visit.work / 'pybind11'}"]
    return [
        [*script, "--prepare", str(visit.work), str(visit.site)],
        configure,
        ["cmake", "--build", folder],
        ["cmake", "--install", folder],
        check,
    ]


def build_tests(visit: Visit) -> list[list[str]]:
    """Commands that build the programs that need no torch."""
    folder = str(visit.work / "kernels")
    return [
        ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", "-DFUSEDCNN_KERNELS_ONLY=ON",
         "-DFUSEDCNN_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={visit.cmake_architectures}"],
        ["cmake", "--build", folder, "--target", "fusedcnn_cuda_probe", "fusedcnn_cuda_gputest"],
    ]  # fmt: skip


def program(visit: Visit, name: str) -> str:
    """Path of a program that :func:`build_tests` built."""
    return str(visit.work / "kernels/tests/cuda_on_cpu/probe" / name)


def sanitize(tool: str, limit: float) -> Callable[[Visit], list[list[str]]]:
    """Commands that run the kernels' small cases, alone, under one of compute-sanitizer's tools."""

    def commands(visit: Visit) -> list[list[str]]:
        run = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
        # Under a sanitizer a call may take a hundred times as long; what is left out is counted.
        few = ["--quick", "--seconds", f"{0.7 * min(limit, visit.left()):.0f}"]
        return [[*run, program(visit, "fusedcnn_cuda_gputest"), *few]]

    return commands


def cuda_tests() -> list[str]:
    """The files with tests marked cuda: the others may need packages that are not there.

    The benchmarks' come last: they are slow, and say least of the kernels.
    """
    files = (ROOT / "tests").glob("test_*.py")
    files = sorted(files, key=lambda file: ("bench" in file.name, file.name))
    return [str(file) for file in files if "mark.cuda" in file.read_text()]


def benchmark(precision: str, limit: float) -> Stage:
    """The stage that runs bench_block.py at one precision."""

    def commands(visit: Visit) -> list[list[str]]:
        return [
            [sys.executable, str(ROOT / "benchmarks/bench_block.py"), "--device", "cuda",
             "--precision", precision, "--batch-sizes", *visit.batch_sizes, "--min-time", "0.1",
             "--rounds", "5", "--time-limit", f"{0.6 * min(limit, visit.left()):.0f}",
             "--json", str(visit.out / f"bench-{precision}.json")],
        ]  # fmt: skip

    return Stage(
        f"bench-{precision}",
        f"benchmark at {precision}",
        limit,
        commands,
        packages=BENCH_PACKAGES,
        after=("build",),
        report=f"bench-{precision}.json",
    )


def profile(visit: Visit) -> list[list[str]]:
    """Commands that profile every kernel."""
    large = max(visit.batch_sizes, key=int)
    return [
        [sys.executable, str(ROOT / "benchmarks/bench_kernels.py"), "--device", "cuda",
         "--batch-sizes", large, "--precision", *visit.precisions, "--time-limit", "40",
         "--json", str(visit.out / "profile.json")],
    ]  # fmt: skip


def counters(visit: Visit) -> list[list[str]]:
    """Commands that read the GPU's own counters of each kernel; clocks stay as they are."""
    return [
        ["ncu", "--clock-control", "none", "--kernel-name-base", "function",
         "--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats",
         "--kernel-name", "regex:(forward|grad_weight|grad_input)_.*kernel", "--launch-count", "40",
         sys.executable, str(ROOT / "benchmarks/bench_kernels.py"), "--device", "cuda",
         "--batch-sizes", max(visit.batch_sizes, key=int), "--precision", *visit.precisions,
         "--rounds", "2", "--min-time", "1e-6", "--no-launches"],
    ]  # fmt: skip


def stages(precisions: Iterable[str]) -> list[Stage]:
    """All stages of a visit, in order."""
    builds = ("nvcc", "c++", "cmake", "ninja")
    sanitizers = [("memcheck", 50.0), ("racecheck", 50.0), ("initcheck", 40.0)]
    return [
        Stage("build", "the package, for this GPU", 240, build_package, builds, ("torch",),
              group="build"),
        Stage("build-tests", "the programs without torch", 240, build_tests, builds, group="build"),
        Stage("probe", "what the kernels rest on, function by function", 30,
              lambda v: [[program(v, "fusedcnn_cuda_probe")]], after=("build-tests",)),
        Stage("gputest", "every kernel against the naive reference, exactly", 60,
              lambda v: [[program(v, "fusedcnn_cuda_gputest")]], after=("build-tests",)),
        Stage("pytest", "tests marked cuda", 150,
              lambda v: [[sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--durations=10",
                          "-p", "no:cacheprovider", *cuda_tests()]],
              packages=("pytest", "numpy"), after=("build",),
              # All of them skipped is no pass.
              bad=r"(?m)\bno tests ran\b|^[0-9]+ skipped"),
        *(Stage(tool, f"the kernels under compute-sanitizer {tool}", limit,
                sanitize(tool, limit), ("compute-sanitizer",), after=("build-tests",),
                # It may find nothing and exit with 0 where it could not look.
                bad=r"(?m)^0 passed|Device not supported")
          for tool, limit in sanitizers),
        Stage("profile", "every kernel beside the GPU's rates", 60, profile,
              packages=BENCH_PACKAGES, after=("build",), report="profile.json"),
        *(benchmark(precision, 120) for precision in precisions),
        Stage("counters", "the GPU's own counters, by ncu", 60, counters, ("ncu",),
              packages=BENCH_PACKAGES, after=("build",)),
    ]  # fmt: skip


# ---- what is there -------------------------------------------------------------------------------


def look_around(visit: Visit) -> None:
    """Find tools, packages and GPUs."""
    for tool in TOOLS:
        visit.tools[tool] = find_tool(tool)
    for package in PACKAGES:
        visit.packages[package] = "found" if importlib.util.find_spec(package) else None
    if visit.tools["nvidia-smi"]:
        fields = ("name", "driver_version", "compute_cap", "memory.total")
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(
            [visit.tools["nvidia-smi"], *query], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            for line in filter(None, answer.stdout.splitlines()):
                visit.gpus.append(dict(zip(fields, line.split(", "), strict=False)))


def find_tool(name: str) -> str | None:
    """Path of a program: on the PATH, beside this Python, or in the CUDA toolkit."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), f"{cuda}/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def why_not(stage: Stage, visit: Visit) -> str:
    """Why a stage cannot run here and now, or ""."""
    if stage.group == "build" and visit.architectures:
        pass  # nvcc needs no GPU
    elif not visit.gpus:
        return "no GPU: nvidia-smi is missing or lists none"
    for tool in stage.tools:
        if not visit.tools.get(tool):
            return f"no {tool} on the PATH or in CUDA_HOME"
    for package in stage.packages:
        if not visit.packages.get(package):
            return f"no Python package {package}: bring it as a wheel with --wheels"
    for other in stage.after:
        status = visit.results.get(other, {}).get("status")
        if status != "passed":
            return f"needs stage {other}, which was {status or 'not asked for'}"
    return ""


def describe(visit: Visit) -> dict[str, Any]:
    """The machine, for the report."""
    commit = os.environ.get("FUSEDCNN_COMMIT")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    if shutil.which("git"):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() or commit
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "python": sys.version.split()[0],
        "gpus": visit.gpus,
        "tools": {tool: bool(path) for tool, path in visit.tools.items()},
        "packages": {package: bool(found) for package, found in visit.packages.items()},
        "build": "pip" if visit.by_pip else "cmake",
    }


# ---- running -------------------------------------------------------------------------------------


def run_stage(stage: Stage, visit: Visit) -> None:
    """Run a stage and note what became of it."""
    limit = min(stage.limit, visit.left())
    reason = why_not(stage, visit)
    if not reason and limit <= 0:
        reason = f"the visit's {visit.minutes:g} minutes were over"
    result: dict[str, Any] = {"title": stage.title, "status": "not run", "reason": reason}
    result |= {"seconds": 0.0, "limit_s": round(limit, 1)}
    if not reason:
        begin = time.monotonic()
        result |= execute(stage, visit, begin + limit)
        result["seconds"] = round(time.monotonic() - begin, 1)
        result |= read_report(stage, visit)
    with visit.lock:
        visit.results[stage.name] = result
        write_report(visit)
    print(line(stage.name, result), flush=True)


def execute(stage: Stage, visit: Visit, deadline: float) -> dict[str, Any]:
    """Run a stage's commands; its status, the reason and the end of its output."""
    output = ""
    status, reason = "passed", ""
    for command in stage.commands(visit):
        left = deadline - time.monotonic()
        code, text = run_command(command, visit, left)
        output += f"$ {shlex.join(command)}\n{text}"
        if code is None:
            status, reason = "failed", f"ran out of time in: {shlex.join(command)[:200]}"
        elif code != 0:
            status, reason = "failed", f"exit status {code} of: {shlex.join(command)[:200]}"
        elif stage.bad and re.search(stage.bad, text):
            status, reason = "failed", f"output matches {stage.bad!r}"
        if status == "failed":
            break
    with visit.lock, (visit.out / "visit.log").open("a") as log:
        log.write(f"\n==== {stage.name}: {stage.title}\n{output}---- {status} {reason}\n")
    return {"status": status, "reason": reason, "output_end": output[-2000:]}


def run_command(command: list[str], visit: Visit, limit: float) -> tuple[int | None, str]:
    """Exit status, or None where the limit was reached, and output of a command."""
    command = [visit.tools.get(command[0]) or command[0], *command[1:]]
    # To a file: what was written before the limit must not be lost, nor wait in a pipe.
    path = visit.work / f"output-{threading.get_ident()}"
    with path.open("w") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=visit.work, env=visit.environment(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}\n"
        try:
            code = process.wait(timeout=max(0.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            if process.poll() is not None:
                break
            os.killpg(process.pid, sign)
            try:
                process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
    return code, path.read_text(errors="replace")


def read_report(stage: Stage, visit: Visit) -> dict[str, Any]:
    """The JSON that a stage has written, also one that failed after it."""
    path = visit.out / stage.report
    if not stage.report or not path.is_file():
        return {}
    report = json.loads(path.read_text())
    path.unlink()  # visit.json has it
    return {"report": report}


def write_report(visit: Visit) -> None:
    """Write visit.json as far as the visit has come."""
    report = {"machine": describe(visit), "stages": visit.results}
    (visit.out / "visit.json").write_text(json.dumps(report, indent=1) + "\n")


def line(name: str, result: dict[str, Any]) -> str:
    """One line of the summary."""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{name:<16} {result['status']:<8} {result['seconds']:6.1f} s{reason}"


def digest(results: dict[str, dict[str, Any]]) -> list[str]:
    """What was measured, and the end of what failed; visit.json and visit.log have all of it."""
    lines = []
    for name, result in results.items():
        if result["status"] == "failed":
            lines += [f"{name}: ...", *result.get("output_end", "")[-800:].splitlines()]
        report = result.get("report", {})
        for one in report.get("results", []):
            for best in one.get("speedups", [])[:1]:
                ratio = f"{best['own']} {best['ratio']:.2f} x {best['best_peer']}"
                lines.append(f"{name}: {one['case']}, batch {one['batch']}: {ratio}")
            if "pass" in one:
                floor = max(one["peak_us"], one["copy_us"])
                lines += [
                    f"{name}: {one['precision']}, {one['block']}, {one['pass']}, {row['name']}: "
                    f"{row['median_us']:.1f} us, {row['median_us'] / floor:.2f} x its floor"
                    for row in one["rows"]
                    if row["status"] == "timed"
                ]
    return lines


def prepare(work: Path, site: Path) -> None:
    """For a build by cmake alone: the Python files, and a CMake package for torch's pybind11."""
    torch = importlib.util.find_spec("torch")
    folder = work / "pybind11"
    folder.mkdir(parents=True, exist_ok=True)
    text = PYBIND11_CONFIG.replace("@TORCH@", str(Path(torch.origin).parent))
    (folder / "pybind11Config.cmake").write_text(text)
    shutil.copytree(ROOT / "python/fusedcnn", site / "fusedcnn", dirs_exist_ok=True)


def install_wheels(visit: Visit) -> None:
    """Install wheels that were brought along, where the stages find them."""
    wheels = sorted(str(path) for path in visit.wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(visit.site), *wheels], check=True)
    sys.path.insert(0, str(visit.site))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--prepare"]:  # a command of stage build
        prepare(*map(Path, arguments[1:3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # fmt: off
    add = parser.add_argument
    known = ("float32", "tf32", "bfloat16", "float16")
    add("out", nargs="?", type=Path, default=os.environ.get("OUT"),
        help="folder for visit.json and visit.log (default: $OUT)")
    add("--stages", nargs="+", metavar="STAGE", choices=[s.name for s in stages(known)],
        help="run only these: " + ", ".join(s.name for s in stages(known)))
    add("--minutes", type=float, default=9.5, help="of the whole visit (default: %(default)s)")
    add("--batch-sizes", nargs="+", default=["4096", "4"], metavar="N",
        help="of the benchmark, in this order while there is time (default: 4096 4)")
    add("--precisions", nargs="+", choices=known, default=["float32", "tf32", "bfloat16"],
        metavar="PRECISION", help="of benchmark and profile (default: float32 tf32 bfloat16)")
    add("--build", choices=["auto", "pip", "cmake"], default="auto",
        help="how to build the package: pip needs scikit-build-core and pybind11 "
             "(default: pip where they are there)")
    add("--architectures", nargs="+", default=[], metavar="SM",
        help="build for these, such as 90, with or without a GPU (default: the GPUs present)")
    add("--wheels", type=Path, metavar="FOLDER", help="wheels to install first, for the stages")
    add("--work", type=Path, metavar="FOLDER", default=ROOT / "build" / "gpu-visit",
        help="for builds, kept from visit to visit (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the plan and run nothing")
    # fmt: on
    options = parser.parse_args(arguments)
    for text in options.architectures:
        if not text.isdecimal():
            parser.error(f"argument --architectures: expected numbers such as 90, got {text!r}")
    for text in options.batch_sizes:
        if not text.isdecimal() or int(text) < 1:
            parser.error(f"argument --batch-sizes: expected positive integers, got {text!r}")
    if not options.minutes > 0:
        parser.error(f"argument --minutes: expected more than 0, got {options.minutes:g}")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"argument --wheels: expected a folder of wheels, got {options.wheels}")
    if options.out is None and not options.dry_run:
        parser.error("argument out: expected a folder, or OUT in the environment")
    visit = Visit(
        out=Path(options.out or "."), minutes=options.minutes, batch_sizes=options.batch_sizes,
        precisions=options.precisions, wheels=options.wheels, build=options.build,
        work=options.work.resolve(), architectures=options.architectures,
    )  # fmt: skip
    plan = [
        stage
        for stage in stages(options.precisions)
        if not options.stages or stage.name in options.stages
    ]
    if options.dry_run:
        look_around(visit)
        print_plan(plan, visit)
        return 0
    visit.out.mkdir(parents=True, exist_ok=True)
    visit.out = visit.out.resolve()
    visit.work.mkdir(parents=True, exist_ok=True)
    (visit.out / "visit.log").write_text("")
    if visit.wheels:
        install_wheels(visit)
    look_around(visit)
    return run(plan, visit)


def print_plan(plan: list[Stage], visit: Visit) -> None:
    """What would run here, with each command, and what would not and why."""
    print(json.dumps(describe(visit), indent=1))
    for stage in plan:
        # What comes before it is taken to pass, unless it would not run.
        reason = why_not(stage, visit)
        visit.results[stage.name] = {"status": "not run" if reason else "passed"}
        print(f"{stage.name} (at most {stage.limit:g} s): {stage.title}")
        print(f"    NOT RUN: {reason}" if reason else "    would run")
        for command in stage.commands(visit):
            print(f"    $ {shlex.join(command)}")


def run(plan: list[Stage], visit: Visit) -> int:
    """Run stages, those of a group side by side, and print the summary."""
    print(json.dumps(describe(visit)), flush=True)
    waiting = list(plan)
    while waiting:
        first = waiting[0]
        together = [s for s in waiting if s is first or (s.group and s.group == first.group)]
        waiting = waiting[len(together) :]
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(lambda stage: run_stage(stage, visit), together))
    write_report(visit)
    seconds = time.monotonic() - visit.began
    counts = dict.fromkeys(("passed", "failed", "not run"), 0)
    print("\nSummary")
    for stage in plan:
        result = visit.results[stage.name]
        counts[result["status"]] += 1
        print(line(stage.name, result))
    for text in digest(visit.results):
        print(text)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{told}; {seconds:.0f} s; {visit.out / 'visit.json'}")
    return 0 if counts["passed"] == len(plan) else 1


if __name__ == "__main__":
    sys.exit(main())
