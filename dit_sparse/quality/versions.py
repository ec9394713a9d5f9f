# SPDX-License-Identifier: Apache-2.0
"""Name the versions that numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from dit_sparse._version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "imageio-ffmpeg")


def versions() -> dict[str, str | None]:
    """Give versions by name; None where a package is not installed. Imports none of them."""
    found = {name: _version(name) for name in PACKAGES}
    return {"dit_sparse": __version__, "python": platform.python_version(), **found}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
