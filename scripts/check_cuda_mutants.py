"""Fails unless the CUDA kernels' self-test on the CPU catches the faults that are planted here.

    python scripts/check_cuda_mutants.py BUILD_DIR [--only REGEX] [--sample N --seed S] [--list]

BUILD_DIR is a build of the kernels alone (-DFUSEDCNN_KERNELS_ONLY=ON), whose compile commands are
used; it is not changed.

Operators (OPERATORS) find places in the code that runs on the GPU, whatever file it is in, and say
how a fault reads there: a barrier is left out, a bound is off by one, rows are taken for columns.
cuda_mutants.json adds faults that no operator expresses, as text, and lists the places where a
fault changes no result, with the reason. White space and comments do not count in that text.

All faults go into one build, each behind a switch, and every run of the self-test turns one on. A
run is made of SHARES shares of the self-test and ends with the first that fails. A fault that every
share passes is an error, and so is one that no share reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).with_name("cuda_mutants.json")
SHARES = 40
# Of the processor's time that a share takes without a fault; what takes longer hangs.
HANGS = 5

# A name or a number, with what it is a member of.
_NAME = r"(?:\w+(?:\.|::))*\w+"
# No comma but in brackets.
_EXPRESSION = r"(?:[^;,()]|\((?:[^()]|\([^()]*\))*\))+"


class Operator(NamedTuple):
    """A kind of fault: what is inserted around group x of each match, where FAULT is 0 or 1."""

    name: str
    pattern: str
    before: str
    after: str = ""


OPERATORS = [
    Operator("no barrier", r"\b(?P<x>sync_(threads|warp)\(\));", "FAULT ? void() : "),
    Operator("no wait", r"\b(?P<x>(wait|commit)_copies(<\d>)?\(\));", "FAULT ? void() : "),
    Operator("bound too large", r" (<|<=) (?P<x>)(?=\w)", "FAULT + "),
    Operator("bound too small", r" (>|>=) (?P<x>)(?=\w)", "-FAULT + "),
    Operator("equal to the next", r" == (?P<x>)(?=\w)(?!nullptr|\w+::)", "FAULT + "),
    Operator("inside by one more", r"\binside\([^()]+, (?P<x>)", "FAULT + "),
    Operator("one forgotten", r" [+-] (?P<x>)(?=1u?\b)", "!FAULT * "),
    Operator("not the other one", r" \^=? (?P<x>)(?=1\b)", "!FAULT * "),
    Operator(
        "quotient for remainder",
        rf" [/%] (?P<x>{_NAME}(<\w+>)?)(?![\w(<.:\[])",
        "exchanged(FAULT, ",
        ")",
    ),
    Operator(
        "columns for rows",
        r"(?<![\w.>])(?P<x>((?:\w+\.)+(?:(?:padding|in|out)_)?)h\b)(?! =)",
        r"(FAULT ? \2w : ",
        ")",
    ),
    Operator("or forgotten", r" \|\| (?P<x>)", "!FAULT && "),
    Operator("condition never", r"\bif (?P<x>\()", "(!FAULT && ", ")"),
    Operator("always so", rf"\bconst bool \w+ = (?P<x>{_EXPRESSION});", "FAULT || (", ")"),
    Operator("sum lost", r" \+= (?P<x>)(?=\w)", "!FAULT * "),
    Operator("one block's task only", r"(?P<x>\bgrid_blocks\(\))", "(FAULT ? 1 << 30 : ", ")"),
]

HEADER = """
extern const int fault_on;  // the one that is turned on
extern bool fault_reached;
inline int planted(int fault) { return fault == fault_on && (fault_reached = true); }
template <typename T> struct Exchanged { int fault; T by; };
template <typename T> Exchanged<T> exchanged(int fault, T by) { return {fault, by}; }
template <typename A, typename T> auto operator/(A a, Exchanged<T> b) {
  return b.fault ? a % b.by : a / b.by;
}
template <typename A, typename T> auto operator%(A a, Exchanged<T> b) {
  return b.fault ? a / b.by : a % b.by;
}
"""
SWITCH = """
#include <cstdio>
#include <cstdlib>
bool fault_reached = false;
extern const int fault_on = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : -1;
static struct AtExit { ~AtExit() { if (!fault_reached) std::puts("NOT REACHED"); } } at_exit;
"""


class Fault(NamedTuple):
    """One fault: what replaces text[start:x], and what is inserted at `end`."""

    name: str
    file: Path
    start: int
    until: int
    end: int
    before: str
    after: str

    def where(self) -> str:
        """For people: the file and the line."""
        text = self.file.read_text()
        number = text.count("\n", 0, self.start) + 1
        line = text.splitlines()[number - 1].strip()
        return f"{self.name}: {self.file.relative_to(ROOT)}:{number}: {line}"


def blanked(text: str) -> str:
    """The text with blanks for its comments."""
    return re.sub(r"//.*", lambda match: " " * len(match[0]), text)


def closing(text: str, begin: int) -> int:
    """The place behind the bracket that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] in "({") - (text[place] in ")}")
        if not depth:
            return place + 1
    raise ValueError(f"nothing closes: {text[begin : begin + 80]}")


