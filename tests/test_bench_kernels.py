"""bench_kernels.py and bench_train_step.py: what they report. No test looks at a speed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from bench_scripts import REFUSE_TIMING, SPOIL_FUSED, answers_to, load, run_json, run_script
from fusedcnn import build_info
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = "bench_kernels"
QUICK = ["--min-time", "0.001", "--rounds", "2", "--threads", "1"]
# Covered by every kernel but the one for few input channels.
SHAPE = ["--shape", "2x16x8x8", "--out-channels", "8", "--padding", "1"]
DTYPES, LAYOUTS = ("float32", "float64", "bfloat16", "float16"), ("contiguous", "channels_last")
PASSES = ("forward", "forward+code", "grad_weight", "grad_input")
ISAS = [isa["name"] for isa in build_info()["isas"] if isa["supported"]]


def kernels(isa: str, pass_name: str) -> list[str]:
    name = pass_name.removesuffix("+code")
    return [k["name"] for k in build_info()["kernels"] if k["isa"] == isa and k["pass"] == name]


# ---- kernel by kernel ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Every ISA, dtype and layout on one shape: the process and its JSON."""
    arguments = [*QUICK, *SHAPE, "--dtype", *DTYPES, "--layout", *LAYOUTS, "--isa", *ISAS]
    return run_json(SCRIPT, tmp_path_factory.mktemp("ladder"), *arguments)


def test_every_kernel_is_listed(ladder):
    _, report = ladder
    found = [
        tuple(row[name] for name in ("dtype", "layout", "pass", "isa", "kernel"))
        for row in report["rows"]
    ]
    assert found == [
        (dtype, layout, pass_name, isa, kernel)
        for dtype in DTYPES
        for layout in LAYOUTS
        for pass_name in PASSES
        for isa in ISAS
        for kernel in kernels(isa, pass_name)
    ]


def test_kernels_are_timed_or_say_why_not(ladder):
    process, report = ladder
    assert report["status"] == "right"
    for row in report["rows"]:
        if row["status"] == "not covered":
            assert row["kernel"] != "general"
            assert row["reason"]
            assert f"{row['kernel']}: not covered: {row['reason']}" in process.stdout
            assert "median_us" not in row
        else:
            assert row["status"] == "timed"
            assert row["agreement"]
            assert all(r["right"] and r["error"] <= r["limit"] for r in row["agreement"].values())


def test_selected_kernel_is_the_first_that_covers(ladder):
    _, report = ladder
    groups = {}
    for row in report["rows"]:
        key = tuple(row[name] for name in ("dtype", "layout", "pass", "isa"))
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        covering = [row["kernel"] for row in rows if row["status"] == "timed"]
        assert [row["kernel"] for row in rows if row["selected"]] == covering[:1]


def test_rates_follow_from_the_time(ladder):
    _, report = ladder
    peaks = {peak["isa"]: peak["fma_gflops"] for peak in report["peaks"]}
    assert list(peaks) == ISAS
    for row in report["rows"]:
        # Two images, 8 channels of 8x8 outputs, 3x3 taps on 16 channels.
        assert row["flops"] == 2 * (2 * 8 * 8 * 8 * 16 * 9)
        if row["status"] == "timed":
            assert 0 < row["min_us"] <= row["median_us"]
            assert row["ns_per_image"] == pytest.approx(1e3 * row["median_us"] / 2)
            assert row["gflops"] == pytest.approx(row["flops"] / row["median_us"] / 1e3)
            peak = peaks[row["isa"]] / (2 if row["dtype"] == "float64" else 1)
            assert row["peak_fraction"] == pytest.approx(row["gflops"] / peak)


def test_each_pass_checks_what_it_computes(ladder):
    _, report = ladder
    checked = {row["pass"]: set(row["agreement"]) for row in report["rows"] if "agreement" in row}
    assert checked == {
        "forward": {"output"},
        "forward+code": {"output", "code"},
        "grad_weight": {"grad weight", "grad bias"},
        "grad_input": {"grad input"},
    }


def test_named_kernels_that_do_not_cover_are_listed(tmp_path):
    arguments = ["--shape", "3x9x9", "--out-channels", "4", "--kernel-size", "5", "--stride", "2"]
    arguments += ["--kernel", "winograd2", "general", "--passes", "forward", "grad_input"]
    process, report = run_json(
        SCRIPT, tmp_path, *QUICK, *arguments, "--batch-sizes", "1", "3", "--isa", "baseline"
    )
    found = [(row["batch"], row["pass"], row["kernel"], row["status"]) for row in report["rows"]]
    assert found == [
        (batch, pass_name, kernel, status)
        for batch in (1, 3)
        for pass_name in ("forward", "grad_input")
        for kernel, status in (("winograd2", "not covered"), ("general", "timed"))
    ]
    assert "no grad_input kernel named winograd2" in process.stdout


