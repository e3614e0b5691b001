"""benchmarks/bench_block.py: what it reports, what it refuses. No test looks at a speed."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from bench_scripts import (
    REFUSE_TIMING,
    SPOIL_FUSED,
    answers_to,
    load,
    run_json,
    run_script,
    without,
)

SCRIPT = "bench_block"
QUICK = ["--batch-sizes", "2", "--min-time", "0.001", "--rounds", "2", "--threads", "1"]

BREAK_COMPILER = """
import torch
def compile(*args, **kwargs):
    raise RuntimeError("no compiler here\\nand a long explanation")
torch.compile = compile
"""


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run as a user starts it: the process and its JSON."""
    arguments = [*QUICK, "--contenders", "fused", "eager", "eager-cl"]
    arguments += ["--cases", "block1-forward", "block2-backward", "training"]
    return run_json(SCRIPT, tmp_path_factory.mktemp("bench"), *arguments)


def test_every_contender_is_checked_and_timed(smoke):
    _, report = smoke
    assert report["status"] == "right"
    assert [r["case"] for r in report["results"]] == [
        "block1-forward",
        "block2-backward",
        "training",
    ]
    for result in report["results"]:
        assert result["status"] == "timed"
        assert (result["batch"], result["threads"]) == (2, 1)
        assert [row["name"] for row in result["contenders"]] == ["fused", "eager", "eager-cl"]
        for row in result["contenders"]:
            assert all(r["right"] and r["error"] <= r["limit"] for r in row["agreement"].values())
            assert len(row["rounds_us"]) == 2
            assert 0 < row["min_us"] <= row["iqr_us"][0] <= row["median_us"] <= row["iqr_us"][1]
            assert row["images_per_s"] == pytest.approx(2e6 / row["median_us"])


def test_all_gradients_are_checked(smoke):
    _, report = smoke
    names = {r["case"]: set(r["contenders"][0]["agreement"]) for r in report["results"]}
    assert names["block1-forward"] == {"output"}
    assert names["block2-backward"] == {"output", "grad input", "grad 0.weight", "grad 0.bias"}
    assert "grad features.0.weight" in names["training"]
    assert "loss" in names["training"]


def test_ratio_is_best_other_to_fused(smoke):
    _, report = smoke
    for result in report["results"]:
        medians = {row["name"]: row["median_us"] for row in result["contenders"]}
        fused = medians.pop("fused")
        assert result["best_peer"] == min(medians, key=medians.get)
        assert result["speedup"]["ratio"] == pytest.approx(min(medians.values()) / fused)


def test_rows_read_as_fractions_of_the_limits(smoke):
    _, report = smoke
    (limits,) = report["limits"]
    assert limits["threads"] == 1
    peak = limits["fma_gflops"] if report["peak_name"] == "FMA" else limits["gemm_gflops"]
    result = report["results"][0]
    # 16 channels of 32x32 outputs, 27 multiply-adds each; image and pooled output, 4 bytes each.
    assert result["flops"] == 2 * (2 * 16 * 32 * 32 * 27)
    assert result["bytes"] == 2 * 4 * (3 * 32 * 32 + 16 * 16 * 16)
    for row in result["contenders"]:
        seconds = row["median_us"] * 1e-6
        assert row["peak_fraction"] == pytest.approx(result["flops"] / seconds / peak / 1e9)
        rate = result["bytes"] / seconds / 1e9
        assert row["copy_fraction"] == pytest.approx(rate / limits["copy_gbps"])


