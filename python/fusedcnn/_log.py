"""The package's logger, and ``FUSEDCNN_LOG=debug``, which shows it.

With that in the environment, the operators print a line to stderr for each pass of each problem
that they meet for the first time: the kernel, and why not those before it. They print it
themselves, so that programs without Python do, too.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("fusedcnn")

_LEVELS = ("", "debug")

if (_level := os.environ.get("FUSEDCNN_LOG", "")) not in _LEVELS:
    raise ImportError(f"FUSEDCNN_LOG: expected 'debug' or nothing, got {_level!r}")
if _level:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("fusedcnn: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.DEBUG)
