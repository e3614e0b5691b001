"""examples/serve: from a checkpoint to classes, in Python and in C++, and what bad input gets."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fusedcnn
import numpy as np
import pytest
import torch
import torch._inductor.config

pytest.importorskip("tqdm", reason="needs pip install 'fusedcnn[examples]'")
pytest.importorskip("matplotlib", reason="needs pip install 'fusedcnn[examples]'")

if not hasattr(torch._inductor.config.cpp, "march") or platform.machine() != "x86_64":
    pytest.skip("needs a torch that compiles for other CPUs, and x86-64", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SERVE = EXAMPLES / "serve"
sys.path[:0] = [str(EXAMPLES), str(SERVE)]

import classify  # noqa: E402
import export  # noqa: E402
import train_cifar10  # noqa: E402

LIBRARY = fusedcnn.build_info()["library"]
TORCH = Path(torch.__file__).parent
IMAGES = 300

# Probabilities from two evaluation orders in float32: what the logits may differ by (sums of at
# most 2,049 terms with magnitudes below 1, three layers after one another), and a printed digit.
CLOSE = 3 * 2049 * 2.0**-24 + 0.001


class Served(NamedTuple):
    """A trained model, exported, and images with what the Python model says of them."""

    folder: Path  # checkpoint.pt, classifier.pt2, images.npy
    labels: torch.Tensor
    predicted: torch.Tensor
    probabilities: torch.Tensor  # [N, 10]
    names: list[str]


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Served:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("serving")
    arguments = ["--train-images", "2000", "--test-images", "100", "--epochs", "4", "--lr", "3e-3"]
    arguments += ["--batch-size", "50", "--device", "cpu", "--threads", "1"]
    arguments += ["--output", str(folder)]
    with contextlib.redirect_stdout(None), torch.random.fork_rng(devices=[]):
        assert train_cifar10.main(arguments) == 0
        assert export.main([str(folder), str(folder / "classifier.pt2")]) == 0
    torch.set_num_threads(threads)
    images, labels = train_cifar10.draw_images(IMAGES, seed=2)
    np.save(folder / "images.npy", images.numpy())
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    model = fusedcnn.SimpleCNN().eval()
    model.load_state_dict(state["model"])
    with torch.no_grad():
        logits = model((images - state["data"]["mean"]) / state["data"]["std"])
    names = state["data"]["class_names"]
    return Served(folder, labels, logits.argmax(1), logits.softmax(1), names)


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """main.cpp, built."""
    build, tools = tmp_path_factory.mktemp("build"), Path(sys.executable).parent
    cmake = tools / "cmake" if (tools / "cmake").exists() else "cmake"
    environ = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for command in (["-S", SERVE, "-B", build, f"-DTORCH_DIR={TORCH}"], ["--build", build]):
        done = subprocess.run([cmake, *command], capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "classify"


# How a program is run: (package, images, options) to its end.
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(params=["python", "cpp"])
def run(request, capfd) -> Run:
    """classify.py and the C++ program by turns; the former in this process without options."""

    def call(*arguments: object, **options) -> subprocess.CompletedProcess:
        given = [str(part) for part in arguments]
        one_thread = {"env": os.environ | {"OMP_NUM_THREADS": "1"}}
        if request.param == "cpp":
            command = [request.getfixturevalue("program"), LIBRARY]
        elif options:
            command = [sys.executable, SERVE / "classify.py"]
        else:
            status = classify.main(given)
            return subprocess.CompletedProcess(given, status, *capfd.readouterr())
        whole = [*command, *given]
        return subprocess.run(whole, capture_output=True, text=True, **one_thread | options)

    return call


def assert_refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    """One line, with all that is expected, and exit status 2: no signal."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("classify")
    assert [text for text in expected if text not in done.stderr] == [], done.stderr


