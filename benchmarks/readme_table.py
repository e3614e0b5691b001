r"""The published table and chart of results, from the committed JSON of one run of bench_block.py.

    python benchmarks/bench_block.py --batch-sizes 1 4 64 256 \
        --json benchmarks/results/bench_block.json
    python benchmarks/readme_table.py             # writes the tables and the chart
    python benchmarks/readme_table.py --check     # exit status 1 where they say something else

A page holds the whole table between two marker comments that say "table", one row for each kind of
work between two that say "summary", or both; nothing else in it is touched.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from blocks import CASES
from contenders import CONTENDERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/bench_block.json"
PAGES = [ROOT / "README.md", ROOT / "docs/benchmarks.md"]
CHART = ROOT / "docs/_static/speed.svg"
BEGIN = "<!-- benchmarks/readme_table.py writes this {}: do not edit -->"
END = "<!-- end of the {} -->"
WIDTH = 120
SUMMARY_BATCH = 64

TITLES = {name: case.title for name, case in CASES.items()}
PEERS = {name: one.title for name, one in CONTENDERS.items() if not one.fused}
# The chart. Greys have a contrast of 4.3 with white and with the near black of dark pages alike.
STYLE = """\
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #797979 }
.label { text-anchor: end }
.small { font-size: 11px }
.eager { fill: #a5a5a5 } .other { fill: #5b8fd0 } .fused { fill: #e2711d }"""
BARS = {"eager": "eager", "other": "best other", "fused": "fused"}
WIDE, BARS_AT, LONGEST = 760, 250, 450  # of all, of the labels before the bars, of the bars
ROW, BAR, TOP = 66, 16, 64  # heights


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables and the chart of results.")
    parser.add_argument("--check", action="store_true", help="write nothing, tell whether it fits")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--chart", type=Path, default=CHART, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    try:
        report = json.loads(options.json.read_text())
        refuse_untrustworthy(report)
        wanted = {page: place(page.read_text(), report) for page in options.pages}
        wanted[options.chart] = draw(report)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    status = 0
    for path, text in wanted.items():
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path}: not what {options.json} says: run {Path(__file__).name}")
            status = 1
    return status


def refuse_untrustworthy(report: dict[str, Any]) -> None:
    """Raise ValueError for results that were wrong, lack a case or that nobody could repeat."""
    commit, cases = report["machine"]["commit"], {r["case"] for r in report["results"]}
    if report["status"] != "right":
        raise ValueError(f"report: expected status 'right', got {report['status']!r}")
    if not commit or commit.endswith("-dirty"):
        raise ValueError(f"report: expected figures of a commit, got {commit!r}")
    if report["options"].get("isa") or report["options"].get("kernel"):
        raise ValueError("report: expected no forced ISA or kernel")
    if missing := TITLES.keys() - cases:
        raise ValueError(f"report: expected all cases, these are missing: {sorted(missing)}")
    if not all(result["speedups"] for result in report["results"]):
        raise ValueError("report: expected another contender than fused in every case")


# ---- tables --------------------------------------------------------------------------------------


def place(text: str, report: dict[str, Any]) -> str:
    """Return a page's text with the tables between its markers.

    Raises:
        ValueError: a marker has no partner, or there is none.
    """
    before = text
    for kind, render in (("table", render_table), ("summary", render_summary)):
        begin, end = BEGIN.format(kind), END.format(kind)
        head, _, rest = text.partition(begin)
        if (text.count(begin), text.count(end), rest.count(end)) == (1, 1, 1):
            text = f"{head}{begin}\n\n{render(report)}\n\n{end}{rest.partition(end)[2]}"
            before = ""
        elif begin in text or end in text:
            raise ValueError(f"page: expected one line {begin!r} and after it one line {end!r}")
    if before:
        raise ValueError(f"page: expected the line {BEGIN.format('table')!r}, or 'summary'")
    return text


def render_table(report: dict[str, Any]) -> str:
    """Every case at every batch size, with what must be known about the figures."""
    return "\n\n".join([_preface(report), _table(report["results"]), _limits(report)])