def test_machine_is_recorded(smoke):
    _, report = smoke
    machine = report["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["fusedcnn"]["kernels"]
    assert report["options"]["runs"] == [{"batch": 2, "threads": 1}]
    assert not machine["fusedcnn"]["stock_calls"]


def test_no_path_of_the_machine_is_recorded(smoke):
    def texts(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [text for one in value for text in texts(one)]
        return [value] if isinstance(value, str) else []

    _, report = smoke
    assert report["machine"]["system"] in texts(report)
    assert not [text for text in texts(report) if os.sep in text and os.path.exists(text)]
    assert sys.prefix not in json.dumps(report)


def test_saved_bytes_are_counted(smoke):
    _, report = smoke
    rows = {row["what"]: row for row in report["saved_bytes"]}
    image, full, pooled = 3 * 32 * 32, 16 * 32 * 32, 16 * 16 * 16  # elements per image
    # Stock: input, ReLU's output, int64 indices. Fused: input, one byte per pooled output.
    assert rows["block 1"]["stock"]["saved"] == 2 * (4 * image + 4 * full + 8 * pooled)
    assert rows["block 1"]["fused"]["saved"] == 2 * (4 * image + pooled)
    assert rows["block 1"]["stock"]["output"] == rows["block 1"]["fused"]["output"]
    assert rows["block 1"]["fused"]["output"] == 2 * 4 * pooled
    assert rows["both blocks"]["ratio"] >= 5


def test_table_is_for_people(smoke):
    process, _ = smoke
    assert "block2-backward" in process.stdout
    assert "times as fast as the best other contender" in process.stdout
    assert "stock / fused" in process.stdout


def test_needs_nothing_but_torch(tmp_path):
    optional = without("rich", "tqdm", "matplotlib", "onnxruntime", "onnx", "onnxscript")
    arguments = ["--cases", "block1-forward", "--contenders", "fused", "eager", "onnxruntime"]
    process = run_script(SCRIPT, tmp_path, *QUICK, *arguments, prepare=optional)
    assert process.returncode == 0, process.stderr
    assert "onnxruntime: unavailable: " in process.stdout
    assert "block1-forward, batch 2: timing" in process.stderr


def test_each_batch_size_has_its_threads(tmp_path):
    arguments = ["--batch-sizes", "1", "2", "--threads", "1", "2", "--cases", "block1-forward"]
    arguments += ["--min-time", "0.001", "--rounds", "2", "--contenders", "fused", "eager"]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    _, report = run_json(SCRIPT, tmp_path, *arguments)
    runs = [{"batch": 1, "threads": 1}, {"batch": 2, "threads": 2}]
    assert report["options"]["runs"] == runs
    assert [{name: r[name] for name in ("batch", "threads")} for r in report["results"]] == runs
    assert [limits["threads"] for limits in report["limits"]] == [1, 2]
    for result, limits in zip(report["results"], report["limits"], strict=True):
        row = result["contenders"][0]
        rate = result["flops"] / row["median_us"] / 1e3
        assert row["peak_fraction"] == pytest.approx(rate / limits["fma_gflops"])


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    process = run_script(
        SCRIPT, tmp_path, *QUICK, "--cases", "block1-forward", "--contenders", "fused",
        "--plot", "out.png",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# ---- what goes wrong -----------------------------------------------------------------------------


def test_wrong_results_are_refused_before_timing(tmp_path):
    cases = ["block1-forward", "block2-backward", "inference", "training"]
    process = run_script(
        SCRIPT, tmp_path, *QUICK, "--cases", *cases, "--contenders", "fused", "eager",
        "--json", "out.json",
        prepare=SPOIL_FUSED + REFUSE_TIMING,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["status"] == "wrong"
    assert [result["case"] for result in report["results"]] == cases
    for result in report["results"]:
        assert f"{result['case']}, batch 2, 1 thread(s): WRONG, not timed" in process.stdout
        assert result["status"] == "wrong"
        assert result["speedup"] is None
        statuses = {row["name"]: row["status"] for row in result["contenders"]}
        assert statuses == {"fused": "wrong", "eager": "right"}
        assert not any("median_us" in row for row in result["contenders"])


def test_broken_compiler_is_no_reason_to_stop(tmp_path):
    process = run_script(
        SCRIPT, tmp_path, *QUICK, "--cases", "block1-forward", "--contenders", "fused", "compile",
        prepare=BREAK_COMPILER,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "compile: unavailable: no compiler here\n" in process.stdout


BAD_ARGUMENTS = {
    "unknown case": (["--cases", "block3"], "--cases"),
    "unknown contender": (["--contenders", "cudnn"], "--contenders"),
    "batch 0": (["--batch-sizes", "0"], "--batch-sizes: expected an integer from 1"),
    "batch of text": (["--batch-sizes", "many"], "got 'many'"),
    "threads of some": (
        ["--batch-sizes", "1", "4", "64", "--threads", "1", "1"],
        "--threads: expected 1 number or 3, one for each of --batch-sizes, got 2",
    ),
    "threads 0": (["--threads", "0"], "--threads: expected an integer from 1"),
    "one round": (["--rounds", "1"], "--rounds: expected an integer from 2"),
    "no time": (["--min-time", "0"], "--min-time: expected seconds"),
    "NaN seconds": (["--min-time", "nan"], "--min-time: expected seconds"),
    "precision": (["--precision", "int8"], "--precision"),
    "tf32 on the CPU": (
        ["--precision", "tf32"],
        "--precision: tf32 needs --device cuda, got cpu",
    ),
    "graphs on the CPU": (
        ["--contenders", "fused", "eager-graph"],
        "--contenders: eager-graph cannot run on cpu: CUDA graphs need --device cuda",
    ),
    "no time limit": (["--time-limit", "0"], "--time-limit: expected seconds"),
    "device": (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N"),
    "cuda": (["--device", "cuda:99"], "CUDA devices here"),
    "isa": (["--isa", "mmx"], "isa: expected one of"),
    "kernel": (["--kernel", "magic"], "kernel: expected one of"),
    "JSON folder": (["--json", os.curdir], "--json: cannot write"),
    "JSON path": (["--json", "missing/out.json"], "--json: cannot write"),
    "picture": (["--plot", "out.txt"], "--plot: expected a name ending in .png"),
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


def test_plot_without_matplotlib_names_the_extra(tmp_path):
    process = run_script(
        SCRIPT, tmp_path, *QUICK, "--plot", "out.png", prepare=without("matplotlib")
    )
    assert process.returncode == 2
    assert "pip install 'fusedcnn[plot]'" in process.stderr
    assert not (tmp_path / "out.png").exists()


# ---- the rule ------------------------------------------------------------------------------------


def test_rule_allows_its_multiple_of_the_stock_error_and_no_more():
    agreement = load("agreement")
    compare, ratio = agreement.compare, agreement.ALLOWED_ERROR_RATIO
    exact = {"y": torch.tensor([0.0, 1.0], dtype=torch.float64)}
    stock = {"y": torch.tensor([0.0, 1.001])}
    other = {"y": torch.tensor([0.0005, 1.0])}
    for error, right in ((0.95e-3 * ratio, True), (1.05e-3 * ratio, False)):
        report = compare({"y": torch.tensor([0.0, 1.0 + error])}, exact, [other, stock])
        assert report["y"]["right"] is right


def test_rule_leaves_room_for_rounding_where_stock_is_exact():
    agreement = load("agreement")
    compare, ratio = agreement.compare, agreement.ALLOWED_ERROR_RATIO
    exact = {"y": torch.ones(1, dtype=torch.float64)}
    eps = torch.finfo(torch.float32).eps
    for error, right in ((ratio * eps / 2, True), (ratio * eps, False)):
        report = compare({"y": torch.ones(1) + error}, exact, [{"y": torch.ones(1)}])
        assert report["y"]["right"] is right


@pytest.mark.parametrize(
    "result", [torch.tensor([float("nan"), 1.0]), torch.ones(1), torch.ones(2, 1)]
)
def test_rule_refuses_nan_and_wrong_shapes(result):
    agreement = load("agreement")
    exact = {"y": torch.ones(2, dtype=torch.float64)}
    report = agreement.compare({"y": result}, exact, [{"y": torch.ones(2)}])
    assert not report["y"]["right"]
    assert agreement.describe(report).startswith("y is off by inf")


def test_rule_refuses_a_reference_that_stock_does_not_reproduce():
    compare = load("agreement").compare
    exact = {"y": torch.ones(4, dtype=torch.float64)}
    stock = {"y": torch.tensor([2.0, 2.0, 0.0, 0.0])}
    assert not compare(stock, exact, [stock])["y"]["right"]


def test_every_contender_has_a_turn_in_every_round():
    turns = []
    progress = []
    times = load("timing").time_by_turns(
        {name: (lambda name=name: turns.append(name)) for name in "abc"},
        dict.fromkeys("abc", 0.0),
        threads=1,
        rounds=4,
        min_time=1e-9,
        progress=lambda: progress.append(1),
    )
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(progress) == 12
    # A turn is one call after two to warm up; the first turns of all only estimate.
    rounds = [set(turns[-36:][i : i + 9]) for i in range(0, 36, 9)]
    assert rounds == [set("abc")] * 4
