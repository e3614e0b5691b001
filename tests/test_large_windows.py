"""Pooling windows as large as the map cost what stock layers cost, in time and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
from checks import over, step
from geometries import Block

over_blocks = over([
    Block("image", (1, 32, 256, 256), 32, padding=1, pool=256),
    Block("few_channels", (2, 16, 128, 128), 4, padding=1, pool=128),
    Block("depthwise", (2, 32, 128, 128), 32, padding=1, groups=32, pool=128),
    Block("beyond_map", (1, 2, 6, 6), 3, padding=1, pool=600, pool_padding=300),
    Block("text_kernel", (8, 1, 400, 100), 100, kernel=(3, 100), pool=(398, 1)),
    Block("text_column", (16, 64, 600, 1), 64, (3, 1), padding=(1, 0), pool=(600, 1)),
    Block("overlapping", (1, 16, 96, 96), 16, padding=1, pool=32, pool_stride=2, pool_padding=16),
])  # fmt: skip

_GROWTH = """
import json, resource, sys, torch
from geometries import Block
from test_large_windows import prepare
torch.set_num_threads(1)
block = Block(**json.loads(sys.argv[1]))
for call in prepare(block._replace(input=(1, *block.input[1:2], 1, 1), pool=1, pool_padding=0,
                                   kernel=1, padding=0)):
    call()  # what either loads at its first call
call = prepare(block)[int(sys.argv[2])]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def prepare(block: Block) -> list:
    """Forward and backward of the stock layers and of the fused one, each ready to be called."""
    torch.manual_seed(0)
    operands = [torch.randn(s) for s in (block.input, block.weight, (block.out_channels,))]
    return [lambda: step(block.stock, operands), lambda: step(block.fused, operands)]


def _growth(block: Block, which: int) -> int:
    """Bytes by which one forward and backward makes a process larger at its largest."""
    arguments = [sys.executable, "-c", _GROWTH, json.dumps(block._asdict()), str(which)]
    run = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=300, cwd=sys.path[0]
    )
    return int(run.stdout) * 1024


@over_blocks
def test_memory(block):
    stock, fused = _growth(block, 0), _growth(block, 1)
    # Allocators round up, and libraries keep buffers: a few megabytes either way.
    assert fused <= 2 * stock + (8 << 20), f"{fused} bytes, stock layers {stock}"


@over_blocks
def test_time(block):
    """Within a factor that no noise reaches; a plane for every place of a window costs far more."""
    calls = prepare(block)
    best = [float("inf")] * 2
    for _ in range(4):
        for which, call in enumerate(calls):
            start = time.process_time()
            call()
            best[which] = min(best[which], time.process_time() - start)
    assert best[1] <= 4 * best[0] + 1e-3, f"{best[1]} s, stock layers {best[0]}"
