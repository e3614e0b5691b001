"""The benchmarks: what they report, what they refuse. No test looks at a speed."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys

import fusedcnn
import pytest
import torch
from bench_scripts import QUICK, run_json
from fusedcnn import build_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
DTYPES, LAYOUTS = ("float32", "float64", "bfloat16", "float16"), ("contiguous", "channels_last")
PASSES = ("forward", "forward+code", "grad_weight", "grad_input")
ISAS = [isa["name"] for isa in build_info()["isas"] if isa["supported"]]
# Covered by every kernel but those for few input channels.
SHAPE = ["--shape", "2x16x8x8", "--conv", "8, 3, padding=1"]


def kernels(isa: str, pass_name: str) -> list[str]:
    """Of the ISA, and where it is a feature of its base after them."""
    name, info = pass_name.removesuffix("+code"), build_info()
    isas = [isa, next(i["base"] for i in info["isas"] if i["name"] == isa)]
    rows = [k for one in isas for k in info["kernels"] if (k["isa"], k["pass"]) == (one, name)]
    return list(dict.fromkeys(row["name"] for row in rows))


@pytest.fixture
def run_here(module, tmp_path, capsys):
    """Runs a script in this process; returns its exit status, what it printed, and its JSON."""

    def run(script: str, *arguments: str) -> tuple[int, str, dict]:
        path = tmp_path / "out.json"
        status = module(script).main([*arguments, "--json", str(path)])
        return status, capsys.readouterr().out, json.loads(path.read_text())

    return run


def check_times(result: dict) -> None:
    """What holds of every row with a time and of every comparison."""
    medians = {}
    for row in result["rows"]:
        if row["status"] == "timed":
            assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
            medians[row["name"]] = row["median_us"]
    for one in result.get("speedups", []):
        assert one["ratio"] == pytest.approx(medians[one["best_peer"]] / medians[one["own"]], 1e-4)
        assert 0 < one["q1"] <= one["q3"]


# ---- bench_block.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    """A run as a user starts it: the process and its JSON."""
    arguments = ["--contenders", "fused", "eager", "eager-cl", "onnxruntime"]
    arguments += ["--cases", "block1-forward", "block2-backward", "training"]
    return run_json("bench_block", tmp_path_factory.mktemp("bench"), *QUICK, *arguments)


def test_every_contender_is_timed_or_says_why_not(block):
    printed, report = block
    assert report["status"] == "right"
    cases = ["block1-forward", "block2-backward", "training"]
    assert [result["case"] for result in report["results"]] == cases
    for result in report["results"]:
        head = {"batch": 2, "threads": 1, "precision": "float32", "status": "timed"}
        assert head.items() <= result.items()
        check_times(result)
        statuses = {row["name"]: row["status"] for row in result["rows"]}
        onnx = "timed" if result["case"] == "block1-forward" else "unavailable"
        peers = {"eager": "timed", "eager-cl": "timed"}
        assert statuses == {"fused": "timed", **peers, "onnxruntime": onnx}
        assert [one["own"] for one in result["speedups"]] == ["fused"]
    assert "Error: it serves forward passes only [block2-b" in printed
    assert "times as fast" in printed


def test_ahead_of_time_compilation_where_it_serves(run_here):
    """Asked for by name; a case that it does not serve is complete without it."""
    arguments = ["--cases", "block1-forward", "training", "--contenders", "fused", "fused-aoti"]
    status, printed, report = run_here("bench_block", *QUICK, *arguments)
    assert status == 0
    for result, state in zip(report["results"], ("timed", "unavailable"), strict=True):
        check_times(result)
        assert [row["status"] for row in result["rows"]] == ["timed", state]
        assert result["status"] == "timed"
    assert "fused-aoti: unavailable: NotImplementedError: it serves forward passes" in printed


def test_work_is_held_against_the_limits(block):
    _, report = block
    (limits,) = report["limits"]
    assert limits["threads"] == 1
    assert limits["peak_gflops"] == limits["fma_gflops"] > 0
    result = report["results"][0]
    # 16 channels of 32x32 outputs, 27 multiply-adds each; image and pooled output, 4 bytes each.
    assert result["flops"] == 2 * (2 * 16 * 32 * 32 * 27)
    assert result["bytes"] == 2 * 4 * (3 * 32 * 32 + 16 * 16 * 16)
    assert result["peak_us"] == pytest.approx(result["flops"] / limits["peak_gflops"] / 1e3, 1e-4)
    assert result["copy_us"] == pytest.approx(result["bytes"] / limits["copy_gbps"] / 1e3, 1e-4)


def test_machine_is_recorded_without_its_paths(block):
    _, report = block
    machine = report["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["isa"] in ISAS
    assert machine["cpu"]
    words = re.findall(r'"(.*?)"', json.dumps(report))
    assert machine["system"] in words
    assert not [word for word in words if os.sep in word and os.path.exists(word)]
    assert sys.prefix not in json.dumps(report)


def test_saved_bytes_are_counted(block):
    _, report = block
    rows = {row["what"]: row for row in report["saved_bytes"]}
    image, full, pooled = 3 * 32 * 32, 16 * 32 * 32, 16 * 16 * 16  # elements per image
    # Stock: input, ReLU's output, int64 indices. Fused: input, one byte per pooled output.
    assert rows["block 1"]["stock"] == 2 * (4 * image + 4 * full + 8 * pooled)
    assert rows["block 1"]["fused"] == 2 * (4 * image + pooled)
    assert rows["both blocks"]["stock"] >= 5 * rows["both blocks"]["fused"]


def test_each_batch_size_has_its_threads(module):
    parser = module("options").Parser("", min_time=1, rounds=2)
    options = argparse.Namespace(batch_sizes=[1, 2, 2], threads=[1, 2, 2], device=CPU)
    assert parser.pair_runs(options, [], 1) == [(1, 1), (2, 2)]
    options.threads = [3]
    assert parser.pair_runs(options, [], 1) == [(1, 3), (2, 3)]


def test_what_fails_is_a_row_and_no_reason_to_stop(run_here, monkeypatch):
    def compile(*args, **kwargs):
        raise RuntimeError("no compiler here\nand a long explanation")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    names = ["--contenders", "fused", "compile", "onnxruntime"]
    status, printed, report = run_here("bench_block", *QUICK, "--cases", "block1-forward", *names)
    assert status == 0
    assert "compile: unavailable: RuntimeError: no compiler here [" in printed
    assert "onnxruntime: unavailable: " in printed
    assert report["results"][0]["rows"][0]["status"] == "timed"
    assert report["results"][0]["speedups"] == []


def test_time_is_up(run_here):
    arguments = ["--time-limit", "1e-9", "--cases", "training"]
    status, printed, report = run_here("bench_block", *QUICK, *arguments)
    assert (status, report["status"], report["results"]) == (1, "incomplete", [])
    assert [head["case"] for head in report["not_run"]] == ["training"]
    assert "NOT RUN, --time-limit was over: training, batch 2, 1 thread(s)" in printed


def test_wrong_results_are_not_timed(run_here, module, monkeypatch):
    """What is fused is off by a thousandth, far beyond rounding and far below what an eye sees."""
    for spoiled in (fusedcnn.ConvReLUMaxPool2d, fusedcnn.FusedSimpleCNN):
        right = spoiled.forward
        monkeypatch.setattr(spoiled, "forward", lambda self, x, right=right: 1.001 * right(self, x))
    monkeypatch.setattr(module("contenders"), "time_rows", None)
    contenders = ["--contenders", "fused", "eager"]
    status, printed, report = run_here("bench_block", *QUICK, *contenders)
    assert (status, report["status"]) == (1, "wrong")
    assert len(report["results"]) == 6
    for result in report["results"]:
        assert (result["status"], result["speedups"]) == ("wrong", [])
        statuses = {row["name"]: row["status"] for row in result["rows"]}
        assert statuses == {"fused": "wrong", "eager": "right"}
    assert "WRONG, not timed" in printed
    assert "fused: wrong: output is off by" in printed


# ---- bench_kernels.py ----------------------------------------------------------------------------


def test_every_kernel_is_timed_or_says_why_not(run_here):
    arguments = [*QUICK[2:], *SHAPE, "--dtype", *DTYPES, "--layout", *LAYOUTS, "--isa", *ISAS]
    _, printed, report = run_here("bench_kernels", *arguments)
    assert report["status"] == "right"
    keys = ("precision", "layout", "isa", "pass")
    assert [
        (*(result[key] for key in keys), [row["name"] for row in result["rows"]])
        for result in report["results"]
    ] == [
        (dtype, layout, isa, pass_name, kernels(isa, pass_name))
        for dtype in DTYPES
        for layout in LAYOUTS
        for isa in ISAS
        for pass_name in PASSES
    ]
    peaks = {(one["isa"], one["precision"]): one["peak_gflops"] for one in report["limits"]}
    for result in report["results"]:
        check_times(result)
        timed = [row["name"] for row in result["rows"] if row["status"] == "timed"]
        assert result["selected"] in timed
        # Two images, 8 channels of 8x8 outputs, 3x3 taps on 16 channels.
        assert result["flops"] == 2 * (2 * 8 * 8 * 8 * 16 * 9)
        peak = peaks[result["isa"], result["precision"]]
        assert result["peak_us"] == pytest.approx(result["flops"] / peak / 1e3, 1e-4)
        for row in result["rows"]:
            if row["status"] != "timed":
                assert row["status"] == "not covered"
                assert row["name"] != "general"
                assert f"{row['name']}: not covered: {row['reason']} [" in printed
    compared = sum(len(result["rows"]) > 1 for result in report["results"])
    good, of = re.search(r"selection: (\d+) of (\d+) choices within 10 %", printed).groups()
    assert printed.count("times as fast") == int(of) - int(good)
    assert 0 < int(of) <= compared
    # Images, weight, bias and pooled outputs, four bytes each.
    assert report["results"][0]["bytes"] == 4 * (2 * 1024 + 8 * 144 + 8 + 2 * 8 * 16)


def test_named_kernels_that_do_not_cover_are_listed(run_here):
    other = next(k for k in kernels(ISAS[0], "forward") if k.startswith("winograd"))
    arguments = ["--shape", "3x9x9", "--conv", "4, 5, stride=2", "--kernel", other, "general"]
    arguments += ["--passes", "forward", "grad_input", "--isa", ISAS[0], *QUICK]
    _, printed, report = run_here("bench_kernels", *arguments)
    found = [[(row["name"], row["status"]) for row in r["rows"]] for r in report["results"]]
    assert found == [[(other, "not covered"), ("general", "timed")]] * 2
    assert f"no grad_input kernel named {other}" in printed


def off_by_a_thousandth(results):
    return tuple(1.001 * result if result.is_floating_point() else result for result in results)


def next_code(results):
    output, code = results
    return output, torch.where(code == 255, code, (code + 1) % 4)


@pytest.mark.parametrize(
    ("operator", "spoil", "passes"),
    [
        ("forward_op", off_by_a_thousandth, ["forward", "forward+code"]),
        ("forward_op", next_code, ["forward+code"]),
        ("backward_op", off_by_a_thousandth, ["grad_weight", "grad_input"]),
    ],
)
def test_wrong_kernels_are_noticed(module, monkeypatch, operator, spoil, passes):
    script, precision = module("bench_kernels"), module("timing").PRECISIONS["float32"]
    block, right = module("blocks").BLOCKS["gray-2"], getattr(script, operator)
    calls = script.Calls(block, 2, precision, CPU, "contiguous")
    assert not any(map(calls.check, PASSES))
    monkeypatch.setattr(script, operator, lambda *args: spoil(right(*args)))
    for name in PASSES:
        assert bool(calls.check(name)) is (name in passes), name


def test_real_blocks(run_here):
    _, printed, report = run_here("bench_kernels", *QUICK, "--blocks", "lenet-2", "gray-1")
    passes = {
        "lenet-2 forward": PASSES[:1],
        "lenet-2 forward+backward": ("forward", "grad_weight", "grad_input"),
        "gray-1 forward": PASSES[:1],
        "gray-1 forward+backward": ("forward", "grad_weight"),  # images need no gradient
    }
    assert [result["case"] for result in report["results"]] == list(passes)
    for result in report["results"]:
        check_times(result)
        assert [row["name"] for row in result["rows"]] == ["fused", "eager", "eager-cl"]
        isa = report["options"]["isa"][0]
        for kernel, name in zip(result["kernels"], passes[result["case"]], strict=True):
            assert kernel in kernels(isa, name)
    assert "lenet-2 forward+backward" in printed


def test_blocks_are_what_they_say(module):
    """FLOPs, sizes as the papers give them, and the fused form."""
    blocks = module("blocks").BLOCKS
    for block in blocks.values():
        stock, fused = block.stock(), block.fused()
        fused.load_state_dict(stock.state_dict())
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            output = block.stock()(torch.empty(1, *block.image))
        assert output.shape[1:] == block.output
        assert block.flops == counter.get_total_flops()
        if block.flops < 1e8:  # the sizes of the others are compared, not their values
            input = torch.randn(1, *block.image)
            torch.testing.assert_close(fused(input), stock(input), rtol=1e-4, atol=1e-5)
        with torch.device("meta"):
            assert block.fused()(torch.empty(1, *block.image)).shape[1:] == block.output
    outputs = {name: tuple(block.output) for name, block in blocks.items()}
    assert (outputs["lenet-1"], outputs["lenet-2"]) == ((6, 14, 14), (16, 5, 5))
    assert (outputs["alexnet-1"], outputs["alexnet-2"]) == ((64, 27, 27), (192, 13, 13))
    assert (outputs["alexnet-5"], outputs["stem"]) == ((256, 6, 6), (64, 56, 56))
    assert [outputs[f"vgg11-{i}"][1] for i in range(1, 6)] == [112, 56, 28, 14, 7]


def test_train_step_is_split(run_here):
    _, printed, report = run_here("bench_train_step", *QUICK)
    (result,) = report["results"]
    rows = {row["name"]: row for row in result["rows"]}
    steps = ["alone", "fused", "default", "foreach"]
    assert list(rows) == [f"{m} {step}" for m in ("SimpleCNN", "FusedSimpleCNN") for step in steps]
    for name, row in rows.items():
        if not name.endswith("alone"):
            parts = dict(row["parts_us"])
            alone = rows[f"{name.split()[0]} alone"]["median_us"]
            rounding = 1e-5 * (row["median_us"] + alone)  # six digits of each
            added = row["median_us"] - alone
            assert parts.pop("added") == pytest.approx(added, abs=rounding)
            assert list(parts) == ["zero_grad", "forward", "loss", "backward", "optimizer", "rest"]
            assert min(parts.values()) > 0
    assert "FusedSimpleCNN foreach" in printed


# ---- bad arguments -------------------------------------------------------------------------------

# Script, arguments, and what the answer holds.
BAD_ARGUMENTS = """
bench_block --cases block3 | argument --cases
bench_block --contenders cudnn | argument --contenders
bench_block --batch-sizes 0 | --batch-sizes: expected an integer from 1
bench_block --batch-sizes many | got 'many'
bench_block --batch-sizes 1 4 --threads 1 1 1 | --threads: expected 1 number or 2, one for each
bench_block --rounds 1 | --rounds: expected an integer from 2
bench_block --min-time nan | --min-time: expected seconds
bench_block --time-limit 0 | --time-limit: expected seconds
bench_block --precision int8 | argument --precision
bench_block --precision tf32 | --precision: tf32 needs --device cuda, got cpu
bench_block --contenders eager-graph | eager-graph cannot run on cpu: CUDA graphs need
bench_block --device tpu | --device: expected cpu, cuda or cuda:N
bench_block --device cuda:99 | CUDA devices here
bench_block --isa mmx | isa: expected one of
bench_block --isa baseline baseline | --isa: expected one here
bench_block --kernel magic | kernel: expected one of
bench_block --json missing/out.json | --json: cannot write
bench_kernels alexnet-9 | BLOCK: expected one of simplecnn-1
bench_kernels --passes sideways | argument --passes
bench_kernels --dtype int8 | --dtype
bench_kernels --layout nchw | argument --layout
bench_kernels --shape 0x3x9x9 | --shape: expected sizes over 0 as CxHxW
bench_kernels --shape 3x9x9 | --conv: needed with --shape
bench_kernels --conv 8,3 | --shape: needed with --conv
bench_kernels stem --shape 3x9x9 | --shape: expected no block names
bench_kernels --shape 2x3x9x9 --conv 8,3 --batch-sizes 3 | --batch-sizes: not allowed
bench_kernels --shape 3x9x9 --conv 8,11 | --pool: RuntimeError: weight: expected
bench_kernels --shape 3x9x9 --conv 8,3,groups=2 | --pool: ValueError: in_channels must be divisible
bench_kernels --shape 3x9x9 --conv 8,3,stride=0 | --pool: RuntimeError: stride: expected
bench_kernels --shape 3x9x9 --conv 8,3 --pool 2,padding=2 | --pool: RuntimeError: pool_padding: ex
bench_kernels --shape 3x9x9 --conv 8,kernel=3 | unexpected keyword argument 'kernel'
bench_kernels --shape 3x9x9 --conv open('x') | --conv: expected arguments such as
bench_kernels --blocks --kernel general | --kernel: not allowed with --blocks
bench_kernels --blocks --layout contiguous | --layout: not allowed with --blocks
bench_kernels --contenders eager | --contenders: not allowed without --blocks
bench_train_step --json . | --json: cannot write
"""


@pytest.mark.parametrize("line", BAD_ARGUMENTS.strip().splitlines())
def test_bad_arguments_are_refused_before_anything_is_computed(module, monkeypatch, capsys, line):
    command, expected = line.split(" | ")
    script, *arguments = command.split()
    monkeypatch.setattr(module(script), "run", None)
    with pytest.raises(SystemExit, match="2"):
        module(script).main(arguments)
    assert expected in capsys.readouterr().err


# ---- the rule, the clock, near ties --------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "exact", "stock", "right"),
    [
        # Four times the largest stock error and its floor, and no more.
        ([0.0, 1.0039], [0.0, 1.0], [[0.0005, 1.0], [0.0, 1.001]], True),
        ([0.0, 1.0041], [0.0, 1.0], [[0.0005, 1.0], [0.0, 1.001]], False),
        # Room for rounding where stock is exact: two units in the last place.
        ([1 + 2 * 2.0**-23], [1.0], [[1.0]], True),
        ([1 + 3 * 2.0**-23], [1.0], [[1.0]], False),
        ([float("nan"), 1.0], [1.0, 1.0], [[1.0, 1.0]], False),
        ([1.0], [1.0, 1.0], [[1.0, 1.0]], False),
        # A reference that stock does not reproduce.
        ([2.0, 0.0], [1.0, 1.0], [[2.0, 0.0]], False),
    ],
)
def test_rule(module, result, exact, stock, right):
    wrong = module("contenders").what_is_wrong(
        {"y": torch.tensor(result)},
        {"y": torch.tensor(exact, dtype=torch.float64), "z": torch.ones(1)},
        [{"y": torch.tensor(way)} for way in stock],
    )
    assert wrong.startswith("" if right else "y is off by ")
    assert bool(wrong) is not right


def test_quartiles_of_the_rounds_and_failures_become_rows(module):
    def fail():
        raise RuntimeError("no more\nof this")

    rows = [{"name": name} for name in "abc"]
    clock = module("timing").Clock(threads=1, seconds=1e-9, rounds=4)
    times = module("timing").time_rows(rows[:2], {"a": lambda: None, "b": fail}, clock)
    assert list(times) == ["a"]
    q1, median, q3 = statistics.quantiles([1e6 * s for s in times["a"]], method="inclusive")
    expected = {"name": "a", "status": "timed", "median_us": median, "q1_us": q1, "q3_us": q3}
    failed = {"name": "b", "status": "failed", "reason": "RuntimeError: no more"}
    assert rows == [expected, failed, {"name": "c"}]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), (2, 1), (1, 0), (1, 2)),
        nn.MaxPool2d(1),
    ],
)
def test_margins_are_distances_to_another_choice(module, pool):
    values = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    margins = module("blocks").window_margins(values, pool)
    pool.return_indices = True
    largest, winners = pool(values)
    pool.return_indices = False
    assert margins.shape == largest.shape
    for at in torch.cartesian_prod(*map(torch.arange, margins.shape)).tolist():
        without = values.clone()
        without[at[0], at[1]].view(-1)[winners[tuple(at)]] = -torch.inf
        first, second = largest[tuple(at)], pool(without)[tuple(at)]
        assert margins[tuple(at)] == (min(first, first - second) if first > 0 else -first)
