"""scripts/check_cuda_mutants.py: what it plants, in a function that stands for a kernel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """\
#define FUSEDCNN_DEVICE inline
struct Strides { int h, w; };
FUSEDCNN_DEVICE int twice(int a, Strides s) {  // if (a >= 0) sync_threads();
  int sum = 0;
  for (int i = 0; i < 2; ++i) sum += a;
  if (a >= s.h || a == 7) return sum / s.w;
  return sum + 1;
}
int host(int a) { return a < 0 ? a + 1 : a; }
"""
MAIN = """
#include <cstdio>
int main() {
  const int values[] = {3, 4, 7};
  for (int a : values) std::printf("%d ", twice(a, {4, 3}));
}
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import check_cuda_mutants

    return check_cuda_mutants


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")
def test_each_fault_is_behind_its_switch(tmp_path, script):
    file = tmp_path / "kernel.h"
    file.write_text(SOURCE)
    faults = script.operator_faults(file, script.blanked(SOURCE))
    (tmp_path / "planted.h").write_text(script.HEADER)
    source = script.SWITCH + script.planted(file, faults) + MAIN
    (tmp_path / "main.cpp").write_text(source)
    command = ["c++", "-w", "-std=c++17", "-include", "planted.h", "main.cpp", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)

    def answers(fault: int) -> str:
        process = subprocess.run(
            [tmp_path / "program"], env={"FAULT": str(fault)}, capture_output=True, text=True
        )
        return process.stdout

    assert answers(-1) == "7 2 4 NOT REACHED\n"
    assert {fault.name: answers(number) for number, fault in enumerate(faults)} == {
        "bound too small": "2 2 4 ",
        "equal to the next": "7 2 4 ",  # no argument tells 8 from 7
        "one forgotten": "6 2 4 ",
        "quotient for remainder": "7 2 2 ",
        "columns for rows": "2 2 4 ",
        "or forgotten": "7 2 4 ",  # 7 is at least 4
        "condition never": "7 9 15 ",
        "sum lost": "1 0 0 ",
    }


def test_text_is_found_however_it_is_spaced(script):
    text = "a +=\n    b[i];  a += c;"
    assert script.occurrences("a += b[ i ];", text) == [(0, 14)]
    assert script.occurrences("a += d;", text) == []


def test_the_data_fits_the_sources(script):
    files = sorted((ROOT / "csrc/cuda/kernels").iterdir())
    faults, equivalent = script.faults_and_equivalents(files)
    assert {operator.name for operator in script.OPERATORS} <= {fault.name for fault in faults}
    assert all(fault in faults for fault in equivalent)


def test_text_that_is_not_there_is_an_error(tmp_path, script, monkeypatch):
    data = tmp_path / "data.json"
    monkeypatch.setattr(script, "DATA", data)
    data.write_text('{"faults": [["name", "no such text", ""]], "equivalent": []}')
    with pytest.raises(SystemExit, match="name: expected its text once, found it 0 times"):
        script.faults_and_equivalents([])
    data.write_text('{"faults": [], "equivalent": [["no barrier", "no such text", "why"]]}')
    with pytest.raises(SystemExit, match="no fault 'no barrier' in 'no such text'"):
        script.faults_and_equivalents([])


def test_bad_arguments():
    command = [sys.executable, str(ROOT / "scripts/check_cuda_mutants.py"), "/nowhere"]
    process = subprocess.run([*command, "--only", "nothing at all"], capture_output=True, text=True)
    assert process.returncode == 1
    assert "--only: no fault's line in --list matches 'nothing at all'" in process.stderr
