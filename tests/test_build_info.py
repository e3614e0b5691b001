"""build_info, the command line, forcing kernels, the stock layers' calls, import time."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import fusedcnn
import pytest
import torch
from fusedcnn import _ops, _stock, build_info, conv_relu_max_pool2d
from fusedcnn.__main__ import main
from fusedcnn.functional import pack_geometry

PASSES = ("forward", "grad_weight", "grad_input")
SUPPORTED = [isa["name"] for isa in build_info()["isas"] if isa["supported"]]


def run_python(*arguments: str) -> str:
    """Standard output of a fresh Python, away from the source tree."""
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, cwd=Path.home()
    ).stdout


def test_build_info():
    info = build_info()
    assert set(info) == {
        "version", "compiler", "library", "torch", "isas", "kernels", "winograd", "cuda",
        "devices", "stock_calls",
    }  # fmt: skip
    assert info["version"] == fusedcnn.__version__
    assert info["torch"] == torch.__version__
    assert Path(info["library"]).is_file()
    json.dumps(info)  # plain values all through


def test_isas():
    """Widest first, baseline last; exactly one in use, the first that this machine supports."""
    isas = build_info()["isas"]
    names = [isa["name"] for isa in isas]
    assert len(set(names)) == len(names)
    assert names[-1] == SUPPORTED[-1] == "baseline"
    assert [isa["name"] for isa in isas if isa["selected"]] == SUPPORTED[:1]


@pytest.mark.parametrize("isa", [i["name"] for i in build_info()["isas"] if not i["base"]])
def test_every_isa_has_a_kernel_for_everything(isa):
    """ "general" covers every call; it stands last in its pass, to leave the others any."""
    for pass_name in PASSES:
        names = [
            row["name"]
            for row in build_info()["kernels"]
            if (row["isa"], row["pass"]) == (isa, pass_name)
        ]
        assert len(set(names)) == len(names)
        assert names[-1] == "general"


@pytest.mark.parametrize("isa", SUPPORTED)
def test_last_selected_is_what_ran(isa):
    isas = [isa, *(i["base"] for i in build_info()["isas"] if i["name"] == isa)]
    rows = [row for row in build_info()["kernels"] if row["isa"] in isas]
    geometry = pack_geometry((3, 3), padding=1)
    input, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    ran = set()
    for row in rows:
        with _ops.force(isa, "general"):  # so that nothing of the row before is left
            output, code = _ops.forward_op(input, weight, None, geometry, True)
            _ops.backward_op(output, input, weight, code, geometry, 7)
        assert _ops._C.last_selected() == dict.fromkeys(PASSES, "general")
        expected = "general"  # still, where the kernel does not cover the call
        with _ops.force(isa, row["name"]), contextlib.suppress(RuntimeError):
            if row["pass"] == "forward":
                _ops.forward_op(input, weight, None, geometry, True)
            else:
                mask = 2 if row["pass"] == "grad_weight" else 1
                _ops.backward_op(output, input, weight, code, geometry, mask)
            expected = row["name"]
            ran.add(expected)
        assert _ops._C.last_selected()[row["pass"]] == expected
    assert {"general", "winograd_f2x2"} <= ran


def test_command_line(capsys):
    info, here = json.loads(run_python("-m", "fusedcnn", "info", "--json")), build_info()
    assert (info["version"], info["kernels"]) == (here["version"], here["kernels"])
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for row in (*here["isas"], *here["kernels"]):
        assert row["name"] in text
    assert fusedcnn.__version__ in text
    assert "selected on this machine" in text


def selected() -> str:
    return next(isa["name"] for isa in build_info()["isas"] if isa["selected"])


def test_force_selects_and_restores():
    """Nested, and after an exception: what was forced before is forced again."""
    first = selected()
    for isa in SUPPORTED:
        with _ops.force(isa, "general"):
            with _ops.force("baseline"):
                assert selected() == "baseline"
            assert selected() == isa
    with pytest.raises(KeyError), _ops.force("baseline", "general"):
        raise KeyError
    assert selected() == first


def test_force_errors():
    """A name that is unknown is an error that lists the known ones, and changes nothing."""
    before = _ops._C.forced()
    with pytest.raises(ValueError, match=r"isa: .*baseline.*got 'mmx'"), _ops.force("mmx"):
        pass
    with pytest.raises(ValueError, match=r"kernel: .*general.*got 'no'"), _ops.force("", "no"):
        pass
    for isa in {isa["name"] for isa in build_info()["isas"]}.difference(SUPPORTED):
        with pytest.raises(ValueError, match="isa"), _ops.force(isa):
            pass
    assert _ops._C.forced() == before


@pytest.mark.parametrize(
    "kernel", sorted({k["name"] for k in build_info()["kernels"]} - {"general"})
)
def test_a_forced_kernel_that_does_not_cover_a_call(kernel):
    """It says why not, instead of leaving the call to another kernel."""
    dtype = torch.float64
    input, weight = torch.ones(1, 2, 20, 20, dtype=dtype), torch.ones(2, 1, 4, 5, dtype=dtype)
    message = rf"no \w+ kernel covers this call: .*{kernel}"
    with _ops.force(kernel=kernel), pytest.raises(RuntimeError, match=message):
        conv_relu_max_pool2d(input, weight, groups=2, pool_kernel_size=(3, 2))
    assert conv_relu_max_pool2d(input, weight, groups=2).shape == (1, 2, 8, 8)


def test_winograd_switch():
    """Off, the direct kernel's very bits come out; what was set before comes back."""
    winograd = fusedcnn.backends.winograd
    input, weight = torch.randn(1, 16, 16, 16), torch.randn(32, 16, 3, 3)

    def output():
        return conv_relu_max_pool2d(input, weight, padding=1)

    assert winograd.enabled
    assert build_info()["winograd"] is True
    by_default = output()
    with _ops.force(kernel="direct"):
        direct = output()
    with winograd.flags(enabled=False):
        assert build_info()["winograd"] is False
        assert torch.equal(output(), direct)
        with winograd.flags(enabled=True):
            assert torch.equal(output(), by_default)
        assert not winograd.enabled
    assert winograd.enabled
    assert not torch.equal(by_default, direct)  # or this test has compared nothing
    with pytest.raises(TypeError, match="enabled"):
        winograd.enabled = 1
    with pytest.raises(AttributeError, match="enable"):
        winograd.enable = False
    assert winograd.enabled


