r"""Every CUDA kernel on SimpleCNN's blocks: time, FLOP rate and bandwidth beside the GPU's own.

    python benchmarks/profile_kernels.py --json profile.json
    python benchmarks/profile_kernels.py --blocks simplecnn-2 --precisions tf32 --batch-sizes 8192

Each pass is timed as fusedcnn chooses its kernel and with each kernel forced by name, by turns,
after its result was checked against a float64 reference (agreement.py). The rates of a large matrix
product at the same precision and of a device copy come from the same run; the floor of a pass is
what its FLOPs or its bytes take at these rates, whichever is longer. The profiler splits a call
into its launches.

Exit status: 0; 1 where a result was wrong; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from agreement import describe
from arguments import MAX_BATCH, check_writable, integer, seconds
from blocks import BY_NAME
from fusedcnn import _cuda
from fusedcnn._ops import below_autograd
from kernel_forcing import force_kernel
from limits import describe_machine, measure_limits
from passes import PASSES, BlockCalls, Pass
from precision import PRECISIONS, describe_settings, set_precision, use_device
from progress import Progress
from report import print_machine, print_table, write_json
from timing import summarize, time_by_turns

CHOSEN = "(chosen)"
PROFILED_CALLS = 10


class Options(NamedTuple):
    """What to measure: see the command line's help."""

    device: torch.device
    blocks: list[str]
    batch_sizes: list[int]
    precisions: list[str]
    layouts: list[str]
    min_time: float
    rounds: int
    time_limit: float | None
    launches: bool
    json: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(arguments)
    report = run(options)
    print_report(report)
    if options.json:
        write_json(report, options.json)
    return 0 if report["status"] == "right" else 1


def parse(arguments: list[str] | None) -> Options:
    """Read the command line; on bad arguments, say what is wrong and exit with status 2."""
    parser = argparse.ArgumentParser(description="Time every CUDA kernel beside the GPU's rates.")
    # fmt: off
    add = parser.add_argument
    add("--device", default="cuda", metavar="DEVICE", help="cuda or cuda:N (default: %(default)s)")
    add("--blocks", nargs="+", choices=BY_NAME, default=["simplecnn-1", "simplecnn-2"],
        metavar="BLOCK", help="of blocks.py (default: SimpleCNN's two)")
    add("--batch-sizes", nargs="+", type=integer(1, MAX_BATCH), default=[4096], metavar="N",
        help="images per call (default: 4096)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "tf32", "bfloat16"],
        metavar="PRECISION", help="(default: float32 tf32 bfloat16)")
    add("--layouts", nargs="+", choices=["contiguous", "channels_last"], default=["contiguous"],
        metavar="LAYOUT", help="contiguous, channels_last (default: contiguous)")
    add("--min-time", type=seconds, default=0.1, metavar="S",
        help="seconds for which each kernel is timed, all rounds together (default: %(default)s)")
    add("--rounds", type=integer(2, 1000), default=5, metavar="N",
        help="turns of each kernel (default: %(default)s)")
    add("--time-limit", type=seconds, metavar="S",
        help="begin nothing further after so many seconds; the report says what is missing")
    add("--no-launches", dest="launches", action="store_false",
        help="do not split calls into launches; for runs under another profiler")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    # fmt: on
    values = vars(parser.parse_args(arguments))
    try:
        values["device"] = _device(values["device"])
        if values["json"]:
            check_writable("--json", values["json"])
    except ValueError as error:
        parser.error(str(error))
    return Options(**values)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise ValueError(f"argument --device: expected cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(
            f"argument --device: got {text!r}, but torch sees {count} CUDA devices here"
        )
    if _cuda.reason is not None:
        raise ValueError(f"argument --device: no CUDA kernels to profile: {_cuda.reason}")
    return device


def run(options: Options) -> dict[str, Any]:
    """Measure everything that the options ask for.

    Returns:
        The report: plain values only, ready for JSON.
    """
    began = time.monotonic()
    use_device(options.device)
    combinations = [
        (precision, block, batch, layout)
        for precision in options.precisions
        for block in options.blocks
        for batch in options.batch_sizes
        for layout in options.layouts
    ]
    progress = Progress(len(combinations) * len(PASSES))
    rows: list[dict[str, Any]] = []
    limits: dict[str, dict[str, Any]] = {}
    not_run = []
    try:
        for precision, block, batch, layout in combinations:
            head = {"precision": precision, "block": block, "batch": batch, "layout": layout}
            if options.time_limit and time.monotonic() - began > options.time_limit:
                not_run.append(head)
                continue
            set_precision(PRECISIONS[precision])
            _cuda.follow_tf32()  # the operators are called directly here
            if precision not in limits:
                progress.say(f"limits, {precision}")
                dtype = PRECISIONS[precision].dtype
                limits[precision] = measure_limits(1, dtype, options.device)
                limits[precision]["settings"] = describe_settings(options.device)
            calls = BlockCalls(
                BY_NAME[block],
                batch,
                PRECISIONS[precision],
                layout == "channels_last",
                device=options.device,
            )
            for of_pass in PASSES:
                progress.say(f"{precision}, {block}, batch {batch}, {layout}: {of_pass.name}")
                found = _profile_pass(calls, of_pass, options)
                for row in found:
                    if row["status"] == "timed":
                        row |= rates(
                            row["median_us"],
                            BY_NAME[block].flops * batch,
                            calls.bytes(of_pass),
                            limits[precision],
                        )
                rows += [head | {"pass": of_pass.name} | row for row in found]
                progress.advance()
            del calls
            torch.cuda.empty_cache()
    finally:
        progress.close()
    wrong = any(row["status"] == "wrong" for row in rows)
    return {
        "status": "wrong" if wrong else "incomplete" if not_run else "right",
        "options": {
            "device": str(options.device),
            "dtype": ", ".join(options.precisions),
            "min_time_s": options.min_time,
            "rounds": options.rounds,
            "time_limit_s": options.time_limit,
        },
        "machine": describe_machine(options.device),
        "limits": limits,
        "blocks": [BY_NAME[name].describe() for name in options.blocks],
        "rows": rows,
        "not_run": not_run,
    }


