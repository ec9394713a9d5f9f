# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one file each, written whole or not at all; the newest few are kept."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from dit_sparse.distill.config import Config
    from dit_sparse.distill.update import Update

NAME = re.compile(r"iteration-(\d{8})\.safetensors")


def found(folder: Path) -> list[tuple[int, Path]]:
    """List checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    names = ((NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in names if match)


def save(folder: Path, config: Config, iteration: int, updates: Iterable[Update]) -> Path:
    """Write what is needed to go on after ``iteration`` updates; drop the oldest.

    Nothing random is kept, as nothing random has a state (``draw.py``).
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= update.state()
    path = folder / f"iteration-{iteration:08d}.safetensors"
    write_tensors(path, tensors, {"iteration": iteration, "config": config.digest()})
    for _, old in found(folder)[: -config.train.keep]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def resume(folder: Path, config: Config, updates: Iterable[Update]) -> int:
    """Load the newest checkpoint, and say after how many updates it was made; 0: there is none.

    Raises:
        DistillError: It was made with other settings, or cannot be read.
    """
    there = found(folder)
    if not there:
        return 0
    path = there[-1][1]
    tensors, notes = read_tensors(path)
    if notes.get("config") != config.digest():
        raise DistillError(
            f"{path}: was made with other settings; put them back (the output folder has them in "
            "config.json), or name another output"
        )
    for update in updates:
        update.load(tensors)
    return int(notes["iteration"])