def with_metadata(package: Path, copy: Path, **changes: str | None) -> Path:
    """Copy a package with other metadata; None leaves an entry out."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(copy, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("_metadata.json"):
                changed = json.loads(content) | changes
                content = json.dumps({k: v for k, v in changed.items() if v is not None})
            # The loader takes the first folder for the archive's name, which the file's must be.
            new.writestr(item.filename.replace(package.stem, copy.stem, 1), content)
    return copy


# ---- what they answer ----------------------------------------------------------------------------


def test_classes_and_accuracy_are_the_models(run, served):
    """All classes, and so the accuracy, are those of the stock model of the checkpoint."""
    done = run(served.folder / "classifier.pt2", served.folder / "images.npy", "--batch", 7)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    answered = torch.tensor([served.names.index(name) for name, _ in rows])
    sure = torch.tensor([float(probability) for _, probability in rows])
    best, second = served.probabilities.topk(2).values.unbind(1)
    torch.testing.assert_close(sure, best, rtol=0, atol=CLOSE)
    clear = best - second > 2 * CLOSE
    assert clear.float().mean() > 0.97
    assert torch.equal(answered[clear], served.predicted[clear])
    accuracy, expected = (
        (classes == served.labels).float().mean().item() for classes in (answered, served.predicted)
    )
    assert accuracy == pytest.approx(expected, abs=(~clear).float().mean().item())
    assert accuracy > 0.3  # of ten classes: it has been trained


def test_one_image_and_any_batch(run, served, tmp_path):
    images = np.load(served.folder / "images.npy")
    whole = run(served.folder / "classifier.pt2", served.folder / "images.npy")
    np.save(tmp_path / "one.npy", images[:1])
    one = run(served.folder / "classifier.pt2", tmp_path / "one.npy")
    assert one.stdout == whole.stdout.splitlines(keepends=True)[0]
    assert one.returncode == whole.returncode == 0


def test_latency_is_printed(run, served):
    files = served.folder / "classifier.pt2", served.folder / "images.npy"
    done = run(*files, "--time", 20, "--batch", 4)
    pattern = r"4 images, \d+ threads: median ([\d.]+) us, least ([\d.]+) us\n"
    median, least = map(float, re.fullmatch(pattern, done.stdout).groups())
    assert 0 < least <= median


def test_no_python_is_loaded_into_the_program(program, served, tmp_path):
    # LD_DEBUG lists every library that is loaded, those that dlopen brings included.
    environ = os.environ | {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(tmp_path / "loaded")}
    files = served.folder / "classifier.pt2", served.folder / "images.npy"
    subprocess.run([program, LIBRARY, *files], env=environ, stdout=subprocess.DEVNULL, check=True)
    loaded = "".join(file.read_text() for file in tmp_path.glob("loaded.*"))
    assert "libfusedcnn" in loaded
    assert "libtorch_cpu" in loaded
    assert "libpython" not in loaded
    assert "libtorch_python" not in loaded


# ---- CPUs ----------------------------------------------------------------------------------------


def test_package_for_any_cpu_has_no_avx(served, tmp_path):
    with zipfile.ZipFile(served.folder / "classifier.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extract(name, tmp_path)
    listing = subprocess.run(
        ["objdump", "-d", tmp_path / name], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"\tdiv[ps]s ", listing)  # there is arithmetic in it
    assert not re.search(r"%[yz]mm|\tv[a-z]+ ", listing)


def test_package_for_avx2_is_refused_without_it(run, served, tmp_path):
    package = with_metadata(served.folder / "classifier.pt2", tmp_path / "avx2.pt2", cpu="avx2")
    done = run(
        package, served.folder / "images.npy", env=os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    )
    assert_refused(done, "avx2.pt2: made for CPUs with avx2, this one has DEFAULT")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert run(package, served.folder / "images.npy").returncode == 0


def test_package_for_an_unknown_cpu_is_refused(run, served, tmp_path):
    package = with_metadata(served.folder / "classifier.pt2", tmp_path / "new.pt2", cpu="avx9")
    assert_refused(run(package, served.folder / "images.npy"), "made for CPUs with avx9")


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-user")
def test_emulated_machine_without_avx(program, served, tmp_path):
    """It classifies with the package for any CPU, and refuses the other."""
    np.save(tmp_path / "few.npy", np.load(served.folder / "images.npy")[:3])
    package = served.folder / "classifier.pt2"

    def emulated(package: Path) -> subprocess.CompletedProcess:
        command = ["qemu-x86_64", "-cpu", "qemu64", program, LIBRARY, package, tmp_path / "few.npy"]
        return subprocess.run(command, capture_output=True, text=True)

    done = emulated(package)
    assert done.returncode == 0, done.stderr
    names = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert names == [served.names[label] for label in served.predicted[:3]]
    avx2 = with_metadata(package, tmp_path / "avx2.pt2", cpu="avx2")
    assert_refused(emulated(avx2), "made for CPUs with avx2")


# ---- bad input -----------------------------------------------------------------------------------

BAD_IMAGES = {
    "size": (lambda images: images[:, :, :31], "[N, 3, 32, 32]", "3, 31, 32]"),
    "channels": (lambda images: images[:, :1], "[N, 3, 32, 32]", "1, 32, 32]"),
    "channels last": (lambda images: images.transpose(0, 2, 3, 1), "32, 32, 3]"),
    "one image": (lambda images: images[0], "[N, 3, 32, 32]", "[3, 32, 32]"),
    "five dimensions": (lambda images: images[None], "[N, 3, 32, 32]", "[1, 5, 3, 32, 32]"),
    "dtype": (lambda images: images.astype(np.float32), "uint8", "f"),
    "signed": (lambda images: images.astype(np.int8), "uint8", "i"),
    "none": (lambda images: images[:0], "expected an image or more"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_wrong_images(run, served, tmp_path, what):
    change, *expected = BAD_IMAGES[what]
    np.save(
        tmp_path / "bad.npy",
        np.ascontiguousarray(change(np.load(served.folder / "images.npy")[:5])),
    )
    assert_refused(
        run(served.folder / "classifier.pt2", tmp_path / "bad.npy"), "bad.npy", *expected
    )


@pytest.mark.parametrize("content", [b"", b"hello", slice(40), slice(3000)], ids=str)
def test_files_that_are_no_images(run, served, tmp_path, content):
    whole = (served.folder / "images.npy").read_bytes()
    (tmp_path / "bad.npy").write_bytes(whole[content] if isinstance(content, slice) else content)
    assert_refused(run(served.folder / "classifier.pt2", tmp_path / "bad.npy"), "bad.npy: expected")


def test_missing_files(run, served, tmp_path):
    package, images = served.folder / "classifier.pt2", served.folder / "images.npy"
    assert_refused(run(tmp_path / "no.pt2", images), "no.pt2: ")
    assert_refused(run(package, tmp_path / "no.npy"), "no.npy: ")
    assert_refused(run(package, tmp_path), str(tmp_path))


def test_damaged_package(run, served, tmp_path):
    """One bit of a weight, or of the code, which torch would load."""
    package = served.folder / "classifier.pt2"
    with zipfile.ZipFile(package) as archive:
        (item,) = [item for item in archive.infolist() if item.filename.endswith(".so")]
    content = bytearray(package.read_bytes())
    content[item.header_offset + item.file_size // 2] ^= 1
    (tmp_path / "bad.pt2").write_bytes(content)
    assert_refused(run(tmp_path / "bad.pt2", served.folder / "images.npy"), "bad.pt2: ")


def test_foreign_packages(run, served, tmp_path):
    images, package = served.folder / "images.npy", served.folder / "classifier.pt2"
    bad = tmp_path / "bad.pt2"
    for content in (b"", b"hello", package.read_bytes()[:100_000]):
        bad.write_bytes(content)
        assert_refused(run(bad, images), "bad.pt2: ")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("bad/file", "hello")
    assert_refused(run(bad, images), "bad.pt2: ")
    nothing_of_ours = dict.fromkeys(["format", "fusedcnn", "torch", "cpu", "image", "classes"])
    with_metadata(package, bad, **nothing_of_ours)
    assert_refused(run(bad, images), "bad.pt2: expected a package of export.py")
    with_metadata(package, bad, image="1, 28, 28")
    assert_refused(run(bad, images), "images.npy: expected", "[N, 1, 28, 28]")


@pytest.mark.parametrize("key", ["format", "fusedcnn", "torch"])
def test_packages_of_another_version(run, served, tmp_path, key):
    bad = with_metadata(served.folder / "classifier.pt2", tmp_path / "bad.pt2", **{key: "0.0.9"})
    assert_refused(
        run(bad, served.folder / "images.npy"), f"bad.pt2: made for {key} 0.0.9, this is"
    )


def test_libraries_that_do_not_fit(program, served, tmp_path):
    """None, no library, another library, and another version of it."""
    files = served.folder / "classifier.pt2", served.folder / "images.npy"
    other, source = tmp_path / "other.so", tmp_path / "other.cpp"
    (tmp_path / "text.so").write_text("hello")
    compiler = os.environ.get("CXX", "c++")
    source.write_text("int x;")
    subprocess.run([compiler, "-shared", "-o", other, source], check=True)
    newer = tmp_path / "newer.so"
    source.write_text('extern "C" const char* fusedcnn_version() { return "9.9"; }')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", newer, source], check=True)
    lines = {
        tmp_path / "none.so": "none.so: cannot open shared object file",
        tmp_path / "text.so": "text.so: ",
        other: "other.so: expected libfusedcnn",
        newer: f"classifier.pt2: made for fusedcnn {fusedcnn.__version__}, this is 9.9",
    }
    for library, line in lines.items():
        command = [program, library, *files]
        assert_refused(subprocess.run(command, capture_output=True, text=True), line)
    # The right version, without operators.
    source.write_text(source.read_text().replace("9.9", fusedcnn.__version__))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", newer, source], check=True)
    done = subprocess.run([program, newer, *files], capture_output=True, text=True)
    assert_refused(done, "Could not find schema for fusedcnn::")


def test_library_tells_its_version():
    import ctypes

    version = ctypes.CDLL(LIBRARY).fusedcnn_version
    version.restype = ctypes.c_char_p
    assert version().decode() == fusedcnn.__version__


@pytest.mark.parametrize(
    "options",
    [["--batch", "0"], ["--batch", "x"], ["--time", "-1"], ["--time"], ["more"]],
    ids=" ".join,
)
def test_bad_arguments(run, served, options):
    files = served.folder / "classifier.pt2", served.folder / "images.npy"
    assert_refused(run(*files, *options))


def test_nobody_reads_the_answer(run, served):
    files = served.folder / "classifier.pt2", served.folder / "images.npy"
    done = run(*files, preexec_fn=lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1))
    assert_refused(done, "cannot write the answer")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("missing classifier.pt2", "missing: No such file or directory"),
        ("images.npy classifier.pt2", "images.npy: expected a checkpoint of train_cifar10.py: "),
        ("other.pt classifier.pt2", "other.pt: expected a checkpoint of train_cifar10.py: "),
        ("checkpoint.pt classifier.zip", "output: expected a name ending in .pt2"),
        ("checkpoint.pt missing/classifier.pt2", "output: cannot write into the folder of"),
        ("checkpoint.pt classifier.pt2 --cpu mmx", "--cpu: invalid choice: 'mmx'"),
        ("checkpoint.pt", "the following arguments are required: output"),
    ],
)
def test_export_refuses(served, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(served.folder)
    monkeypatch.setattr(torch.export, "export", None)
    torch.save(fusedcnn.SimpleCNN().state_dict(), "other.pt")
    assert export.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("export.py: ")
    assert line in err


def test_export_without_a_compiler(served, tmp_path):
    """In a process of its own: Inductor would remember that there is none."""
    command = [sys.executable, SERVE / "export.py", served.folder, tmp_path / "other.pt2"]
    environ = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert done.stderr.startswith("export.py: ")
    assert "ompiler" in done.stderr


# ---- the operators -------------------------------------------------------------------------------


def test_package_without_the_operators(served):
    """What torch says in a process that has not imported fusedcnn."""
    code = "import sys; from torch import _C; "
    code += "_C._aoti.AOTIModelPackageLoader(sys.argv[1], 'model', False, 1, -1)"
    command = [sys.executable, "-c", code, str(served.folder / "classifier.pt2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Could not find schema for fusedcnn::" in done.stderr


def test_format_and_classifier_are_the_same_everywhere():
    assert classify.FORMAT == export.FORMAT
    assert f'"{export.FORMAT}"' in (SERVE / "main.cpp").read_text()
    page = EXAMPLES.parent / "docs" / "serving.md"
    assert inspect.getsource(export.Classifier) in page.read_text()
