# SPDX-License-Identifier: Apache-2.0
"""Where a family's sample pipeline is: the shipped folder, or one built without training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

MAX_BYTES = 15_000_000
SUFFIXES = {".json", ".safetensors", ".txt", ".md", ".png"}
SAMPLES = Path(__file__).parents[2] / "samples"


def folder_of(family: str, factory: pytest.TempPathFactory) -> Path:
    """Give the folder; untrained weights prove what shapes, sizes and equality need, no more."""
    shipped = SAMPLES / f"{family}-tiny"
    if shipped.is_dir():
        return shipped
    made = factory.mktemp(family) / "pipeline"
    script = SAMPLES / "train" / "build_pipeline.py"
    command = [sys.executable, str(script), family, str(made.parent), str(made)]
    subprocess.run([*command, "--allow-untrained"], check=True, capture_output=True)
    _wake(made)
    return made


def _wake(folder: Path) -> None:
    """Draw the weights that start at zero: with them a transformer answers nothing at all."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    for param in pipe.transformer.parameters():
        if not param.detach().any():
            param.data.normal_(std=0.2, generator=random)
    pipe.transformer.half().save_pretrained(folder / "transformer")


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
