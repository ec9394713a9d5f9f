# SPDX-License-Identifier: Apache-2.0
"""Where a family's sample pipeline is: the shipped folder, or one built without training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

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
