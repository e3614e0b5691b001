"""What benchmarks/bench_block.py does on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import contextlib
import importlib
import json

import fusedcnn
import pytest
import torch
from bench_scripts import BENCHMARKS, answers_to, run_json, run_script
from fusedcnn import _C

QUICK = ["--batch-sizes", "2", "--min-time", "0.001", "--rounds", "2", "--threads", "1"]


@pytest.fixture
def module(monkeypatch):
    """Imports one of the benchmarks' modules by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


# ---- precision -----------------------------------------------------------------------------------


def test_rounding_to_tf32(module):
    """Against the definition: 11 significand bits, ties to even."""
    round_to_tf32 = module("precision").round_to_tf32
    values = torch.cat([torch.randn(10_000) * 10.0**e for e in (-30, -3, 0, 3, 30)])
    ties = 1 + torch.arange(-64, 64) * 2.0**-11  # every other one lies between two numbers
    for x in (values, ties, -ties):
        significand, exponent = torch.frexp(x.double())
        expected = torch.ldexp(torch.round(significand * 2**11) / 2**11, exponent)
        assert torch.equal(round_to_tf32(x).double(), expected)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    assert torch.equal(round_to_tf32(special).nan_to_num(7.0), special.nan_to_num(7.0))


def test_reference_allows_tf32_where_it_is_allowed(module):
    """Operands rounded to tf32 pass as tf32 and not as float32, in every gradient."""
    cases, agreement, precision = map(module, ("cases", "agreement", "precision"))
    (case,) = [c for c in cases.CASES if c.name == "block2-backward"]
    for name, right in (("float32", False), ("tf32", True)):
        problem = cases.Problem(case, 8, precision.PRECISIONS[name], torch.device("cpu"))
        exact, stock = problem.references()
        rounded = precision.with_tf32_operands(problem.module(fused=False))
        batch = problem.batches(channels_last=False)[0]
        results = cases.run_checked(case, rounded, rounded, batch)
        report = agreement.compare(results, exact, stock)
        assert report["output"]["right"] is right
        assert all(row["right"] for row in report.values()) is right
        # The rule that lets tf32 pass does not let everything pass.
        results["output"] = results["output"] * 1.02
        assert not agreement.compare(results, exact, stock)["output"]["right"]


def test_precision_sets_both_switches(module):
    precision = module("precision")
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for name, rounds in (("tf32", True), ("float32", False), ("bfloat16", False)):
            precision.set_precision(precision.PRECISIONS[name])
            assert torch.backends.cuda.matmul.allow_tf32 is rounds
            assert torch.backends.cudnn.allow_tf32 is rounds
            # What fusedcnn and Inductor read.
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is rounds
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is rounds
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


# ---- graphs --------------------------------------------------------------------------------------


class Graphs:
    """In torch.cuda's place: a graph's work is done when it is recorded; replays are noted."""

    def __init__(self) -> None:
        self.recorded: list[Graphs.Graph] = []
        self.replayed: list[int] = []

    class Graph:
        def __init__(self, graphs: Graphs) -> None:
            self.graphs = graphs

        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            self.graphs.replayed.append(self.graphs.recorded.index(self))

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert pool == ("pool" if self.recorded else None)
        self.recorded.append(graph)
        yield


