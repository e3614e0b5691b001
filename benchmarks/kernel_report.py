"""The reports of bench_kernels.py as tables for people."""

from __future__ import annotations

from typing import Any

from report import print_machine, print_table

LADDER_HEADER = (
    "block", "batch", "threads", "dtype", "layout", "pass", "isa", "kernel", "median us", "min us",
    "ns / image", "GFLOP/s", "of peak",
)  # fmt: skip
SUMMARY_HEADER = (
    "block", "batch", "threads", "work", "fused us", "best stock us", "", "times as fast",
    "GFLOP/s", "of peak", "kernels",
)  # fmt: skip
WORK = {"forward": "forward", "gradients": "fwd+bwd"}


def print_report(report: dict[str, Any]) -> None:
    """Print everything that a person wants to know."""
    print_machine(report)
    for row in report["peaks"]:
        print(
            f"FMA peak of {row['isa']}, {row['threads']} thread(s): "
            f"{row['fma_gflops']:.0f} GFLOP/s in float32"
        )
    if report["options"]["summary"]:
        _print_summary(report["rows"])
    else:
        _print_ladder(report["rows"])


def _print_ladder(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple, list[tuple[str, ...]]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("block", "batch", "threads", "dtype", "layout"))
        group = groups.setdefault((*key, row["pass"]), [])
        group.append((*key, row["pass"], row["isa"], _marked(row), *_ladder_cells(row)))
    print_table(LADDER_HEADER, list(groups.values()), width=200)
    print(
        "* what selection chooses. GFLOP/s: FLOPs of the direct convolution, or of the pass's full "
        "gradient, / median time;\nover the peak where work is skipped. Peak: float32 "
        "multiply-adds of the ISA, half of it for float64."
    )
    for row in rows:
        if "reason" in row:
            head = f"{row['block']}, batch {row['batch']}, {row['dtype']}, {row['layout']}"
            print(
                f"{head}, {row['pass']}: {row['isa']} {row['kernel']}: {row['status']}: "
                f"{row['reason']}"
            )


def _marked(row: dict[str, Any]) -> str:
    return row["kernel"] + (" *" if row["selected"] else "  ")


def _ladder_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["status"] != "timed":
        return (row["status"], "", "", "", "")
    return (
        f"{row['median_us']:,.1f}",
        f"{row['min_us']:,.1f}",
        f"{row['ns_per_image']:,.0f}",
        f"{row['gflops']:,.1f}",
        f"{100 * row['peak_fraction']:.0f} %",
    )


def _print_summary(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple, list[tuple[str, ...]]] = {}
    for row in rows:
        head = (row["block"], str(row["batch"]), str(row["threads"]))
        groups.setdefault(head, []).append((*head, WORK[row["kind"]], *_summary_cells(row)))
    print_table(SUMMARY_HEADER, list(groups.values()), width=200)
    print(
        "Times: medians of whole calls from Python. fwd+bwd: gradients of weight and bias, and of "
        "the input unless it is images.\nOf peak: FLOPs of the direct convolution and full "
        "gradients / time / float32 multiply-add peak (half of it for float64)."
    )
    for row in rows:
        for one in row["contenders"]:
            if "reason" in one:
                head = f"{row['block']}, batch {row['batch']}, {WORK[row['kind']]}"
                print(f"{head}: {one['name']}: {one['status']}: {one['reason']}")


def _summary_cells(row: dict[str, Any]) -> tuple[str, ...]:
    medians = {one["name"]: one.get("median_us") for one in row["contenders"]}
    fused, best, name = medians.get("fused"), medians.get(row["best_peer"]), row["best_peer"]
    missing = row["status"] if row["status"] != "timed" else ""
    gflops = 1e-3 * row["flops"] / fused if fused else None
    return (
        f"{fused:,.1f}" if fused else missing,
        f"{best:,.1f}" if best else missing,
        name or "",
        f"{row['speedup']['ratio']:.2f}" if row["speedup"] else "",
        f"{gflops:,.1f}" if gflops else "",
        f"{100 * row['peak_fraction']:.0f} %" if gflops else "",
        ", ".join(row["kernels"].values()),
    )
