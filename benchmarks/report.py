"""The report as tables for people, as JSON and as a picture. All three read the same dict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HEADER = (
    "case",
    "batch",
    "threads",
    "contender",
    "median us",
    "min us",
    "IQR",
    "time / fused",
    "FMA",
    "copy",
)


def print_report(report: dict[str, Any]) -> None:
    """Print everything that a person wants to know."""
    print_machine(report)
    for limits in report["limits"]:
        fma = limits["fma_gflops"]
        print(
            f"limits of {limits['threads']} thread(s): "
            f"FMA peak {f'{fma:.0f} GFLOP/s' if fma else 'not measured'}, "
            f"GEMM {limits['gemm_gflops']:.0f} GFLOP/s, "
            f"copy {limits['copy_gbps']:.1f} GB/s (read + written)"
        )
    for note in report["notes"]:
        print(f"note: {note}")

    peak = report["peak_name"]
    header = tuple(peak if title == "FMA" else title for title in HEADER)
    print_table(header, [_case_rows(result) for result in report["results"]])
    print(
        f"{peak}: FLOPs of the direct convolutions and full gradients / time / {peak} peak; over "
        "100 % where work is skipped.\ncopy: bytes that must be read and written / time / copy "
        "rate. IQR: between the quartiles of the rounds, in % of the median."
    )

    print()
    for result in report["results"]:
        head = f"{result['case']}, batch {result['batch']}, {result['threads']} thread(s)"
        print(f"{head}: {_verdict(result)}")
        for row in result["contenders"]:
            if row["status"] in ("unavailable", "wrong"):
                print(f"    {row['name']}: {row['status']}: {row['reason']}")
        for one in result.get("like_with_like", []):
            if one["speedup"]:
                print(f"    {one['own']}: {one['speedup']['ratio']:.2f} x {one['best_peer']}")
    for one in report["not_run"]:
        print(f"{one['case']}, batch {one['batch']}: NOT RUN: --time-limit was over")

    print("\nBytes saved for backward, parameters left out:")
    print_table(
        ("what", "batch", "stock", "fused", "stock / fused", "with the output"),
        [[_saved_row(row) for row in report["saved_bytes"]]],
    )


def print_machine(report: dict[str, Any]) -> None:
    """Print what the figures were taken on."""
    machine, options = report["machine"], report["options"]
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['gpu'] or 'no GPU used'}")
    cuda = machine["cuda"]
    if cuda:
        print(
            f"driver {cuda['driver']}, CUDA {cuda['runtime']}, cuDNN {cuda['cudnn']}, compute "
            f"capability {cuda['capability']}, {cuda['multiprocessors']} multiprocessors"
        )
    precision = options.get("precision", options["dtype"])
    print(
        f"torch {machine['torch']}, fusedcnn {machine['fusedcnn']['version']} at commit "
        f"{machine['commit']}, {precision} on {options['device']}"
    )
    if options.get("settings"):
        print("for all: " + ", ".join(f"{k} = {v}" for k, v in options["settings"].items()))


def _case_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    own = next((row for row in result["contenders"] if row["name"] == result["own"]), {})
    rows = []
    for row in result["contenders"]:
        head = (result["case"], str(result["batch"]), str(result["threads"]), row["name"])
        if row["status"] != "timed":
            rows.append((*head, row["status"], "", "", "", "", ""))
            continue
        median = row["median_us"]
        q1, q3 = row["iqr_us"]
        rows.append(
            (
                *head,
                f"{median:.1f}",
                f"{row['min_us']:.1f}",
                f"{100 * (q3 - q1) / median:.0f} %",
                f"{median / own['median_us']:.2f}" if "median_us" in own else "",
                f"{100 * row['peak_fraction']:.0f} %",
                f"{100 * row['copy_fraction']:.0f} %",
            )
        )
    return rows


def _verdict(result: dict[str, Any]) -> str:
    if result["status"] == "wrong":
        return "WRONG, not timed"
    if result["speedup"] is None:
        return "no ratio: it needs fused and at least one other contender"
    speedup = result["speedup"]
    low, high = speedup["quartiles"]
    return (
        f"{result['own']} is {speedup['ratio']:.2f} times as fast as the best other contender, "
        f"{result['best_peer']} (quartiles of the rounds {low:.2f} to {high:.2f}, by the fastest "
        f"rounds {speedup['ratio_of_minima']:.2f})"
    )


def _saved_row(row: dict[str, Any]) -> tuple[str, ...]:
    stock, fused = row["stock"], row["fused"]
    with_output = (stock["saved"] + stock["output"]) / (fused["saved"] + fused["output"])
    return (
        row["what"],
        str(row["batch"]),
        f"{stock['saved']:,}",
        f"{fused['saved']:,}",
        f"{row['ratio']:.2f}",
        f"{with_output:.2f}",
    )


def print_table(
    header: tuple[str, ...], groups: list[list[tuple[str, ...]]], width: int = 160
) -> None:
    """Print groups of rows under a header, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain_table(header, groups)
        return
    table = Table()
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for group in groups:
        for row in group:
            table.add_row(*row)
        table.add_section()
    console = Console()
    # A file or a pipe has no width of its own: leave the table whole.
    if not console.is_terminal:
        console.width = width
    console.print(table)


