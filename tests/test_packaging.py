"""What is installed, how it was built, and what the build asks for."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import fusedcnn
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
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


def run(*command: object, cwd: Path, fails: bool = False, **environ: str) -> str:
    """Output of a command that must succeed, or must fail."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (process.returncode != 0) == fails, process.stdout
    return process.stdout


def make_torch(folder: Path, version: str, *headers: str) -> Path:
    """A torch package that knows its version and holds these headers, empty."""
    for header in headers:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).touch()
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("from torch.version import __version__\n")
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


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


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_wheels_leave_out_what_torch_brings_and_nothing_else(tmp_path):
    needed = {
        name
        for pattern in LIBRARIES
        for name in re.findall(
            r"\(NEEDED\).*\[(.*)\]", run("readelf", "-dW", library(pattern), cwd=tmp_path)
        )
    }
    of_the_system = r"(libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|ld-linux.*)\.so\.\d"
    theirs = {n for n in needed if not re.match(of_the_system, n)} - {"libfusedcnn.so"}
    assert theirs == set(re.findall(r"--exclude (\S+)", PYPROJECT))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_exports_only_its_selection(tmp_path):
    """Everything else is hidden, so that two libraries in one process cannot mix."""
    output = run("nm", "-DC", "--defined-only", library("libfusedcnn.so"), cwd=tmp_path)
    ours = [line.split(maxsplit=2)[2] for line in output.splitlines() if " fusedcnn::" in line]
    assert ours
    exported = {re.match(r"fusedcnn::cpu::(\w+)", name)[1] for name in ours}
    expected = {
        "isas", "selected_isa", "force", "forced_isa", "forced_kernel", "benchmark",
        "benchmarking", "allow_winograd", "winograd_allowed", "last_chosen",
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


@pytest.mark.parametrize("found", ["2.9.1+cpu", "none"])
def test_import_names_the_torch_that_is_needed(tmp_path, found):
    if found == "none":
        code = "import sys; sys.modules['torch'] = None; import fusedcnn"
    else:
        make_torch(tmp_path / "torch", found)
        code = "import fusedcnn"
    output = run(sys.executable, "-c", code, cwd=tmp_path, fails=True, PYTHONPATH=str(tmp_path))
    assert output.endswith(f"\nImportError: fusedcnn needs torch >= 2.10, found {found}\n")


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


@pytest.fixture
def target(torch_location, monkeypatch, tmp_path):
    """Site-packages of a target environment, seen from an isolated build that holds no torch."""
    monkeypatch.setattr(torch_location.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch_location.sysconfig, "get_path", lambda scheme: str(tmp_path))
    return tmp_path


def test_finds_this_environments_torch(torch_location):
    assert torch_location.torch_dir() == Path(torch.__file__).parent


def test_finds_the_target_environments_torch(torch_location, target):
    expected = make_torch(target / "torch", "2.10.0", *HEADERS_2_10)
    assert torch_location.torch_dir() == expected


def test_finds_none(torch_location, target):
    assert torch_location.torch_dir() is None
    assert torch_location.why_none().endswith(f"for {sys.executable}, found none")


def test_a_torch_too_old_does_not_count(torch_location, target):
    folder = make_torch(target / "torch", "2.9.1", *HEADERS_2_9)
    assert torch_location.torch_dir() is None
    assert torch_location.why_none().endswith(f"for {sys.executable}, found 2.9.1 in {folder}")


def test_torch_dir_from_the_environment(torch_location, monkeypatch, tmp_path):
    expected = make_torch(tmp_path / "elsewhere", "2.10.0", *HEADERS_2_10)
    monkeypatch.setenv("FUSEDCNN_TORCH_DIR", str(expected))
    assert torch_location.torch_dir() == expected


@pytest.mark.parametrize("headers", [(), HEADERS_2_9], ids=["empty", "2.9"])
def test_wrong_torch_dir_from_the_environment(torch_location, monkeypatch, tmp_path, headers):
    make_torch(tmp_path, "2.9.1", *headers)
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
    make_torch(target / "torch", "2.10.0", *HEADERS_2_10)
    assert not [requirement for requirement in requires() if requirement.startswith("torch")]
    monkeypatch.delitem(sys.modules, "fusedcnn_build")


# ---- what CMake says -----------------------------------------------------------------------------

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja"
)
needs_cxx = pytest.mark.skipif(not shutil.which("c++"), reason="needs c++")


