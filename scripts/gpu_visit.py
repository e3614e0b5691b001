"""A visit to a machine with a GPU, in four parts of under ten minutes each.

    python scripts/gpu_visit.py OUT test       # build, every kernel, pytest, compute-sanitizer
    python scripts/gpu_visit.py OUT profile    # every kernel beside the GPU's rates; ncu's counters
    python scripts/gpu_visit.py OUT benchmark [--precision tf32]   # beside cuDNN
    python scripts/gpu_visit.py OUT compile [--precision tf32]     # beside torch.compile
    python scripts/gpu_visit.py OUT PART --dry-run                 # what would run, what is missing

Needs torch with CUDA, a GPU, nvcc, a C++20 compiler, the build tools and the `test` and `bench`
extras; no network. Wheels of missing packages can be brought along (--wheels FOLDER). Where there
is no git, FUSEDCNN_COMMIT in the environment says what the figures are of.

Each part builds what it needs, for the GPU at hand, in a folder that is kept (--work): none needs
another. Each step has a time limit, and one that fails stops no other. OUT receives the output of
each step as it comes, the benchmarks' JSON, and visit.json: what became of each step.

Exit status: 0 when all steps passed, 1 when one did not, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Of a step that had nothing to do and exits with 0.
NOTHING_DONE = re.compile(r"^0 passed|Device not supported|no tests ran|^\d+ skipped", re.M)
CHECK_PACKAGE = (
    "import fusedcnn; info = fusedcnn.build_info()['cuda']; print(info); exit(info['reason'])"
)


class Step(NamedTuple):
    """A command, how many seconds it may take, and its name."""

    name: str
    limit: float
    command: list[str]


def steps(part: str, out: Path, work: Path, options: argparse.Namespace) -> list[Step]:
    """The steps of a part, in order."""
    python, batches = sys.executable, list(map(str, options.batch_sizes))
    programs = work / "kernels/tests/cuda_on_cpu/probe"
    block = [python, f"{ROOT}/benchmarks/bench_block.py", "--device", "cuda"]
    kernels = [python, f"{ROOT}/benchmarks/bench_kernels.py", "--device", "cuda"]
    kernels += ["--precision", options.precision]
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps"]
    found = []
    if options.wheels:
        found += [Step("wheels", 60, [*pip, *map(str, sorted(options.wheels.glob("*.whl")))])]
    found += [
        Step("package", 400, [*pip, "--no-build-isolation", "--upgrade", "--target", f"{work}/site",
                              "-C", f"build-dir={work}/package",
                              "-C", "cmake.define.FUSEDCNN_CUDA=ON", str(ROOT)]),
        Step("import", 60, [python, "-c", CHECK_PACKAGE]),
    ]  # fmt: skip
    if part == "test":
        small = [f"{programs}/fusedcnn_cuda_gputest", "--quick", "--seconds", "40"]
        # So slow that the first tests would be all that it sees.
        few = {"racecheck": ["--share", "0/40"]}
        found += [
            Step("configure", 60, ["cmake", "-S", str(ROOT), "-B", f"{work}/kernels", "-G", "Ninja",
                                   "-DFUSEDCNN_KERNELS_ONLY=ON", "-DFUSEDCNN_CUDA=ON"]),
            Step("kernels", 300, ["cmake", "--build", f"{work}/kernels", "--target",
                                  "fusedcnn_cuda_probe", "fusedcnn_cuda_gputest"]),
            Step("probe", 30, [f"{programs}/fusedcnn_cuda_probe"]),
            Step("gputest", 60, [f"{programs}/fusedcnn_cuda_gputest"]),
            Step("pytest", 200, [python, "-m", "pytest", "-m", "cuda", "-q", "--durations=10",
                                 "-p", "no:cacheprovider", f"{ROOT}/tests"]),
            *(Step(tool, 60, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *small,
                              *few.get(tool, [])])
              for tool in ("memcheck", "racecheck", "initcheck")),
        ]  # fmt: skip
    elif part == "profile":
        found += [Step(f"profile-{batch}", 90, [*kernels, "--batch-sizes", batch, "--time-limit",
                                                "70", "--json", f"{out}/profile-{batch}.json"])
                  for batch in batches]  # fmt: skip
        found += [Step(f"counters-{batch}", 90, [
            "ncu", "--clock-control", "none", "--kernel-name-base", "function",
            "--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats",
            "--kernel-name", "regex:(forward|grad_weight|grad_input)_.*kernel",
            "--launch-count", "40", *kernels, "--batch-sizes", batch, "--rounds", "2",
            "--min-time", "1e-6", "--no-launches",
        ]) for batch in batches]  # fmt: skip
    else:
        contenders = {"benchmark": ["eager", "eager-cl"], "compile": ["compile", "compile-cl"]}
        names = [f"{name}{graph}" for name in ["fused", *contenders[part]]
                 for graph in ("", "-graph")]  # fmt: skip
        found += [Step(f"{part}-{batch}", 180, [
            *block, "--precision", options.precision, "--contenders", *names, "--batch-sizes",
            batch, "--time-limit", "160", "--json",
            f"{out}/{part}-{options.precision}-{batch}.json",
        ]) for batch in batches]  # fmt: skip
    return found


def run(step: Step, limit: float, log: Path, work: Path) -> str:
    """Run a step; "passed", or what went wrong."""
    if not shutil.which(step.command[0]):
        return f"not run: no {step.command[0]}"
    if limit <= 0:
        return "not run: the time is over"
    environment = {**os.environ, "PYTHONPATH": f"{work}/site", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=work, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            # With its children, which may hold the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"failed: more than {limit:.0f} s"
    if status:
        return f"failed: exit status {status}"
    nothing = NOTHING_DONE.search(log.read_text(errors="replace"))
    return f"failed: it says {nothing[0]!r}" if nothing else "passed"


def commit() -> str:
    """What the sources are, as git or FUSEDCNN_COMMIT has it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    if shutil.which("git"):
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if answer:
            return answer
    return os.environ.get("FUSEDCNN_COMMIT", "unknown")