def _print_plain_table(header: tuple[str, ...], groups: list[list[tuple[str, ...]]]) -> None:
    rows = [header, *(row for group in groups for row in group)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    print(line(header))
    for group in groups:
        print("-" * (sum(widths) + 2 * len(widths) - 2))
        for row in group:
            print(line(row))


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write the whole report, lists and dicts of plain values on one line each."""
    text = json.dumps(report, indent=1)
    # A line end inside a string is escaped, so that these are the document's own.
    text = re.sub(r"[\[{]\n[^\[\]{}]*[\]}]", lambda match: " ".join(match[0].split()), text)
    path.write_text(text + "\n")


def write_plot(report: dict[str, Any], path: Path) -> None:
    """Draw median times with their quartiles, one panel per case and batch size."""
    from matplotlib.figure import Figure

    timed = [
        result
        for result in report["results"]
        if any(row["status"] == "timed" for row in result["contenders"])
    ]
    batches = list(dict.fromkeys((result["batch"], result["threads"]) for result in timed))
    cases = list(dict.fromkeys(result["case"] for result in timed))
    figure = Figure(
        figsize=(3.4 * max(1, len(cases)), 1 + 2.6 * max(1, len(batches))), layout="constrained"
    )
    machine, options = report["machine"], report["options"]
    figure.suptitle(
        f"{machine['gpu'] or machine['cpu']}, {options['dtype']}: "
        "median time of a call, lines between the quartiles"
    )
    if timed:
        panels = figure.subplots(len(batches), len(cases), squeeze=False)
        for result in timed:
            panel = panels[batches.index((result["batch"], result["threads"]))][
                cases.index(result["case"])
            ]
            _draw_panel(panel, result)
    figure.savefig(path, dpi=120)


def _draw_panel(panel: Any, result: dict[str, Any]) -> None:
    rows = [row for row in result["contenders"] if row["status"] == "timed"]
    names = [row["name"] for row in rows]
    medians = [row["median_us"] for row in rows]
    spread = [
        [row["median_us"] - row["iqr_us"][0] for row in rows],
        [row["iqr_us"][1] - row["median_us"] for row in rows],
    ]
    colors = ["tab:orange" if name.startswith("fused") else "tab:gray" for name in names]
    panel.barh(names, medians, xerr=spread, color=colors)
    panel.invert_yaxis()
    panel.set_xlabel("microseconds")
    panel.locator_params(axis="x", nbins=5)
    speedup = result["speedup"]
    best = f"\nfused {speedup['ratio']:.2f} times as fast" if speedup else ""
    panel.set_title(
        f"{result['case']}, batch {result['batch']}, {result['threads']} thread(s){best}",
        fontsize=10,
    )
