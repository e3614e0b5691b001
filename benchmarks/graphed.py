"""A case's work recorded as CUDA graphs: the same kernels, launched at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import fusedcnn
import torch
from cases import Batch, make_optimizer
from torch import Tensor, nn

# Calls before a recording: what is initialised or chosen lazily (cuDNN's algorithms, Inductor's
# tuning) synchronises, which a graph cannot record. torch's own recipe takes three.
WARM_UP_CALLS = 3


def record_calls(
    call: Callable[[Batch], tuple], batches: list[Batch]
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Record a call on each batch; a graph reads its own batch's memory, so nothing is copied.

    Args:
        call: what :func:`cases.make_call` returned, without host synchronisation.
        batches: all of the same sizes.

    Returns:
        For each batch a function that replays its graph and returns the results, which live in
        memory that all graphs share: they are valid until another one of them replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call(batches[0])
    torch.cuda.current_stream().wait_stream(stream)
    replays: list[Callable[[], tuple[Tensor, ...]]] = []
    pool = None
    for batch in batches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            # Detached: the results' history would keep the graph's intermediates from being the
            # next graph's memory.
            results = tuple(result.detach() for result in call(batch))
        pool = pool or graph.pool()
        replays.append(_replay(graph, results))
    return replays


def _replay(
    graph: torch.cuda.CUDAGraph, results: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def record_training(
    module: nn.Module, own: nn.Module, batches: list[Batch]
) -> Callable[[Batch], tuple[Tensor]]:
    """Record a training step as :class:`fusedcnn.GraphedTrainStep`, whichever the model.

    Its calls copy the batch into the graph's memory, as in training: that is timed too.

    Args:
        module: see :func:`cases.make_call`.
        own: see there.
        batches: all of the same sizes.
    """
    optimizer = make_optimizer(own, capturable=True)
    step = fusedcnn.GraphedTrainStep(module, nn.CrossEntropyLoss(), optimizer)
    for batch in itertools.islice(itertools.cycle(batches), WARM_UP_CALLS + 1):
        step(*batch)
    return lambda batch: (step(*batch),)