SPOILED = {
    "output": """
forward = passes.forward_op
def spoiled(*args):
    output, code = forward(*args)
    return 1.001 * output, code
passes.forward_op = spoiled
""",
    "code": """
forward = passes.forward_op
def spoiled(*args):
    output, code = forward(*args)
    return output, torch.where(code == 255, code, (code + 1) % 4)
passes.forward_op = spoiled
""",
    "grads": """
backward = passes.backward_op
passes.backward_op = lambda *args: tuple(1.001 * grad for grad in backward(*args))
""",
}


@pytest.mark.parametrize(
    ("spoiled", "passes"),
    [
        ("output", ["forward", "forward+code"]),
        ("code", ["forward+code"]),
        ("grads", ["grad_weight", "grad_input"]),
    ],
)
def test_wrong_kernels_are_not_timed(tmp_path, spoiled, passes):
    process = run_script(
        SCRIPT, tmp_path, *QUICK, *SHAPE, "--passes", *passes, "--json", "out.json",
        prepare=REFUSE_TIMING + "import torch, passes\n" + SPOILED[spoiled],
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["status"] == "wrong"
    assert {row["pass"] for row in report["rows"]} == set(passes)
    assert {row["status"] for row in report["rows"]} <= {"wrong", "not covered"}
    assert ": wrong: " in process.stdout


# ---- blocks beside the stock layers --------------------------------------------------------------


def test_summary(tmp_path):
    arguments = ["--blocks", "lenet-2", "gray-1", "--batch-sizes", "2"]
    process, report = run_json(SCRIPT, tmp_path, *QUICK, *arguments)
    found = [(row["block"], row["kind"], row["input_grad"]) for row in report["rows"]]
    assert found == [
        ("lenet-2", "forward", False),
        ("lenet-2", "gradients", True),
        ("gray-1", "forward", False),  # images need no gradient
        ("gray-1", "gradients", False),
    ]
    (peak,) = report["peaks"]
    blocks = {block.name: block for block in load("blocks").BLOCKS}
    for row in report["rows"]:
        assert row["status"] == "timed"
        medians = {one["name"]: one["median_us"] for one in row["contenders"]}
        assert list(medians) == ["fused", "eager", "eager-cl"]
        fused = medians.pop("fused")
        assert row["best_peer"] == min(medians, key=medians.get)
        assert row["speedup"]["ratio"] == pytest.approx(min(medians.values()) / fused)
        passes = 1 if row["kind"] == "forward" else 2 + row["input_grad"]
        assert row["flops"] == passes * 2 * blocks[row["block"]].flops
        assert row["peak_fraction"] == pytest.approx(
            row["flops"] / fused / 1e3 / peak["fma_gflops"]
        )
        assert len(row["kernels"]) == passes
        for pass_name, kernel in row["kernels"].items():
            assert kernel in kernels(peak["isa"], pass_name)
        agreement = row["contenders"][0]["agreement"]
        assert ("grad weight" in agreement) == (row["kind"] == "gradients")
    assert "lenet-2" in process.stdout


def test_summary_refuses_wrong_results(tmp_path):
    process = run_script(
        SCRIPT, tmp_path, *QUICK, "--blocks", "lenet-2", "--batch-sizes", "2", "--json", "out.json",
        prepare=SPOIL_FUSED + REFUSE_TIMING,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["status"] for row in report["rows"]] == ["wrong", "wrong"]
    for row in report["rows"]:
        statuses = {one["name"]: one["status"] for one in row["contenders"]}
        assert statuses == {"fused": "wrong", "eager": "right", "eager-cl": "right"}
        assert row["speedup"] is None


# ---- the list of blocks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks():
    return load("blocks").BLOCKS


def test_blocks_count_their_flops(blocks):
    assert len({block.name for block in blocks}) == len(blocks)
    for block in blocks:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            output = block.stock()(torch.empty(1, *block.image))
        assert block.flops == counter.get_total_flops()
        assert block.output == output.shape[1:]


def test_fused_blocks_are_the_stock_blocks(blocks):
    for block in blocks:
        stock, fused = block.stock(), block.fused()
        fused.load_state_dict(stock.state_dict())
        if block.flops < 1e8:  # the sizes of the others are compared, not their values
            input = torch.randn(1, *block.image)
            torch.testing.assert_close(fused(input), stock(input), rtol=1e-4, atol=1e-5)
        with torch.device("meta"):
            assert block.fused()(torch.empty(1, *block.image)).shape[1:] == block.output


def test_blocks_of_known_networks(blocks):
    """Pooled sizes as the papers give them."""
    outputs = {block.name: tuple(block.output) for block in blocks}
    assert outputs["lenet-1"] == (6, 14, 14)
    assert outputs["lenet-2"] == (16, 5, 5)
    assert outputs["alexnet-1"] == (64, 27, 27)
    assert outputs["alexnet-2"] == (192, 13, 13)
    assert outputs["alexnet-5"] == (256, 6, 6)
    assert outputs["stem"] == (64, 56, 56)
    assert [outputs[f"vgg11-{i}"][1] for i in range(1, 6)] == [112, 56, 28, 14, 7]


# ---- what goes wrong -----------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "unknown block": (["alexnet-9"], "BLOCK: expected one of simplecnn-1, "),
    "unknown kernel": (["--kernel", "magic"], "kernel: expected one of"),
    "unknown ISA": (["--isa", "mmx"], "isa: expected one of"),
    "unknown pass": (["--passes", "sideways"], "--passes"),
    "unknown dtype": (["--dtype", "int8"], "--dtype"),
    "unknown layout": (["--layout", "nchw"], "--layout"),
    "shape of two": (["--shape", "3x3"], "--shape: expected sizes over 0 as CxHxW"),
    "shape with 0": (["--shape", "0x3x9x9"], "--shape: expected sizes over 0 as CxHxW"),
    "no channels": (["--shape", "3x9x9"], "--out-channels: needed with --shape"),
    "no shape": (["--stride", "2"], "--shape: needed where sizes are given: stride"),
    "name and shape": (["stem", *SHAPE], "--shape: expected no block names beside it"),
    "two batch sizes": ([*SHAPE, "--batch-sizes", "3"], "--batch-sizes: not allowed"),
    "kernel too large": ([*SHAPE, "--kernel-size", "11"], "--shape: "),
    "channels and groups": ([*SHAPE, "--groups", "3"], "--shape: in_channels must be divisible"),
    "stride 0": ([*SHAPE, "--stride", "0"], "--stride: expected N or HxW from 1"),
    "pool padding": ([*SHAPE, "--pool-padding", "2"], "--shape: "),
    "no out-channels": (["--shape", "3x9x9", "--out-channels", "0"], "--out-channels: expected"),
    "stride of three": ([*SHAPE, "--stride", "1x2x3"], "--stride: expected N or HxW"),
    "kernel of a summary": (["--blocks", "--kernel", "general"], "--kernel: not allowed with"),
    "layout of a summary": (["--blocks", "--layout", "contiguous"], "--layout: not allowed with"),
    "contenders without": (["--contenders", "eager"], "--contenders: not allowed without --blocks"),
    "dtypes of a summary": (
        ["--blocks", "--dtype", "float32", "float64"],
        "--dtype: expected one with --blocks",
    ),
    "threads": (["--batch-sizes", "1", "--threads", "1", "1"], "--threads: expected 1 number or 1"),
    "JSON folder": (["--json", os.curdir], "--json: cannot write"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit status and stderr for each of BAD_ARGUMENTS."""
    arguments = {name: arguments for name, (arguments, _) in BAD_ARGUMENTS.items()}
    return answers_to(SCRIPT, tmp_path_factory.mktemp("bad"), arguments)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_is_refused_before_anything_is_computed(answers, name):
    status, errors = answers[name]
    assert status == 2
    assert BAD_ARGUMENTS[name][1] in errors


# ---- training step -------------------------------------------------------------------------------


def test_train_step_is_split(tmp_path):
    process, report = run_json("bench_train_step", tmp_path, *QUICK, "--batch-sizes", "2")
    assert [(row["model"], row["optimizer"]) for row in report["rows"]] == [
        (model, optimizer)
        for model in ("SimpleCNN", "FusedSimpleCNN")
        for optimizer in ("fused", "default", "foreach")
    ]
    for row in report["rows"]:
        assert (row["batch"], row["threads"]) == (2, 1)
        alone, step = row["model_alone"]["median_us"], row["step"]["median_us"]
        assert row["added_us"] == pytest.approx(step - alone)
        assert list(row["parts_us"]) == [
            "zero_grad", "forward", "loss", "backward", "optimizer", "rest",
        ]  # fmt: skip
        assert all(part > 0 for part in row["parts_us"].values())
    assert "FusedSimpleCNN" in process.stdout