def kernel_code(text: str) -> list[tuple[int, int]]:
    """Where the bodies of functions lie that run on the GPU."""
    begins = [text.index("{", m.end()) for m in re.finditer(r"\bFUSEDCNN_(DEVICE|KERNEL)", text)]
    return [(begin, closing(text, begin)) for begin in begins]


def occurrences(snippet: str, text: str) -> list[tuple[int, int]]:
    """Where a snippet's tokens stand in the text, however they are spaced."""
    pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|\S", snippet)))
    return [match.span() for match in re.finditer(pattern, text)]


def is_constant(text: str, place: int) -> bool:
    """Whether a compiler must know the value there, or it counts a loop over registers."""
    begin = max(text.rfind(mark, 0, place) for mark in ";{}") + 1
    statement = text[begin:place]
    if re.search(r"\b(constexpr|static_assert|template|using)\b", statement):
        return True
    counts = text[begin - 1] == ";" and re.fullmatch(r"\s*\w+ <=? ", statement)
    return bool(counts and re.match(r"\d|k[A-Z]|[A-Z]", text[place:]))


def operator_faults(file: Path, text: str) -> list[Fault]:
    """What the operators find in a file."""
    found = []
    for begin, end in kernel_code(text):
        for operator in OPERATORS:
            for match in re.compile(operator.pattern).finditer(text, begin, end):
                first, last = match.span("x")
                if is_constant(text, first):
                    continue
                if match["x"] == "(":
                    last = closing(text, first)
                before = match.expand(operator.before)
                found.append(Fault(operator.name, file, first, first, last, before, operator.after))
    return found


def faults_and_equivalents(files: list[Path]) -> tuple[list[Fault], list[Fault]]:
    """All faults, and those of them that change no result.

    Raises:
        SystemExit: the data file has text that does not occur.
    """
    data = json.loads(DATA.read_text())
    texts = {file: blanked(file.read_text()) for file in files}
    written, taken = [], []
    for name, old, new in data["faults"]:
        places = [(f, *span) for f, text in texts.items() for span in occurrences(old, text)]
        if len(places) != 1:
            sys.exit(f"{DATA.name}: {name}: expected its text once, found it {len(places)} times")
        file, start, end = places[0]
        written.append(Fault(f"written: {name}", file, start, end, end, new, ""))
        taken.append(places[0])
    everywhere = [fault for file, text in texts.items() for fault in operator_faults(file, text)]
    faults = [
        f
        for f in everywhere
        if not any(f.file == g and f.start < end and start < f.end for g, start, end in taken)
    ]
    equivalent = []
    for name, snippet, _ in data["equivalent"]:
        same = [
            fault
            for fault in faults
            if fault.name == name
            and any(a <= fault.start < b for a, b in occurrences(snippet, texts[fault.file]))
        ]
        if not same:
            sys.exit(f"{DATA.name}: no fault {name!r} in {snippet!r}")
        equivalent += same
    return written + faults, equivalent


def planted(file: Path, faults: list[Fault]) -> str:
    """A file's text with these of its faults, numbered by their place in the list."""
    edits = []
    for n, fault in enumerate(faults):
        if fault.file == file:
            before = re.sub(r"\bFAULT\b", f"::planted({n})", fault.before)
            # At one place: what ends, the shorter first; what has no length; the longer first.
            edits.append((fault.start, 1 + (fault.end > fault.start), -fault.end, n,
                          fault.until, before))  # fmt: skip
            if fault.after:
                edits.append((fault.end, 0, -fault.start, -n, fault.end, fault.after))
    text = file.read_text()
    result, at = "", 0
    for start, *_, until, new in sorted(edits):
        result += text[at:start] + new
        at = max(at, until)
    return result + text[at:]


