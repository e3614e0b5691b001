"""Whether a contender's results are right: the rule that stands before every timing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A result may be this many times as far from the float64 reference as the stock layers are. Four is
# for the largest Winograd kernel, which selection may choose; the tests hold every kernel to its
# own bound, two for the rest.
ALLOWED_ERROR_RATIO = 4.0

# Where even the stock layers miss the reference by more than this part of its norm, the two do not
# compute the same thing, and the rule above would let anything pass. Of the norm, since in half
# types single elements may be off by all they are: a rounded convolution makes ties that were none,
# and the pool then sends a gradient elsewhere.
SANE_STOCK_ERROR = 0.3


def compare(
    results: dict[str, Tensor], exact: dict[str, Tensor], stock: list[dict[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Compare results with a float64 reference by the stock layers' own error.

    Args:
        results: of the contender, by name.
        exact: the same from stock layers in float64.
        stock: the same from stock layers in the contender's dtype, once for each way in which they
            compute it (contiguous, channels_last: their sums run in another order, and on large
            batches one errs several times as much as the other). The largest error counts. In
            float32 for contenders in float64, whose error is float32's, scaled.

    Returns:
        For each name: ``error`` and ``stock_error``, the largest absolute differences from
        ``exact``; ``limit``, what ``error`` may be at most; ``right``. A wrong shape or a NaN is an
        infinite error. Nothing is right where the stock layers miss the reference by far.
    """
    if results.keys() != exact.keys():
        raise RuntimeError(f"results: expected {sorted(exact)}, got {sorted(results)}")
    report = {}
    for name, reference in exact.items():
        eps = torch.finfo(results[name].dtype).eps
        stock_error = max(_largest_error(way[name], reference) for way in stock)
        stock_error *= eps / torch.finfo(stock[0][name].dtype).eps  # 1, but for float64
        # The smallest error that can be asked of anybody: the reference itself, rounded to the
        # dtype, is off by up to half a unit in the last place of its largest element, which is at
        # most eps / 2 times that element. Twice that, as for the stock layers' error; it matters
        # where theirs happens to be (nearly) zero, as in a sum of few terms.
        floor = ALLOWED_ERROR_RATIO * eps / 2 * reference.abs().max().item()
        limit = ALLOWED_ERROR_RATIO * stock_error + floor
        if results[name].dtype == torch.float64:
            limit += stock_error  # the reference errs as much itself
        sane = all(
            (way[name].double() - reference).norm() <= SANE_STOCK_ERROR * reference.norm()
            for way in stock
        )
        error = _largest_error(results[name], reference)
        report[name] = {
            "error": error,
            "stock_error": stock_error,
            "limit": limit,
            "right": sane and error <= limit,
        }
    return report


def _largest_error(result: Tensor, reference: Tensor) -> float:
    if result.shape != reference.shape:
        return float("inf")
    error = (result.double() - reference).abs().max().item()
    return error if error == error else float("inf")  # NaN differs from itself


def describe(report: dict[str, dict[str, Any]]) -> str:
    """Return what is wrong in a report of :func:`compare`, or ""."""
    return "; ".join(
        f"{name} is off by {row['error']:.2g}, allowed {row['limit']:.2g} "
        f"(stock layers: off by {row['stock_error']:.2g})"
        for name, row in report.items()
        if not row["right"]
    )
