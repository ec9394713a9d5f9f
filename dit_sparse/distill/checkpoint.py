# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one file each, written whole or not at all; the newest few are kept."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.files import read_notes, read_tensors, write_tensors
from dit_sparse.strategy.identity import changed, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from dit_sparse.distill.update import Update

NAME = re.compile(r"iteration-(\d{8})\.safetensors")


def found(folder: Path) -> list[tuple[int, Path]]:
    """List checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    names = ((NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in names if match)


def save(
    folder: Path, inputs: Mapping[str, Any], iteration: int, updates: Iterable[Update], keep: int
) -> Path:
    """Write what is needed to continue after ``iteration`` updates; keep the newest ``keep``.

    Nothing random is kept, as nothing random has a state (``draw.py``).
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= update.state()
    path = folder / f"iteration-{iteration:08d}.safetensors"
    write_tensors(path, tensors, {"iteration": iteration, "inputs": plain(inputs)})
    for _, old in found(folder)[:-keep]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def verify(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Check that the newest checkpoint, if there is one, was made with these inputs.

    Raises:
        DistillError: It was made with others (names them), or cannot be read.
    """
    there = found(folder)
    if not there:
        return
    path = there[-1][1]
    recorded = read_notes(path).get("inputs")
    if (why := changed(recorded, inputs, "checkpoints")) is not None:
        raise DistillError(f"{path}: {why}")


def drop(folder: Path) -> None:
    """Delete all checkpoints.

    Raises:
        DistillError: One cannot be deleted.
    """
    try:
        for _, path in found(folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DistillError(f"{folder}: cannot be cleared: {error.strerror or error}") from error


def resume(folder: Path, inputs: Mapping[str, Any], updates: Iterable[Update]) -> int:
    """Load the newest checkpoint, and say after how many updates it was made; 0: there is none.

    Raises:
        DistillError: It was made with other inputs, or cannot be read.
    """
    there = found(folder)
    if not there:
        return 0
    verify(folder, inputs)
    path = there[-1][1]
    tensors, notes = read_tensors(path)
    try:
        for update in updates:
            update.load(tensors)
        return int(notes["iteration"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DistillError(
            f"{path}: is damaged ({type(error).__name__}: {error}); delete it to continue from "
            "the previous checkpoint"
        ) from error
