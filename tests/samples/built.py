# SPDX-License-Identifier: Apache-2.0
"""Where the small models are, and what holds of each folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from packaging.version import Version

MAX_BYTES = 15_000_000
SUFFIXES = {".json", ".safetensors", ".txt", ".md", ".png"}
SAMPLES = Path(__file__).parents[2] / "samples"
# Training makes its frozen text encoders from a seed; the shipped ones were drawn by 5.24, and 5.0
# to 5.3 draw other numbers from the same seed.
same_draw = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason=f"transformers {transformers.__version__} draws another text encoder from this seed",
)


def assert_small(folder: Path, weights: int) -> None:
    """Check that a folder is no larger than promised and holds data alone.

    Args:
        folder: Of the pipeline.
        weights: Files of weights in it.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= SUFFIXES
    assert len([path for path in files if path.suffix == ".safetensors"]) == weights