@pytest.fixture
def graphs(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    graphs = Graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graphs.Graph(graphs))
    monkeypatch.setattr(torch.cuda, "graph", graphs.graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return graphs


@pytest.mark.parametrize("name", ["block1-forward", "block2-backward", "inference", "training"])
def test_graphed_contenders_replay_a_graph_for_each_batch(module, graphs, name):
    cases, contenders, precision = map(module, ("cases", "contenders", "precision"))
    (case,) = [c for c in cases.CASES if c.name == name]
    problem = cases.Problem(case, 2, precision.PRECISIONS["float32"], torch.device("cpu"))
    by_name = {c.name: c for c in contenders.CONTENDERS}
    plain = contenders.prepare(by_name["fused"], problem, 1)
    graphed = contenders.prepare(by_name["fused-graph"], problem, 1)
    assert graphed.results.keys() == plain.results.keys()
    for key, result in graphed.results.items():
        assert torch.equal(result, plain.results[key])
    if case.kind == "training":
        return  # GraphedTrainStep's business: tests/test_graphs.py
    batches = problem.batches(channels_last=False)
    assert len(graphs.recorded) == len(batches) > 2
    graphs.replayed.clear()
    for _ in range(len(batches) + 1):
        graphed.step()
    assert graphs.replayed == [*range(len(batches)), 0]


def test_every_contender_has_a_graphed_twin(module):
    contenders = module("contenders")
    on = {kind: contenders.contenders_on(kind) for kind in ("cpu", "cuda")}
    assert on["cpu"] == ["fused", "eager", "eager-cl", "compile", "compile-cl", "onnxruntime"]
    plain = on["cpu"][:-1]
    assert on["cuda"] == [*plain, *(f"{name}-graph" for name in plain)]


# ---- what is compared ----------------------------------------------------------------------------


def test_the_faster_way_is_compared_with_all_and_each_way_with_its_like(module):
    bench, contenders = module("bench_block"), module("contenders")
    medians = {"fused": 4.0, "eager": 6.0, "fused-graph": 1.0, "eager-graph": 2.0, "compile": 5.0}
    chosen = [c for c in contenders.CONTENDERS if c.name in medians]
    result = bench._compare({name: [m, m] for name, m in medians.items()}, chosen)
    assert (result["own"], result["best_peer"]) == ("fused-graph", "eager-graph")
    assert result["speedup"]["ratio"] == 2
    like = {
        one["own"]: (one["best_peer"], one["speedup"]["ratio"]) for one in result["like_with_like"]
    }
    assert like == {"fused": ("compile", 1.25), "fused-graph": ("eager-graph", 2)}
    assert bench._compare({"fused": [1.0, 1.0]}, chosen[:1])["speedup"] is None
    assert bench._compare({"eager": [1.0, 1.0]}, chosen)["speedup"] is None


def test_cases_beyond_the_time_limit_are_listed(tmp_path):
    process = run_script(
        "bench_block", tmp_path, *QUICK, "--contenders", "fused", "eager", "--time-limit", "1e-9",
        "--json", "out.json", "--cases", "block1-forward", "training",
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["status"] == "incomplete"
    assert report["results"] == []
    assert [one["case"] for one in report["not_run"]] == ["block1-forward", "training"]
    assert "training, batch 2: NOT RUN: --time-limit was over" in process.stdout


# ---- profile_kernels.py --------------------------------------------------------------------------


def test_profile_rates_are_of_the_limits(module):
    limits = {"gemm_gflops": 1e5, "copy_gbps": 4e3}
    # 1 GFLOP at 100 TFLOP/s takes 10 us, 80 MB at 4 TB/s 20 us.
    rates = module("profile_kernels").rates(40.0, 10**9, 8 * 10**7, limits)
    assert rates["gflops"] == pytest.approx(25_000)
    assert rates["gbps"] == pytest.approx(2_000)
    assert rates["gemm_fraction"] == pytest.approx(0.25)
    assert rates["copy_fraction"] == pytest.approx(0.5)
    assert rates["floor_us"] == pytest.approx(20)
    assert rates["times_floor"] == pytest.approx(2)


@pytest.fixture
def profiler(module, monkeypatch):
    """profile_kernels.py with the CPU's kernels in the place of the GPU's."""
    script = module("profile_kernels")
    isa = next(i["name"] for i in fusedcnn.build_info()["isas"] if i["selected"])
    kernels = [k for k in fusedcnn.build_info()["kernels"] if k["isa"] == isa]

    class Library:
        @staticmethod
        def fusedcnn_cuda_force(name):
            _C.force("", name.decode())

    monkeypatch.setattr(script._cuda, "_library", Library)
    monkeypatch.setattr(script._cuda, "info", lambda: {"kernels": kernels})
    monkeypatch.setattr(script._cuda, "follow_tf32", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield script
    _C.force("", "")


def test_profile_checks_and_times_every_kernel(profiler, capsys):
    options = profiler.Options(
        device=torch.device("cpu"), blocks=["simplecnn-1"], batch_sizes=[3],
        precisions=["float32"], layouts=["channels_last"], min_time=1e-3, rounds=2,
        time_limit=None, launches=False, json=None,
    )  # fmt: skip
    report = profiler.run(options)
    assert report["status"] == "right"
    kernels = profiler._cuda.info()["kernels"]
    for name, of_pass in (("forward+code", "forward"), ("grad_weight", "grad_weight")):
        rows = {row["kernel"]: row for row in report["rows"] if row["pass"] == name}
        assert list(rows) == ["(chosen)", *(k["name"] for k in kernels if k["pass"] == of_pass)]
        for row in rows.values():
            assert row["status"] in ("timed", "not covered")
            if row["status"] == "timed":
                limits = report["limits"]["float32"]
                rate = 2 * 3 * 16 * 32 * 32 * 27 / row["median_us"] / 1e3
                assert row["gemm_fraction"] == pytest.approx(rate / limits["gemm_gflops"])
        assert rows["general"]["status"] == rows["(chosen)"]["status"] == "timed"
    forward = next(row for row in report["rows"] if row["pass"] == "forward")
    # Images, weight, bias and pooled outputs, four bytes each.
    assert forward["bytes"] == 4 * (3 * 3 * 32 * 32 + 16 * 27 + 16 + 3 * 16 * 16 * 16)
    profiler.print_report(report)
    assert "of GEMM" in capsys.readouterr().out


def test_profile_stops_at_its_time_limit(profiler):
    options = profiler.Options(
        device=torch.device("cpu"), blocks=["simplecnn-1"], batch_sizes=[3],
        precisions=["float32"], layouts=["contiguous"], min_time=1e-3, rounds=2,
        time_limit=1e-9, launches=False, json=None,
    )  # fmt: skip
    report = profiler.run(options)
    assert report["status"] == "incomplete"
    assert [one["block"] for one in report["not_run"]] == ["simplecnn-1"]


PROFILE_BAD_ARGUMENTS = {
    "the CPU": (["--device", "cpu"], "--device: expected cuda or cuda:N, got 'cpu'"),
    "no device": (["--device", "gpu"], "--device: expected cuda or cuda:N, got 'gpu'"),
    "no such GPU": (["--device", "cuda:99"], "CUDA devices here"),
    "block": (["--blocks", "block3"], "--blocks"),
    "precision": (["--precisions", "int8"], "--precisions"),
    "batch": (["--batch-sizes", "0"], "--batch-sizes: expected an integer from 1"),
}


def test_profile_refuses_bad_arguments(tmp_path):
    arguments = {name: arguments for name, (arguments, _) in PROFILE_BAD_ARGUMENTS.items()}
    answers = answers_to("profile_kernels", tmp_path, arguments)
    for name, (_, text) in PROFILE_BAD_ARGUMENTS.items():
        status, errors = answers[name]
        assert status == 2, name
        assert text in errors


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(tmp_path, precision):
    """Every case, as is and as graphs; compiled ones are left to real runs, they take minutes."""
    names = ["fused", "eager", "eager-cl"]
    names += [f"{name}-graph" for name in names]
    arguments = ["--device", "cuda", "--precision", precision, "--contenders", *names, *QUICK]
    _, report = run_json("bench_block", tmp_path, *arguments)
    assert report["status"] == "right"
    assert report["machine"]["gpu"] == torch.cuda.get_device_name()
    assert report["machine"]["cuda"]["runtime"] == torch.version.cuda
    assert report["options"]["settings"]["cudnn.allow_tf32"] is False
    for result in report["results"]:
        assert [row["status"] for row in result["contenders"]] == ["timed"] * 6
        assert {one["own"] for one in result["like_with_like"]} == {"fused", "fused-graph"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_profile_on_a_gpu(tmp_path):
    arguments = ["--batch-sizes", "64", "--min-time", "0.001", "--rounds", "2"]
    _, report = run_json("profile_kernels", tmp_path, *arguments)
    assert report["status"] == "right"
    assert set(report["limits"]) == {"float32", "tf32", "bfloat16"}
    for row in report["rows"]:
        if row["status"] == "timed":
            # The kernels' names are what the profiler must have seen.
            assert any(row["pass"].split("+")[0] in one["name"] for one in row["launches"])
            assert row["times_floor"] > 0
