"""Timing by turns: every contender in every round, so that drift hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from torch.utils.benchmark import Timer

# Calls for the first estimate of a contender's speed.
ESTIMATE_CALLS = 3

# A case may take this many times the time that was asked for (warming up costs some, and so do
# calls longer than a turn); on a machine that is busy with something else it then ends early, but
# not before the quartiles of the rounds mean something.
PATIENCE = 4
ENOUGH_ROUNDS = 5


def time_by_turns(
    steps: dict[str, Callable[[], object]],
    rests: dict[str, float],
    *,
    threads: int,
    rounds: int,
    min_time: float,
    progress: Callable[[], None],
    before_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Time each contender once a round, in a new order every round.

    Args:
        steps: what to time, by contender.
        rests: seconds to wait after each contender's turn.
        threads: of torch; on a CUDA device, torch's Timer waits for the device.
        rounds: turns of each contender; fewer where they take much longer than min_time says.
        min_time: seconds that each contender runs in all its turns together, at least.
        progress: called after each turn.
        before_turn: called with the contender's name before each of its turns, off the clock.

    Returns:
        For each contender, seconds per call, one value a round.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads)
        for name, step in steps.items()
    }
    calls = {}
    for name, timer in timers.items():
        before_turn(name)
        estimate = timer.timeit(ESTIMATE_CALLS).mean
        calls[name] = max(1, round(min_time / rounds / estimate))
        time.sleep(rests[name])
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle  # so that nobody always follows the same neighbour
    deadline = time.monotonic() + PATIENCE * min_time * len(steps)
    for done in range(rounds):
        if done >= ENOUGH_ROUNDS and time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            before_turn(name)
            times[name].append(timers[name].timeit(calls[name]).mean)  # warms up by itself
            time.sleep(rests[name])
            progress()
    return times


def summarize(seconds: list[float]) -> dict[str, Any]:
    """Median, minimum, quartiles and the rounds themselves, in microseconds."""
    micros = [1e6 * s for s in seconds]
    q1, median, q3 = statistics.quantiles(micros, n=4, method="inclusive")
    return {
        "median_us": median,
        "min_us": min(micros),
        "iqr_us": [q1, q3],
        "rounds_us": micros,
    }


def speedup(peer: list[float], own: list[float]) -> dict[str, Any]:
    """How many times as fast as a peer.

    Args:
        peer: seconds per call, by round.
        own: the same of the one whose speed is asked, in the same rounds.

    Returns:
        ``ratio`` of the medians; ``quartiles`` of the rounds' own ratios; ``ratio_of_minima``,
        which means more than the others on a machine that does something else at times.
    """
    ratios = [p / o for p, o in zip(peer, own, strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": statistics.median(peer) / statistics.median(own),
        "quartiles": [q1, q3],
        "ratio_of_minima": min(peer) / min(own),
    }


def against_best(
    seconds: dict[str, list[float]], own: str, ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Compare one contender with the fastest of the others.

    Args:
        seconds: what :func:`time_by_turns` returned.
        own: name of the one whose speed is asked.
        ignored: names of others that are not to be compared with.

    Returns:
        ``best_peer``, a name, and ``speedup`` against it; None where there is nothing to compare.
    """
    peers = {name: times for name, times in seconds.items() if name not in (own, *ignored)}
    best = min(peers, key=lambda name: statistics.median(peers[name]), default=None)
    compared = best is not None and own in seconds
    return {
        "best_peer": best,
        "speedup": speedup(peers[best], seconds[own]) if compared else None,
    }