class Build:
    """A self-test whose kernels hold all faults, made in a folder of its own."""

    def __init__(self, finished: Path, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        self.program = folder / "selftest"
        self.units: dict[str, list[str]] = {}
        selftest = []
        for entry in json.loads((finished / "compile_commands.json").read_text()):
            command = shlex.split(entry["command"])
            at = command.index("-o")
            # Relative to the build folder with Ninja, to a folder in it with Make.
            output = Path(entry["directory"], command[at + 1])
            if "fusedcnn_cuda_selftest.dir" in str(output):
                selftest.append(str(output))
            if "fusedcnn_cuda_on_cpu.dir" in str(output) and entry["file"].endswith(".cu"):
                command = [*command[:at], "-w", "-include", "planted.h", "-c", entry["file"]]
                command = [word.replace(f"{ROOT}/csrc", f"{folder}/csrc") for word in command]
                command = ["-O1" if word == "-O3" else word for word in command]
                self.units[Path(entry["file"]).name] = command
        library = finished / "tests/cuda_on_cpu/libfusedcnn_cuda_on_cpu.a"
        # What is linked first wins over the library's own copy of a unit.
        objects = [f"{name}.o" for name in self.units]
        self.link = ["c++", *selftest, *objects, "switch.cpp", str(library), "-o", self.program]

    def write(self, faults: list[Fault]) -> None:
        """The sources."""
        shutil.copytree(ROOT / "csrc", self.folder / "csrc", dirs_exist_ok=True)
        for file in {fault.file for fault in faults}:
            (self.folder / file.relative_to(ROOT)).write_text(planted(file, faults))
        (self.folder / "planted.h").write_text(HEADER)
        (self.folder / "switch.cpp").write_text(HEADER + SWITCH)

    def compile(self) -> str:
        """Compile and link; the compiler's errors."""

        def unit(name: str) -> str:
            return self.run([*self.units[name], "-o", f"{name}.o"])

        with ThreadPoolExecutor(self.jobs) as pool:
            errors = "".join(pool.map(unit, self.units))
        return errors or self.run(self.link)

    def run(self, command: list) -> str:
        process = subprocess.run(
            command, cwd=self.folder, stderr=subprocess.PIPE, text=True, check=False
        )
        return process.stderr if process.returncode else ""

    def share(self, number: int, seconds: int, fault: int = -1) -> tuple[bool, str]:
        """Whether a share of the self-test passes within its time, and what it says."""
        limited = f'ulimit -t {seconds} -v 8000000; exec "$0" "$@"'
        process = subprocess.run(
            ["bash", "-c", limited, self.program, "--quick", "--stop", "--share",
             f"{number}/{SHARES}"],
            env=os.environ | {"FAULT": str(fault)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
        lines = process.stdout.splitlines()
        said = [line for line in lines if line.startswith("FAILED")] or lines[-1:]
        return process.returncode == 0, said[0] if said else f"exit status {process.returncode}"

    def verdict(self, fault: int, seconds: int, shares: int) -> tuple[str, str]:
        """What becomes of a fault, and what the self-test says of it."""
        reached = False
        for number in range(shares):
            passed, said = self.share(number, seconds, fault)
            if not passed:
                return "caught", said
            reached |= said != "NOT REACHED"
        return ("SURVIVED" if reached else "NOT REACHED"), ""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="a build of the kernels alone")
    parser.add_argument("--only", default="", help="faults whose line in --list matches this")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--shares", type=int, default=SHARES, help="run only the first of them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="list the faults and do nothing")
    options = parser.parse_args()
    faults, equivalent = faults_and_equivalents(sorted((ROOT / "csrc/cuda/kernels").iterdir()))
    chosen = [
        number
        for number, fault in enumerate(faults)
        if fault not in equivalent and re.search(options.only, fault.where())
    ]
    if not chosen:
        sys.exit(f"--only: no fault's line in --list matches {options.only!r}")
    if options.list:
        for number in chosen:
            print(faults[number].where())
        print(Counter(faults[number].name for number in chosen))
        return
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    print(f"{len(chosen)} of {len(faults)} faults, {len(equivalent)} of which change no result")
    with tempfile.TemporaryDirectory() as folder:
        build = Build(options.build.resolve(), Path(folder), options.jobs)
        build.write(faults)
        if errors := build.compile():
            sys.exit(errors)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        passed, said = build.share(0, 3600)
        if not passed:
            sys.exit(f"the self-test fails without any fault: {said}")
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        print(f"compiled; a share passes in {used:.1f} s")
        seconds = HANGS * (1 + int(used))
        wrong = 0
        with ThreadPoolExecutor(options.jobs) as pool:
            results = pool.map(lambda n: build.verdict(n, seconds, options.shares), chosen)
            for number, (verdict, said) in zip(chosen, results, strict=True):
                print(f"{verdict}: {faults[number].where()}\n    {said[:200]}", flush=True)
                wrong += verdict != "caught"
    if wrong:
        sys.exit(f"{wrong} of {len(chosen)} faults were not caught")
    print(f"all {len(chosen)} faults caught")


if __name__ == "__main__":
    main()
