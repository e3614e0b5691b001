"""README and project URLs of a release, whose repository's address FUSEDCNN_REPOSITORY gives.

PyPI resolves no relative links. With an address such as ``https://example.org/owner/fusedcnn`` the
README's become links into the repository at this version's tag; without one they stay as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)")  # an image's begins with "!"


def dynamic_metadata(_settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``readme`` and ``urls``; scikit-build-core asks for them at every build."""
    text = Path("README.md").read_text(encoding="utf-8")
    urls = {}
    if address := os.environ.get("FUSEDCNN_REPOSITORY", "").rstrip("/"):
        urls["Repository"] = address
        text = _RELATIVE_LINK.sub(
            lambda link: (
                f"{link[0]}{address}/{'raw' if link[1] else 'blob'}/v{project['version']}/"
            ),
            text,
        )
    return {"readme": {"content-type": "text/markdown", "text": text}, "urls": urls}


def dynamic_wheel(_settings: Mapping[str, Any]) -> dict[str, bool]:
    """A wheel built from a source distribution may have another address, or none."""
    return {"readme": True, "urls": True}
