# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_sparse.core.reading import refuse_controls
from dit_sparse.distill.errors import DistillError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write a safetensors file; what stood there before stays until the new one is whole.

    Args:
        path: Where.
        tensors: By name.
        notes: Plain data, kept in the file's head.

    Raises:
        DistillError: It cannot be written (a full disk); the old file is whole, no part is left.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A tensor that is a view of another cannot be written: each gets memory of its own.
        own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(own, scratch, {"notes": json.dumps(notes, allow_nan=False)})
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise DistillError(
            f"{path}: cannot be written: {what}; the previous content is unchanged. Free space "
            "and run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``write_tensors`` wrote: tensors by name, and the notes."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DistillError(f"{path}: cannot be read: {error}; delete it") from error
    return tensors, read_notes(path)


def read_notes(path: Path) -> dict[str, Any]:
    """Read the notes of a file that ``write_tensors`` wrote, and no tensor."""
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get("notes", "{}"))
        refuse_controls(notes)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DistillError(f"{path}: cannot be read: {error}; delete it") from error
    return notes if isinstance(notes, dict) else {}


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``place`` (a full disk) into one clear error."""
    try:
        yield
    except OSError as error:
        raise DistillError(
            f"{place}: cannot be written: {error.strerror or error}; the checkpoints are intact. "
            "Free space and run the same command again"
        ) from error