def _profile_pass(calls: BlockCalls, of_pass: Pass, options: Options) -> list[dict[str, Any]]:
    """Check each kernel of a pass, time those that cover the block, and split their calls."""
    names = [k["name"] for k in _cuda.info()["kernels"] if k["pass"] == of_pass.kernels]
    rows: dict[str, dict[str, Any]] = {}
    for name in (CHOSEN, *names):
        rows[name] = {"kernel": name}
        try:
            with force_kernel(options.device, "" if name == CHOSEN else name):
                agreement = calls.check(of_pass)
        except RuntimeError as error:
            if "kernel covers this call" not in str(error):
                raise
            rows[name] |= {"status": "not covered", "reason": str(error)}
            continue
        wrong = describe(agreement)
        rows[name] |= {"status": "wrong" if wrong else "right", "reason": wrong}
        rows[name]["agreement"] = agreement
    step = calls.step(of_pass)
    timed = [name for name, row in rows.items() if row["status"] == "right"]

    def forced(name: str) -> None:
        _cuda._library.fusedcnn_cuda_force(b"" if name == CHOSEN else name.encode())

    if timed:
        try:
            with torch.no_grad(), below_autograd():
                times = time_by_turns(
                    dict.fromkeys(timed, step),
                    dict.fromkeys(timed, 0.0),
                    threads=1,
                    rounds=options.rounds,
                    min_time=options.min_time,
                    progress=lambda: None,
                    before_turn=forced,
                )
                for name in timed:
                    forced(name)
                    rows[name] |= {"status": "timed", **summarize(times[name])}
                    if options.launches:
                        rows[name]["launches"] = _launches(step)
        finally:
            forced(CHOSEN)
    return list(rows.values())


def _launches(step: Any) -> list[dict[str, Any]]:
    """What a call launches: names, and microseconds on the GPU, means of several calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_CALLS):
            step()
        torch.cuda.synchronize()
    return [
        {
            "name": event.key,
            "count": event.count / PROFILED_CALLS,
            "us": event.self_device_time_total / PROFILED_CALLS,
        }
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]


def rates(micros: float, flops: int, bytes: int, limits: dict[str, Any]) -> dict[str, float]:
    """FLOP rate and bandwidth of a call, beside those of the GPU, and its floor.

    Args:
        micros: of the call.
        flops: of the direct convolution.
        bytes: that the call must at least read and write.
        limits: what :func:`limits.measure_limits` returned.
    """
    gflops, gbps = 1e-3 * flops / micros, 1e-3 * bytes / micros
    floor = 1e-3 * max(flops / limits["gemm_gflops"], bytes / limits["copy_gbps"])
    return {
        "flops": flops,
        "bytes": bytes,
        "gflops": gflops,
        "gbps": gbps,
        "gemm_fraction": gflops / limits["gemm_gflops"],
        "copy_fraction": gbps / limits["copy_gbps"],
        "floor_us": floor,
        "times_floor": micros / floor,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print everything that a person wants to know."""
    print_machine(report)
    for precision, limits in report["limits"].items():
        print(
            f"{precision}: GEMM {limits['gemm_gflops']:,.0f} GFLOP/s, "
            f"copy {limits['copy_gbps']:,.0f} GB/s (read + written)"
        )
    header = ("block", "batch", "precision", "layout", "pass", "kernel", "median us", "GFLOP/s")
    header += ("of GEMM", "GB/s", "of copy", "x floor")
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in report["rows"]:
        head = (row["block"], str(row["batch"]), row["precision"], row["layout"])
        cells = (*head, row["pass"], row["kernel"])
        if row["status"] == "timed":
            cells += (
                f"{row['median_us']:,.1f}",
                f"{row['gflops']:,.0f}",
                f"{100 * row['gemm_fraction']:.0f} %",
                f"{row['gbps']:,.0f}",
                f"{100 * row['copy_fraction']:.0f} %",
                f"{row['times_floor']:.2f}",
            )
        else:
            cells += (row["status"], "", "", "", "", "")
        groups.setdefault(head, []).append(cells)
    print_table(header, list(groups.values()))
    print(
        "FLOPs of the direct convolution; bytes that must be read and written once. Floor: what "
        "either takes at the rates above, the longer of the two."
    )
    for row in report["rows"]:
        if row["status"] in ("wrong", "not covered"):
            print(f"{row['block']}, {row['pass']}, {row['kernel']}: {row['reason']}")
        for launch in row.get("launches", []):
            print(
                f"{row['block']}, batch {row['batch']}, {row['precision']}, {row['layout']}, "
                f"{row['pass']}, {row['kernel']}: {launch['us']:.1f} us in "
                f"{launch['count']:g} x {launch['name'][:80]}"
            )
    for one in report["not_run"]:
        print(f"NOT RUN, --time-limit was over: {one}")


if __name__ == "__main__":
    sys.exit(main())
