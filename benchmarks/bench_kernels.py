r"""Kernels by name on any block, and real blocks beside the stock layers.

    python benchmarks/bench_kernels.py                          # every kernel of SimpleCNN's blocks
    python benchmarks/bench_kernels.py alexnet-2 --isa avx2 avx512 --passes forward
    python benchmarks/bench_kernels.py --shape 64x3x32x32 --conv '16, 3, padding=1' --pool 2 \
        --dtype bfloat16 --layout channels_last --threads 1
    python benchmarks/bench_kernels.py --blocks                 # real networks, block by block
    python benchmarks/bench_kernels.py --device cuda --precision float32 tf32 bfloat16

All but ``--blocks`` time the operators pass by pass: each kernel that covers the block is forced by
its name, checked against a float64 reference (contenders.py) and timed by turns with the others of
its pass; one that does not cover the block is listed with its reason. What selection chooses is
held against the quickest. The gradients start from the codes of a kernel that serves every block.
On a GPU the kernel that selection chooses is timed once more under a name of its own, and torch's
profiler splits each call into its launches. ``--blocks`` times whole calls from Python, forward and
forward with backward, beside the stock layers.

Needs ``fusedcnn[bench]``. Exit status: 0; 1 where a result was wrong, fused could not run or time
was over; 2 for bad arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import fusedcnn
import torch
from bench_block import race_all
from blocks import BLOCKS, Block, Problem, block_case
from contenders import allowed_error, largest_error, what_is_wrong
from fusedcnn import _cuda
from fusedcnn._derivatives import dense_backward
from fusedcnn._geometry import Geometry
from fusedcnn._ops import (
    _C,
    GRAD_BIAS,
    GRAD_INPUT,
    GRAD_WEIGHT,
    backward_op,
    below_autograd,
    forward_op,
)
from options import Parser
from report import Report
from timing import Clock, Precision, at_best, force_kernel, time_rows
from torch import Tensor

SMALL_BATCH = 1
BATCH_ON_GPU = 4096
LAYOUTS = ("contiguous", "channels_last")
# Gradients that each pass computes; the forward passes differ in whether they keep codes.
PASSES = {
    "forward": 0,
    "forward+code": 0,
    "grad_weight": GRAD_WEIGHT | GRAD_BIAS,
    "grad_input": GRAD_INPUT,
}
# Stands for a kernel's name on a GPU, whose library does not tell which one it selected.
CHOSEN = "(chosen)"
PROFILED_CALLS = 10


def main(arguments: list[str] | None = None) -> int:
    return run(parse(arguments)).finish()


def parse(arguments: list[str] | None) -> Namespace:
    parser = Parser("Time kernels by name, or real blocks.", min_time=0.1, rounds=5)
    parser.add_kernels()
    # fmt: off
    add = parser.add_argument
    add("names", nargs="*", metavar="BLOCK",
        help="see --list (default: SimpleCNN's two; with --blocks all)")
    add("--blocks", dest="whole", action="store_true",
        help="time whole forward and backward passes beside the stock layers")
    add("--passes", nargs="+", choices=PASSES, metavar="PASS",
        help=f"{', '.join(PASSES)} (default: all)")
    add("--layout", nargs="+", choices=LAYOUTS, metavar="LAYOUT",
        help=f"{', '.join(LAYOUTS)} (default: contiguous)")
    add("--no-launches", dest="launches", action="store_false",
        help="do not split a GPU's calls into launches; for runs under another profiler")
    # fmt: on
    parser.add_own_block()
    options = parser.read(arguments)
    for name in ("kernel", "passes", "layout") if options.whole else ("contenders",):
        if getattr(options, name):
            mode = "with" if options.whole else "without"
            parser.error(f"argument --{name}: not allowed {mode} --blocks")
    on_cpu = options.device.type == "cpu"
    if options.whole:
        parser.expect_one(options, "isa")
        options.contenders = options.contenders or ["fused", "eager", "eager-cl"]
    elif not on_cpu and _cuda.reason is not None:
        parser.error(f"argument --device: no CUDA kernels to time: {_cuda.reason}")
    if options.shape:
        blocks = [parser.own_block(options)]
    elif options.conv or options.pool:
        parser.error("argument --shape: needed with --conv and --pool")
    else:
        names = options.names or (BLOCKS if options.whole else ["simplecnn-1", "simplecnn-2"])
        if unknown := [name for name in names if name not in BLOCKS]:
            parser.error(f"argument BLOCK: expected one of {', '.join(BLOCKS)}, got {unknown}")
        blocks = [BLOCKS[name] for name in dict.fromkeys(names)]
    if not options.whole and (norms := [block.name for block in blocks if block.norm]):
        parser.error(f"argument BLOCK: {norms} have a BatchNorm, which needs --blocks")
    options.blocks = []
    for block in blocks:
        batch_sizes = [1, block.batch] if on_cpu else [BATCH_ON_GPU]
        runs = parser.pair_runs(options, batch_sizes, SMALL_BATCH)
        options.blocks += [(run, block) for run in runs]
    options.passes = options.passes or list(PASSES)
    options.layout = options.layout or ["contiguous"]
    if on_cpu and not options.isa:
        options.isa = [i["name"] for i in fusedcnn.build_info()["isas"] if i["selected"]]
    return options


def run(options: Namespace) -> Report:
    if options.whole:
        works = [
            (run, block_case(block, backward=backward))
            for run, block in options.blocks
            for backward in (False, True)
        ]
        return race_all(options, works)
    works = list(itertools.product(options.precisions, options.blocks, options.layout))
    isas = options.isa or [None]
    report = Report(options, len(works) * len(isas) * len(options.passes))
    for precision, (run, block), layout in works:
        precision.use(options.device)
        torch.set_num_threads(run.threads)
        head = {"block": block.name, **run._asdict(), "precision": precision.name, "layout": layout}
        clock = Clock(run.threads, options.min_time, options.rounds)
        calls = None  # made for the first pass that there is time for
        for isa, name in itertools.product(isas, options.passes):
            one = head | {"pass": name} | ({"isa": isa} if isa else {})
            if report.begin(one):
                limits = report.limits(run.threads, precision, isa)
                calls = calls or Calls(block, run.batch, precision, options.device, layout)
                result = time_kernels(calls, name, isa, options, clock, report.say)
                best = at_best(block.flops * run.batch, calls.bytes(name), limits)
                report.add(one, result | best)
        if options.device.type == "cuda":
            del calls
            torch.cuda.empty_cache()
    return report


class Operands(NamedTuple):
    """What changes from call to call."""

    input: Tensor
    grad_output: Tensor
    code: Tensor


class Calls:
    """All passes of one block at one batch size, precision and layout.

    The codes from which the backward passes start are those of a kernel that serves every block.
    """

    def __init__(
        self, block: Block, batch: int, precision: Precision, device: torch.device, layout: str
    ) -> None:
        self.geometry = block.geometry()
        case = block_case(block, backward=True, input_grad=True)
        self.problem = Problem(case, batch, precision, device)
        last = layout == "channels_last"
        module = self.problem.module(fused=True, channels_last=last)[0]
        self.weight, self.bias = module.weight.detach(), module.bias.detach()
        self._operands = []
        everywhere = "library" if device.type == "cuda" else "general"
        with below_autograd(), force_kernel(device, everywhere):
            for batch in self.problem.batches(channels_last=last):
                input = batch.input.detach()
                _, code = forward_op(input, self.weight, self.bias, self.geometry, True)
                self._operands.append(Operands(input, batch.target, code))

    def bytes(self, name: str) -> int:
        """Bytes that a call of a pass must at least read and write once, workspace left out."""
        input, grad_output, code = self._operands[0]
        # The output is as large as its gradient, and each gradient as what it is the gradient of.
        tensors = {
            "forward": [input, self.weight, self.bias, grad_output],
            "forward+code": [input, self.weight, self.bias, grad_output, code],
            "grad_weight": [input, grad_output, code, self.weight, self.bias],
            "grad_input": [grad_output, code, self.weight, input],
        }[name]
        return sum(tensor.nbytes for tensor in tensors)

    def step(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """Return the function that calls a pass on the next operands: what is timed."""
        rotating = itertools.cycle(self._operands)
        weight, bias, geometry, mask = self.weight, self.bias, self.geometry, PASSES[name]

        def forward() -> tuple[Tensor, ...]:
            input, _, _ = next(rotating)
            return forward_op(input, weight, bias, geometry, name == "forward+code")

        def backward() -> tuple[Tensor, ...]:
            input, grad_output, code = next(rotating)
            return backward_op(grad_output, input, weight, code, geometry, mask)

        return backward if mask else forward

    def check(self, name: str) -> str:
        """Compute a pass once by the kernel in use; return what is wrong, or "".

        Raises:
            RuntimeError: the forced kernel does not cover the block.
        """
        with torch.no_grad(), below_autograd():
            results = self.step(name)()
        exact, stock = self.problem.references
        if mask := PASSES[name]:
            bits = {"grad input": GRAD_INPUT, "grad weight": GRAD_WEIGHT, "grad bias": GRAD_BIAS}
            grads = dict(zip(bits, results, strict=True))
            return what_is_wrong({k: grads[k] for k in bits if mask & bits[k]}, exact, stock)
        wrong = what_is_wrong({"output": results[0]}, exact, stock)
        if wrong or name == "forward":
            return wrong
        # Of two outputs that are each off by the limit, the smaller may have looked the larger.
        ways = [way["output"] for way in stock]
        limit = 2 * allowed_error(results[0].dtype, exact["output"], ways)[1]
        error = largest_error(self._coded(results[1]), exact["output"])
        return "" if error <= limit else f"code is off by {error:.2g}, allowed {limit:.2g}"

    def _coded(self, code: Tensor) -> Tensor:
        """In float64, the convolution outputs that the codes name, and 0 where ReLU is off."""
        # Both grad_weight and grad_bias are linear in grad_output; with the weight and the bias in
        # place of what they meet, its factor is the output that the code names.
        input, grad_output, _ = self._operands[0]
        weight = self.weight.double().contiguous()
        probe = grad_output.double().contiguous().requires_grad_()
        operands = (probe, input.double().contiguous(), weight, code.contiguous())
        with torch.enable_grad():
            _, grad_weight, grad_bias = dense_backward(*operands, Geometry(*self.geometry))
            total = (grad_weight * weight).sum() + (grad_bias * self.bias.double()).sum()
        return torch.autograd.grad(total, probe)[0]


def time_kernels(
    calls: Calls,
    name: str,
    isa: str | None,
    options: Namespace,
    clock: Clock,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Check each kernel of a pass, then time those that cover the block and are right.

    Returns:
        The report's result: ``rows``, one for each kernel, whose ``status`` is ``"timed"``, or
        ``"not covered"``, ``"failed"`` or ``"wrong"`` with a ``reason``; ``selected``, the one that
        selection chooses; ``status``: ``"wrong"`` where any is, ``"incomplete"`` where any failed,
        else ``"timed"``.
    """
    of_pass, step = name.removesuffix("+code"), calls.step(name)

    def force(kernel: str) -> contextlib.AbstractContextManager[None]:
        return force_kernel(options.device, kernel if kernel != CHOSEN else "", isa)

    selected, listed = CHOSEN, _cuda.info()["kernels"]
    if isa:
        with force(CHOSEN), torch.no_grad(), below_autograd():
            step()
        selected = _C.last_selected()[of_pass]
        info = fusedcnn.build_info()
        isas = [isa, next(i["base"] for i in info["isas"] if i["name"] == isa)]
        listed = sorted(
            (k for k in info["kernels"] if k["isa"] in isas), key=lambda k: isas.index(k["isa"])
        )
    names = options.kernel or list(dict.fromkeys(k["name"] for k in listed if k["pass"] == of_pass))
    rows = [{"name": kernel, "status": "right"} for kernel in [CHOSEN] * (not isa) + names]
    for row in rows:
        say(row["name"])
        try:
            with force(row["name"]):
                wrong = calls.check(name)
        except RuntimeError as error:
            reason = str(error).partition("kernel covers this call: ")[2]
            if not reason:
                raise
            row |= {"status": "not covered", "reason": reason.removeprefix(f"{row['name']}: ")}
            continue
        if wrong:
            row |= {"status": "wrong", "reason": wrong}
    say("timing")
    steps = {row["name"]: step for row in rows if row["status"] == "right"}
    with torch.no_grad(), below_autograd():
        time_rows(rows, steps, clock, force)
        if options.launches and not isa:
            for row in rows:
                if row["status"] == "timed":
                    with force(row["name"]):
                        row["launches_us"] = _launches(step)
    statuses = {row["status"] for row in rows}
    status = "wrong" if "wrong" in statuses else "incomplete" if "failed" in statuses else "timed"
    return {"status": status, "rows": rows, "selected": selected}


def _launches(step: Callable[[], object]) -> dict[str, float]:
    """What a call launches: microseconds on the GPU by name, means of several calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_CALLS):
            step()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / PROFILED_CALLS
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    }


if __name__ == "__main__":
    sys.exit(main())
