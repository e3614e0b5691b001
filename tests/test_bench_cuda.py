"""What the benchmarks do on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import argparse
import contextlib

import fusedcnn
import pytest
import torch
from bench_scripts import QUICK, run_json
from fusedcnn._ops import _C, force

CPU = torch.device("cpu")


# ---- precision -----------------------------------------------------------------------------------


def test_rounding_to_tf32(module):
    """Against the definition: 11 significand bits, ties to even."""
    round_to_tf32 = module("timing").round_to_tf32
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
    blocks, timing = module("blocks"), module("timing")
    what_is_wrong, case = module("contenders").what_is_wrong, blocks.CASES["block2-backward"]
    for name in ("float32", "tf32"):
        problem = blocks.Problem(case, 8, timing.PRECISIONS[name], CPU)
        rounded = timing.with_tf32_operands(problem.module())
        call = blocks.make_call(case, rounded)
        results = problem.results(call, rounded, problem.batches()[0])
        for key, result in results.items():
            wrong = what_is_wrong({key: result}, *problem.references)
            assert bool(wrong) is (name == "float32"), (name, key, wrong)
        # The rule that lets tf32 pass does not let everything pass.
        assert what_is_wrong({"output": results["output"] * 1.02}, *problem.references)


def test_precision_sets_all_switches(module):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    for name, rounds in (("tf32", True), ("float32", False), ("bfloat16", False)):
        module("timing").PRECISIONS[name].use(CPU)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (rounds, rounds)
        # What fusedcnn and Inductor read.
        assert (cudnn.conv.fp32_precision == "tf32") is rounds
        assert (matmul.fp32_precision == "tf32") is rounds


# ---- graphs --------------------------------------------------------------------------------------


class Graphs:
    """In torch.cuda's place: a graph's work is done when it is recorded; replays are noted."""

    def __init__(self, monkeypatch) -> None:
        self.recorded, self.replayed = [], []
        for name in ("CUDAGraph", "graph", "Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def CUDAGraph(self):  # noqa: N802
        graph = Graphs.__new__(Graphs)
        graph.pool, graph.replay = lambda: "pool", lambda: self.replayed.append(graph)
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert pool == ("pool" if self.recorded else None)
        self.recorded.append(graph)
        yield

    def Stream(self):  # noqa: N802
        stream = Graphs.__new__(Graphs)
        stream.wait_stream = lambda other: None
        return stream

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()


@pytest.mark.parametrize("name", ["block1-forward", "block2-backward", "inference", "training"])
def test_graphed_contenders_replay_a_graph_for_each_batch(module, monkeypatch, name):
    graphs = Graphs(monkeypatch)
    blocks, contenders = module("blocks"), module("contenders")
    problem = blocks.Problem(blocks.CASES[name], 2, module("timing").PRECISIONS["float32"], CPU)
    _, plain = contenders.prepare(contenders.CONTENDERS["fused"], problem, 1)
    step, graphed = contenders.prepare(contenders.CONTENDERS["fused-graph"], problem, 1)
    assert graphed.keys() == plain.keys()
    for key, result in graphed.items():
        assert torch.equal(result, plain[key])
    if name == "training":
        return  # GraphedTrainStep's business: tests/test_graphs.py
    assert len(graphs.recorded) == len(problem.batches()) > 2
    graphs.replayed.clear()
    for _ in range(len(graphs.recorded) + 1):
        step()
    assert graphs.replayed == [*graphs.recorded, graphs.recorded[0]]


def test_ways_are_compared_with_all_and_with_their_like(module):
    contenders = module("contenders")
    plain = ["fused", "eager", "eager-cl", "compile", "compile-cl"]
    assert contenders.contenders_on("cpu") == [*plain, "onnxruntime"]
    assert contenders.contenders_on("cuda") == [*plain, *(f"{name}-graph" for name in plain)]
    medians = {"fused": 4.0, "eager": 6.0, "fused-graph": 1.0, "eager-graph": 2.0, "compile": 5.0}
    found = contenders.speedups({name: [m, m] for name, m in medians.items()})
    assert [(one["own"], one["best_peer"], one["ratio"]) for one in found] == [
        ("fused-graph", "eager-graph", 2),
        ("fused", "compile", 1.25),
        ("fused-graph", "eager-graph", 2),
    ]
    assert contenders.speedups({"fused": [1.0]}) == contenders.speedups({"eager": [1.0]}) == []


# ---- kernels -------------------------------------------------------------------------------------


def test_every_cuda_kernel_is_checked_and_timed(module, monkeypatch, capsys):
    """With the CPU's kernels in the place of the GPU's."""
    script, options = module("bench_kernels"), module("options")
    isas = [i for i in fusedcnn.build_info()["isas"] if i["selected"]]
    isa = isas[0]["base"] or isas[0]["name"]
    kernels = [k for k in fusedcnn.build_info()["kernels"] if k["isa"] == isa]

    monkeypatch.setattr(script, "force_kernel", lambda _, kernel="", isa=None: force("", kernel))
    monkeypatch.setattr(script._cuda, "info", lambda: {"kernels": kernels})
    block, timing = module("blocks").SIMPLECNN_1, module("timing")
    asked = argparse.Namespace(
        device=CPU, precisions=[timing.PRECISIONS["float32"]], blocks=[(options.Run(3, 1), block)],
        layout=["channels_last"], passes=list(script.PASSES), whole=False, isa=[], kernel=[],
        min_time=1e-3, rounds=2, time_limit=None, launches=False, json=None,
    )  # fmt: skip
    report = script.run(asked)
    assert _C.forced() == ("", "")
    for result in report.values["results"]:
        of_pass = result["pass"].removesuffix("+code")
        rows = {row["name"]: row["status"] for row in result["rows"]}
        assert list(rows) == ["(chosen)", *(k["name"] for k in kernels if k["pass"] == of_pass)]
        assert result["selected"] == "(chosen)"
        assert rows["general"] == rows["(chosen)"] == "timed"
        assert set(rows.values()) <= {"timed", "not covered"}
    assert report.finish() == 0
    assert "general" in capsys.readouterr().out


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
    assert report["machine"]["cuda"] == torch.version.cuda
    for result in report["results"]:
        assert [row["status"] for row in result["rows"]] == ["timed"] * 6
        assert {one["own"] for one in result["speedups"]} == {"fused", "fused-graph"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(tmp_path):
    precisions = ["float32", "tf32", "bfloat16"]
    arguments = ["--device", "cuda", "--precision", *precisions, "--min-time", "0.001"]
    _, report = run_json(
        "bench_kernels", tmp_path, *arguments, "--batch-sizes", "64", "--rounds", "2"
    )
    assert report["status"] == "right"
    assert [limits["precision"] for limits in report["limits"]] == precisions
    for result in report["results"]:
        assert result["copy_us"] > 0
        for row in result["rows"]:
            if row["status"] == "timed":
                # The kernels' names are what the profiler must have seen.
                stem = result["pass"].split("+")[0]
                stems = [] if row["name"] == "library" and stem != "forward" else [stem]
                if row["name"] in ("library", "(chosen)"):
                    stems.append("gather_")  # backward_library's
                assert any(stem in name for name in row["launches_us"] for stem in stems)