def configure(source: Path, tmp_path: Path, *options: str, fails: bool = False, **environ: str):
    command = (shutil.which("cmake"), "-S", source, "-B", tmp_path / "build", "-G", "Ninja")
    ninja = f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
    return run(*command, ninja, *options, cwd=tmp_path, fails=fails, **environ)


@needs_cmake
def test_no_compiler(tmp_path):
    options = {"PATH": str(tmp_path), "CXX": ""}
    output = configure(ROOT, tmp_path, fails=True, **options)
    assert "  No working C++ compiler found: install one (apt install g++) or set CXX.\n" in output


@needs_cmake
@needs_cxx
@pytest.mark.parametrize("found", ["2.9.1", "none"])
def test_no_torch(tmp_path, found):
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    if found != "none":
        found += f" in {make_torch(tmp_path / 'torch', found, *HEADERS_2_9)}"
    environ = {"PYTHONPATH": str(tmp_path), "FUSEDCNN_TORCH_DIR": ""}
    output = configure(ROOT, tmp_path, f"-DPython_EXECUTABLE={python}", fails=True, **environ)
    message = f" Building fusedcnn needs torch >= 2.10 installed for {python}, found {found}\n"
    assert message in output


CUDA_PROJECT = f"""
cmake_minimum_required(VERSION 3.21)
project(trial NONE)
function(enable_language) # the compiler of this trial compiles nothing
endfunction()
include({ROOT}/cmake/cuda.cmake)
message(STATUS "with CUDA: ${{FUSEDCNN_WITH_CUDA}}")
"""


@needs_cmake
@pytest.mark.parametrize(
    ("switch", "of_torch", "nvcc", "says"),
    [
        ("AUTO", "libtorch_cpu.so", True, "not built, this torch has no CUDA (FUSEDCNN_CUDA=ON "),
        ("AUTO", "libtorch_cuda.so", False, "not built, no working CUDA compiler (nvcc) was found"),
        ("AUTO", "libtorch_cuda.so", True, "with CUDA: ON"),
        ("ON", "libtorch_cpu.so", True, "with CUDA: ON"),
        ("ON", "libtorch_cuda.so", False, "FUSEDCNN_CUDA=ON asks for the CUDA kernels, but no"),
        ("OFF", "libtorch_cuda.so", True, "not built, FUSEDCNN_CUDA=OFF"),
    ],
)
def test_cuda_switch(tmp_path, switch, of_torch, nvcc, says):
    (tmp_path / "CMakeLists.txt").write_text(CUDA_PROJECT)
    make_torch(tmp_path / "torch", "2.10.0", f"lib/{of_torch}")
    compiler = ["-DCMAKE_CUDA_COMPILER=nvcc", "-DCMAKE_CUDA_ARCHITECTURES=90"] if nvcc else []
    output = configure(
        tmp_path,
        tmp_path,
        f"-DFUSEDCNN_CUDA={switch}",
        f"-DFUSEDCNN_TORCH_DIR={tmp_path / 'torch'}",
        *compiler,
        fails=switch == "ON" and not nvcc,
        CUDACXX=str(tmp_path / "none"),
    )
    assert says in output


# ---- what a release shows ------------------------------------------------------------------------


def test_links_of_a_release_lead_into_the_repository(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FUSEDCNN_REPOSITORY", raising=False)
    repository = importlib.import_module("repository")
    monkeypatch.delitem(sys.modules, "repository")
    link = r"(!?)\[[^\]]*\]\(([^)\s]+)\)"

    plain = repository.dynamic_metadata({}, {"version": "1.2"})
    assert plain["readme"]["text"] == (ROOT / "README.md").read_text()
    assert plain["urls"] == {}

    address = "https://example.org/owner/name"
    monkeypatch.setenv("FUSEDCNN_REPOSITORY", address + "/")
    released = repository.dynamic_metadata({}, {"version": "1.2"})
    assert released["urls"] == {"Repository": address}
    before, after = (re.findall(link, m["readme"]["text"]) for m in (plain, released))
    assert len(before) > 5
    for (image, old), (_, new) in zip(before, after, strict=True):
        assert new == f"{address}/{'raw' if image else 'blob'}/v1.2/{old}"


def test_releases_build_what_the_metadata_lists():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    listed = [f"cp3{minor}" for minor in re.findall(r":: 3\.(\d+)", PYPROJECT)]
    assert re.search(r"python: \[(.*)\]", workflow)[1].split(", ") == listed
    assert re.search(r'^build = "(.*)"', PYPROJECT, re.M)[1].split() == [f"{v}-*" for v in listed]


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
