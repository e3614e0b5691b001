"""PEP 517 backend: scikit-build-core, plus torch as a build requirement only when it is missing.

Compiling needs torch's headers. Listing torch in ``build-system.requires`` would make every
isolated build download a second torch (gigabytes of CUDA wheels) to read them, so this backend
looks first in the environment that the package is being installed into: pip's build isolation
hides that environment's packages from ``sys.path``, but ``sysconfig`` still knows where they are.
See ``torch_location.py``.
"""

from __future__ import annotations

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from torch_location import torch_dir

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _torch_requirement() -> list[str]:
    return [] if torch_dir() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Build requirements of a wheel, torch among them when the environment has none."""
    return [*_backend.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """Build requirements of an editable install, as for a wheel."""
    return [*_backend.get_requires_for_build_editable(config_settings), *_torch_requirement()]