def visit(plan: list[Step], out: Path, work: Path, minutes: float) -> bool:
    """Run steps and tell what became of them; whether all passed."""
    report = {"commit": commit(), "steps": {}}
    begin = time.monotonic()
    for number, step in enumerate(plan):
        started = time.monotonic()
        limit = min(step.limit, 60 * minutes - (started - begin))
        log = out / f"{number:02}-{step.name}.log"
        result = run(step, limit, log, work)
        seconds = round(time.monotonic() - started, 1)
        report["steps"][step.name] = {"result": result, "seconds": seconds, "log": log.name,
                                      "command": shlex.join(step.command)}  # fmt: skip
        (out / "visit.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{step.name:<16} {seconds:6.1f} s  {result}", flush=True)
    results = [one["result"] for one in report["steps"].values()]
    print(f"{results.count('passed')} of {len(results)} steps passed; see {out / 'visit.json'}")
    return results.count("passed") == len(results)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("part", choices=["test", "profile", "benchmark", "compile"])
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 1024, 8192], metavar="N")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole part")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels to install first")
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu-visit", help="for builds")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    if min(options.batch_sizes) < 1:
        parser.error(f"--batch-sizes: expected positive integers, got {min(options.batch_sizes)}")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: expected a folder of wheels, got {options.wheels}")
    out, work = options.out.resolve(), options.work.resolve()
    plan = steps(options.part, out, work, options)
    if options.dry_run:
        for step in plan:
            there = shutil.which(step.command[0]) or step.command[0].startswith(str(work))
            print(f"{step.name} (at most {step.limit} s){'' if there else ': MISSING'}")
            print(f"    $ {shlex.join(step.command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return 0 if visit(plan, out, work, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