def render_summary(report: dict[str, Any]) -> str:
    """One row for each case, at SUMMARY_BATCH images."""
    return _table(summary(report))


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The results at SUMMARY_BATCH images, in the order of TITLES."""
    results = {r["case"]: r for r in report["results"] if r["batch"] == SUMMARY_BATCH}
    if missing := TITLES.keys() - results.keys():
        raise ValueError(f"report: expected batch {SUMMARY_BATCH} of {sorted(missing)}")
    return [results[case] for case in TITLES]


def _preface(report: dict[str, Any]) -> str:
    machine, options = report["machine"], report["options"]
    timed = {
        row["name"] for r in report["results"] for row in r["rows"] if row["status"] == "timed"
    }
    names = [name for contender, name in PEERS.items() if contender in timed]
    batch_sizes = " ".join(map(str, options["batch_sizes"]))
    return _filled(
        f"`python benchmarks/bench_block.py --batch-sizes {batch_sizes}` at commit"
        f" {machine['commit']} on {machine['date'][:10]}: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['isa']} kernels, {machine['system']}, torch "
        f"{machine['torch']}, ONNX Runtime {machine['onnxruntime'] or 'not installed'}, float32. "
        "Medians of whole calls from Python in microseconds, contenders by turns in one run. The "
        f"best other is the fastest of {', '.join(names)}. The backward rows are forward and "
        "backward together. Of peak: FLOPs of the direct convolutions and full gradients, as a "
        "fraction of the multiply-add peak that the same run measured; over 100 % where work is "
        "skipped."
    )


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| | batch | threads | fused | best other | | times as fast | of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, title in TITLES.items():
        for result in (r for r in results if r["case"] == case):
            medians, best = _medians(result), result["speedups"][0]
            cells = [title, str(result["batch"]), str(result["threads"])]
            ours = medians[best["own"]]
            cells += [_micros(ours), _micros(medians[best["best_peer"]])]
            cells += [PEERS[best["best_peer"]], _ratio(best["ratio"])]
            cells += [f"{100 * result['peak_us'] / ours:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
            title = ""
    return "\n".join(lines)


def _medians(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["median_us"] for row in result["rows"] if "median_us" in row}


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
        100 * (row["q3_us"] - row["q1_us"]) / row["median_us"]
        for result in report["results"]
        for row in result["rows"]
        if row["status"] == "timed"
    ]
    row = next(row for row in report["saved_bytes"] if row["what"] == "both blocks")
    return _filled(
        f"The machine's limits in the same run: {rates}. Between the quartiles of the "
        f"rounds lay {statistics.median(spreads):.0f} % of the median in the typical row, "
        f"{max(spreads):.0f} % in the worst. Saved for the backward by the two blocks, "
        f"input included: {1e-6 * row['fused']:.1f} MB against the stock layers' "
        f"{1e-6 * row['stock']:.1f} MB at batch {row['batch']} "
        f"({row['stock'] / row['fused']:.1f} times less)."
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


# ---- the chart -----------------------------------------------------------------------------------


def draw(report: dict[str, Any]) -> str:
    """Return an SVG: how many times as fast as stock eager the best other and fused are.

    Raises:
        ValueError: there are no results at SUMMARY_BATCH images.
    """
    results, machine = summary(report), report["machine"]
    bars = []  # of each result: class, ratio, words
    for result in results:
        medians, peer = _medians(result), result["speedups"][0]["best_peer"]
        ratios = {"eager": 1.0, "other": medians["eager"] / medians[peer]}
        ratios["fused"] = medians["eager"] / medians["fused"]
        notes = {"other": f", {PEERS[peer]}"}
        bars.append([(bar, r, f"{r:.1f}{notes.get(bar, '')}") for bar, r in ratios.items()])
    scale = LONGEST / max(ratio for row in bars for _, ratio, _ in row)
    what = f"batch {SUMMARY_BATCH}, {results[0]['threads']} threads of {machine['cpu']}"
    title = f"Times as fast as stock eager: {what}, torch {machine['torch']}"
    shapes = [_text(20, 22, title)]
    for i, (bar, name) in enumerate(BARS.items()):
        shapes += [_rect(BARS_AT + 110 * i, 36, 12, bar), _text(BARS_AT + 18 + 110 * i, 48, name)]
    for i, (name, row) in enumerate(zip(TITLES.values(), bars, strict=True)):
        top = TOP + ROW * i
        name, _, note = name.partition(" (")
        shapes.append(_text(BARS_AT - 10, top + 22, name, "label"))
        if note:
            shapes.append(_text(BARS_AT - 10, top + 38, f"({note}", "label small"))
        for j, (bar, ratio, words) in enumerate(row):
            y, width = top + (BAR + 2) * j, scale * ratio
            shapes += [_rect(BARS_AT, y, width, bar), _text(BARS_AT + width + 6, y + 12, words)]
    size = f'viewBox="0 0 {WIDE} {TOP + ROW * len(bars)}" width="{WIDE}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    lines = [
        head,
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>",
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _rect(x: float, y: float, width: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{BAR}" class="{kind}"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    kind = kind and f' class="{kind}"'
    return f'<text x="{x:.0f}" y="{y:g}"{kind}>{html.escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
