"""What the check of a device's kernels sees: run on the CPU's operators, right and wrong ones."""

from __future__ import annotations

import pytest
import torch
from checked_device import BACKWARD, FORWARD, NORM, NORM_BACKWARD, wrap
from checks import over_dtypes
from forcing import KERNELS, Forced
from fusedcnn import _device_check, _ops
from fusedcnn._device_check import InconclusiveError, Kernel
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(restore_threads):
    """Operands are so small that threads only wait for each other."""
    torch.set_num_threads(1)


def trial_on(isa: str):
    """Takes a kernel of the CPU's for the device's."""
    return lambda name, _tf32: _ops.force(isa, name)


@pytest.mark.parametrize("forced", KERNELS, ids=str)
def test_right_kernels_pass(forced: Forced):
    """All of the CPU's do, but for a Winograd transform that rounds integers."""
    kernel = Kernel(forced.pass_name, forced.kernel)
    try:
        found = _device_check.check(kernel, CPU, trial_on(forced.isa))
    except InconclusiveError:
        pytest.skip("covers none of the blocks")
    assert (found is None) == forced.exact, found
    if found is not None:
        assert found.startswith("output of [2, 16, 16, 16] to 32 channels in float32")


def test_a_right_batch_norm_passes():
    assert _device_check.check_batch_norm(CPU) is None


@pytest.mark.parametrize("dtype", _device_check.DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("pass_name", "operator", "result", "name"),
    [
        ("forward", FORWARD, 0, "output"),
        ("forward", FORWARD, 1, "code"),
        ("grad_weight", BACKWARD, 1, "grad_weight"),
        ("grad_weight", BACKWARD, 2, "grad_bias"),
        ("grad_input", BACKWARD, 0, "grad_input"),
    ],
)
def test_one_wrong_element_is_seen(monkeypatch, pass_name, operator, result, name, dtype, last):
    """In any type and layout, however small the difference."""

    def change(results: list[Tensor], arguments: tuple) -> None:
        input = arguments[operator == BACKWARD]
        if input.dtype == dtype and last == (not input.is_contiguous()):
            results[result][(-1,) * results[result].dim()] += 1

    wrap(monkeypatch, operator, change)
    found = _device_check.check(Kernel(pass_name, "general"), CPU, trial_on(""))
    layout = "channels_last" if last else "contiguous"
    assert found.startswith(f"{name} of [")
    assert found.endswith(f" in {str(dtype).removeprefix('torch.')}, {layout}")


@pytest.mark.parametrize(
    ("operator", "result", "name"),
    [
        *((NORM, i, name) for i, name in enumerate(["output", "code", "extremum", "mean", "var"])),
        *((NORM_BACKWARD, i, f"grad_{name}") for i, name in enumerate(["input", "weight", "bn_w"])),
        (NORM_BACKWARD, 3, "grad_bn_bias"),
    ],
)
@over_dtypes
def test_a_wrong_result_of_a_batch_norm_is_seen(monkeypatch, operator, result, name, dtype):
    """A tenth of the largest is more than any rounding."""

    def change(results: list[Tensor], arguments: tuple) -> None:
        if arguments[operator == NORM_BACKWARD].dtype == dtype:
            wrong = results[result]
            live = results[1] != 255 if name == "extremum" else torch.ones_like(wrong).bool()
            index = tuple(live.nonzero()[-1])
            wrong[index] += 1 if name == "code" else wrong.abs().amax() / 10

    wrap(monkeypatch, operator, change)
    found = _device_check.check_batch_norm(CPU)
    assert found.startswith(f"{name}")
    assert f" in {str(dtype).removeprefix('torch.')}, " in found


def test_a_nan_that_gets_lost_is_seen(monkeypatch):
    wrap(monkeypatch, FORWARD, lambda results, _: results[0].nan_to_num_(0))
    found = _device_check.check(Kernel("forward", "general"), CPU, trial_on(""))
    assert found.startswith("output of [")


def test_small_integers_are_exact():
    """What the answers' exactness rests on: no sum is beyond bfloat16's 256."""
    blocks = {*_device_check._SPECIALISED, *_device_check._AROUND_STOCK}
    for case in map(_device_check._case, blocks):
        for answer in (case.output, *case.grads):
            assert answer.nan_to_num(0).abs().max() <= 256, case.block
        assert case.output.isnan().any()
        assert (case.output == 0).any() or case.block.pool > 2
    for case in map(_device_check._norm_case, _device_check._AROUND_STOCK):
        # Which windows are off is no question of rounding, unless all that is near 0 is exact.
        output = case.results[0]
        assert output[output > 0].min() > 1e-4
