r"""The table in docs/benchmarks.md, from the committed JSON of one run of bench_block.py.

    python benchmarks/bench_block.py --batch-sizes 1 4 64 256 \
        --json benchmarks/results/bench_block.json
    python benchmarks/readme_table.py             # writes the table into docs/benchmarks.md
    python benchmarks/readme_table.py --check     # exit status 1 where the page says otherwise

The text between the page's two marker comments is replaced, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bench_block.json"
README = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- benchmarks/readme_table.py writes this table: do not edit -->"
END = "<!-- end of the table -->"
WIDTH = 120

ROWS = {
    "block1-forward": "block 3->16 at 32x32, forward",
    "block1-backward": "block 3->16, forward + backward (weight, bias)",
    "block2-forward": "block 16->32 at 16x16, forward",
    "block2-backward": "block 16->32, forward + backward (all gradients)",
    "inference": "SimpleCNN, inference",
    "training": "SimpleCNN, training step (Adam, fused=True for all)",
}
PEERS = {
    "eager": "eager",
    "eager-cl": "eager channels_last",
    "compile": "compiled",
    "compile-cl": "compiled channels_last",
    "onnxruntime": "ONNX Runtime",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Write the README's table of results.")
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether it fits")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text()
        wanted = place(text, render(json.loads(options.json.read_text())))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.check:
        if wanted != text:
            print(f"{options.readme}: not what {options.json} says: run {Path(__file__).name}")
        return int(wanted != text)
    options.readme.write_text(wanted)
    return 0


def place(text: str, table: str) -> str:
    """Return the README's text with the table between its markers.

    Raises:
        ValueError: there is not exactly one of each marker, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected one line {BEGIN!r} and after it one line {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def render(report: dict[str, Any]) -> str:
    """Return a report of bench_block.py as Markdown.

    Raises:
        ValueError: the report is of results that were wrong, that lack a case or that nobody could
            repeat.
    """
    commit = report["machine"]["commit"]
    if report["status"] != "right":
        raise ValueError(f"report: expected status 'right', got {report['status']!r}")
    if not commit or commit.endswith("-dirty"):
        raise ValueError(f"report: expected figures of a commit, got {commit!r}")
    if report["options"]["isa"] or report["options"]["kernel"]:
        raise ValueError("report: expected no forced ISA or kernel")
    missing = ROWS.keys() - {result["case"] for result in report["results"]}
    if missing:
        raise ValueError(f"report: expected all cases, these are missing: {sorted(missing)}")
    return "\n\n".join([_preface(report), _table(report["results"]), _limits(report)])


def _preface(report: dict[str, Any]) -> str:
    machine, options = report["machine"], report["options"]
    isa = next(isa["name"] for isa in machine["fusedcnn"]["isas"] if isa["selected"])
    date = datetime.fromisoformat(machine["date"]).date()
    onnx = f"ONNX Runtime {machine['onnxruntime']}" if machine["onnxruntime"] else "ONNX Runtime"
    peers = {
        "eager": "stock eager",
        "eager-cl": "stock eager channels_last",
        "compile": "`torch.compile`",
        "compile-cl": "`torch.compile` channels_last",
        "onnxruntime": f"{onnx} (inference only)",
    }
    timed = {
        row["name"]
        for result in report["results"]
        for row in result["contenders"]
        if row["status"] == "timed"
    }
    names = [text for name, text in peers.items() if name in timed]
    batch_sizes = " ".join(str(one["batch"]) for one in options["runs"])
    return _filled(
        f"`python benchmarks/bench_block.py --batch-sizes {batch_sizes}` at commit "
        f"{machine['commit']} on {date}: {machine['cpu']}, {machine['cores']} cores, {isa} "
        f"kernels, {machine['system']}, torch {machine['torch']}, {options['dtype']}. Medians of "
        f"whole calls from Python in microseconds, contenders by turns in one run. The best other "
        f"is the fastest of {', '.join(names)}. The backward rows are forward and backward "
        "together. Of peak: FLOPs of the direct convolutions and full gradients, as a fraction "
        "of the multiply-add peak that the same run measured; over 100 % where work is skipped."
    )


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| | batch | threads | fused | best other | | times as fast | of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, title in ROWS.items():
        for i, result in enumerate(r for r in results if r["case"] == case):
            cells = [title if i == 0 else "", *_cells(result)]
            lines.append(("| " + " | ".join(cells) + " |").replace("|  |", "| |"))
    return "\n".join(lines)


def _cells(result: dict[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in result["contenders"]}
    best = result["best_peer"]
    if best is None:
        raise ValueError(f"report: expected another contender than fused in {result['case']}")
    return [
        str(result["batch"]),
        str(result["threads"]),
        _micros(rows["fused"]["median_us"]),
        _micros(rows[best]["median_us"]),
        PEERS[best],
        _ratio(result["speedup"]["ratio"]),
        f"{100 * rows['fused']['peak_fraction']:.0f} %",
    ]


def _micros(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float) -> str:
    """Two significant digits, and no 1.0 for what is slower."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _limits(report: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{limits['fma_gflops']:.0f} GFLOP/s of float32 multiply-adds and "
        f"{limits['copy_gbps']:.0f} GB/s copied on {limits['threads']} "
        f"{'thread' if limits['threads'] == 1 else 'threads'}"
        for limits in report["limits"]
    )
    spreads = [
        100 * (row["iqr_us"][1] - row["iqr_us"][0]) / row["median_us"]
        for result in report["results"]
        for row in result["contenders"]
        if row["status"] == "timed"
    ]
    row = next(row for row in report["saved_bytes"] if row["what"] == "both blocks")
    stock, fused = (1e-6 * row[name]["saved"] for name in ("stock", "fused"))
    return _filled(
        f"The machine's limits in the same run: {rates}. Between the quartiles of the "
        f"rounds lay {statistics.median(spreads):.0f} % of the median in the typical row, "
        f"{max(spreads):.0f} % in the worst. Saved for the backward by the two blocks, "
        f"input included: {fused:.1f} MB against the stock layers' {stock:.1f} MB at batch "
        f"{row['batch']} ({row['ratio']:.1f} times less)."
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
