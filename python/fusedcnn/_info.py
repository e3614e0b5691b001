"""What was built, what runs, and how exact that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusedcnn import _C, _cuda, _first_use, _stock


def build_info() -> dict[str, Any]:
    """What was built, what was selected on this machine, and why not the rest.

    Returns:
        A dict of plain values: ``version``; ``compiler``; ``library`` (path of the operator
        library, for ``torch.ops.load_library`` or a C++ program); ``torch`` (the running version);
        ``isas`` (each with ``name``, ``supported`` by this machine, ``selected`` and ``reason``;
        ``base``: of a feature, the ISA whose kernels serve what its own do not cover, else None);
        ``kernels`` (in order of preference, each with ``isa``, ``pass``, ``name``, ``supported``,
        ``exact`` and ``error``); ``winograd`` (whether Winograd kernels may be chosen);
        ``cuda`` (whether the CUDA kernels were ``built`` and are ``loaded``, the ``reason`` why
        not; where loaded, ``toolkit``, ``architectures``, those that are ``measured``: on which all
        kernels have been tested, and ``kernels``; ``devices``: those that blocks have been used on
        in this process, each with ``state``, "checked on ..." or "not checked: ...", the kernels
        that have ``failed`` or were ``skipped``, and why the ``stock`` layers compute there);
        ``devices`` (what computes the block on each device type); ``stock_calls`` (calls of this
        process that the stock layers computed, by reason).
    """
    return {
        "version": _C.version,
        "compiler": _C.compiler,
        "library": str(Path(_C.__file__).with_name("libfusedcnn.so")),
        "torch": torch.__version__,
        "isas": _C.isas(),
        "kernels": _C.kernels(),
        "winograd": _C.winograd_allowed(),
        "cuda": {**_cuda.info(), "devices": _first_use.report()},
        "devices": {
            "cpu": "fused kernels",
            "cuda": f"stock layers: {_cuda.reason}" if _cuda.reason else "fused kernels",
            "others": "stock layers: fusedcnn has no kernels for them in this version",
        },
        "stock_calls": dict(_stock.calls),
    }