def test_stock_calls_are_counted_and_logged_once(caplog):
    """What the stock layers compute instead is never silent, what the kernels do is not listed."""
    _stock.calls.clear()
    input, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3, requires_grad=True)
    conv_relu_max_pool2d(input, weight).sum().backward()
    assert build_info()["stock_calls"] == {}
    # A meta tensor stands for any device without a kernel.
    input, weight = input.to("meta"), weight.to("meta")
    with caplog.at_level(logging.DEBUG, logger="fusedcnn"):
        for _ in range(3):
            assert conv_relu_max_pool2d(input, weight).shape == (1, 1, 1, 1)
    ((reason, count),) = build_info()["stock_calls"].items()
    assert "meta" in reason
    assert count == 3
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert reason in record.getMessage()


def test_import_time():
    """`import fusedcnn` takes less than 100 ms of processor time beside `import torch`."""
    program = (
        "import time, torch\nstart = time.process_time()\nimport fusedcnn\n"
        "print(time.process_time() - start)"
    )
    assert any(float(run_python("-c", program)) < 0.1 for _ in range(5))


def test_import_prints_nothing_and_pulls_in_nothing_heavy():
    """No compiler, no test or plotting package comes along."""
    program = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fusedcnn\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    added = run_python("-c", program)
    for package in ("numpy", "matplotlib", "tqdm", "hypothesis", "torchvision", "onnxruntime"):
        assert f"'{package}'" not in added
