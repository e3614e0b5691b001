"""What is installed, how it was built, and what the build asks for."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("libfusedcnn.so", "_C.*.so")
# torch folders that the build may compile against, or not: headers of 2.10 and of 2.9.
HEADERS_2_10 = (
    "include/torch/csrc/stable/library.h",
    "include/torch/headeronly/util/shim_utils.h",
)
HEADERS_2_9 = HEADERS_2_10[:1]


def library(pattern: str) -> Path:
    """The installed shared library that matches; the package's folders are more than one when it
    is installed as editable.
    """
    found = [path for folder in fusedcnn.__path__ for path in Path(folder).glob(pattern)]
    assert len(found) == 1, f"{pattern}: {found}"
    return found[0]


def run(*command: object, cwd: Path) -> str:
    """Output of a command that must succeed."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


# ---- what is installed ---------------------------------------------------------------------------


def test_metadata():
    metadata = importlib.metadata.metadata("fusedcnn")
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")
    assert {"test", "bench", "examples", "lint"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["Version"] == fusedcnn.build_info()["version"]


def test_py_typed_is_installed():
    assert any((Path(folder) / "py.typed").is_file() for folder in fusedcnn.__path__)


@pytest.mark.parametrize("pattern", LIBRARIES)
def test_no_build_path_in_library(pattern):
    content = library(pattern).read_bytes()
    for folder in (ROOT / "csrc", Path(torch.__file__).parent, Path("/tmp/pip-")):
        assert str(folder).encode() not in content


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("pattern", LIBRARIES)
def test_libraries_are_found_by_name_or_beside(pattern, tmp_path):
    for line in run("readelf", "-dW", library(pattern), cwd=tmp_path).splitlines():
        if re.search(r"\((RPATH|RUNPATH)\)", line):
            assert line.endswith("[$ORIGIN]"), line
        if "(NEEDED)" in line:
            assert "/" not in line.split("[", 1)[1], line


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_exports_only_its_selection(tmp_path):
    """Everything else is hidden, so that two libraries in one process cannot mix."""
    output = run("nm", "-DC", "--defined-only", library("libfusedcnn.so"), cwd=tmp_path)
    ours = [line.split(maxsplit=2)[2] for line in output.splitlines() if " fusedcnn::" in line]
    assert ours
    exported = {re.match(r"fusedcnn::cpu::(\w+)", name)[1] for name in ours}
    expected = {
        "isas", "selected_isa", "force", "forced_isa", "forced_kernel", "select",
        "allow_winograd", "winograd_allowed", "last_selected",
    }  # fmt: skip
    assert exported <= expected, ours


def test_info_as_text_and_json(tmp_path):
    text = run(sys.executable, "-m", "fusedcnn", "info", cwd=tmp_path)
    assert torch.__version__ in text
    assert text.count("selected on this machine") == 1
    info = json.loads(run(sys.executable, "-m", "fusedcnn", "info", "--json", cwd=tmp_path))
    assert [isa["name"] for isa in info["isas"]] == [
        isa["name"] for isa in fusedcnn.build_info()["isas"]
    ]


def test_import_adds_under_100_ms(tmp_path):
    """Processor time, the least of three: other processes on the machine do not count."""
    code = """
import time, torch
start = time.process_time()
import fusedcnn
print(time.process_time() - start)
"""
    times = [float(run(sys.executable, "-c", code, cwd=tmp_path)) for _ in range(3)]
    assert min(times) < 0.1, times


# ---- what the build asks for ---------------------------------------------------------------------


@pytest.fixture
def torch_location(monkeypatch):
    """The build's own search for torch."""
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.delenv("FUSEDCNN_TORCH_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "torch_location", raising=False)
    import torch_location

    yield torch_location
    sys.modules.pop("torch_location", None)


def make_torch(folder: Path, headers: tuple[str, ...]) -> Path:
    for header in headers:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).touch()
    return folder


@pytest.fixture
def target(torch_location, monkeypatch, tmp_path):
    """Site-packages of a target environment, seen from an isolated build that holds no torch."""
    monkeypatch.setattr(torch_location.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch_location.sysconfig, "get_path", lambda scheme: str(tmp_path))
    return tmp_path


def test_finds_this_environments_torch(torch_location):
    assert torch_location.torch_dir() == Path(torch.__file__).parent


def test_finds_the_target_environments_torch(torch_location, target):
    expected = make_torch(target / "torch", HEADERS_2_10)
    assert torch_location.torch_dir() == expected


def test_finds_none(torch_location, target):
    assert torch_location.torch_dir() is None


def test_a_torch_too_old_does_not_count(torch_location, target):
    make_torch(target / "torch", HEADERS_2_9)
    assert torch_location.torch_dir() is None


def test_torch_dir_from_the_environment(torch_location, monkeypatch, tmp_path):
    expected = make_torch(tmp_path / "elsewhere", HEADERS_2_10)
    monkeypatch.setenv("FUSEDCNN_TORCH_DIR", str(expected))
    assert torch_location.torch_dir() == expected


@pytest.mark.parametrize("headers", [(), HEADERS_2_9], ids=["empty", "2.9"])
def test_wrong_torch_dir_from_the_environment(torch_location, monkeypatch, tmp_path, headers):
    make_torch(tmp_path, headers)
    monkeypatch.setenv("FUSEDCNN_TORCH_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^FUSEDCNN_TORCH_DIR: expected .*got"):
        torch_location.torch_dir()


@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_build_requires_torch_only_when_missing(torch_location, target, monkeypatch, hook):
    pytest.importorskip("scikit_build_core", reason="needs the build tools")
    monkeypatch.delitem(sys.modules, "fusedcnn_build", raising=False)
    import fusedcnn_build

    monkeypatch.chdir(ROOT)
    requires = getattr(fusedcnn_build, f"get_requires_for_build_{hook}")
    assert "torch>=2.10" in requires()
    make_torch(target / "torch", HEADERS_2_10)
    assert not [requirement for requirement in requires() if requirement.startswith("torch")]
    monkeypatch.delitem(sys.modules, "fusedcnn_build")


# ---- the check of ISA objects --------------------------------------------------------------------

# A function of the standard library, emitted for everyone with this ISA's instructions.
SHARED = """
#include <vector>
namespace fusedcnn::cpu::avx512 {
void append(std::vector<int>& list) { list.push_back(1); }
}
"""
OWN = """
namespace fusedcnn::cpu::avx512 {
template <typename T> __attribute__((noinline)) T twice(T value) { return value + value; }
int four() { return twice(2); }
}
"""


@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("nm") is None, reason="needs c++ and nm"
)
@pytest.mark.parametrize(("source", "shared"), [(SHARED, True), (OWN, False)])
def test_check_isa_symbols(tmp_path, source, shared):
    folder = tmp_path / "fusedcnn_cpu_avx512.dir"
    folder.mkdir()
    (tmp_path / "kernels.cpp").write_text(source)
    run("c++", "-O0", "-c", "kernels.cpp", "-o", folder / "kernels.o", cwd=tmp_path)
    script = ROOT / "scripts" / "check_isa_symbols.py"
    process = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False
    )
    assert process.returncode == (1 if shared else 0), process.stdout + process.stderr
    assert ("push_back" in process.stdout) == shared


# ---- whole installs ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fresh", "installed", "no_isolation", "editable", "sdist"])
def test_install(scenario, tmp_path):
    run(sys.executable, ROOT / "scripts" / "check_installs.py", scenario, cwd=tmp_path)


@pytest.mark.slow
def test_one_wheel_on_several_versions_of_torch(tmp_path):
    run(sys.executable, ROOT / "scripts" / "check_torch_versions.py", cwd=tmp_path)
