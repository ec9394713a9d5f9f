# SPDX-License-Identifier: Apache-2.0
"""Write text and strict JSON; say in one line where nothing can be written."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the system's refusal to write below ``place`` (a full disk) into one clear error."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).removeprefix(f"{place}: ")
        raise QualityInputError(
            f"{place}: cannot be written: {reason}; earlier results are complete. Free space or "
            "choose another output, then run the same command again"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write whole or not at all.

    Raises:
        QualityInputError: The disk is full, or the folder cannot be written.
    """
    scratch = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            write_text(scratch, text)
            scratch.replace(path)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON: a number that is not finite becomes null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with Unix line ends."""
    path.write_text(text, encoding="utf-8", newline="\n", errors="replace")


def plain(value: Any) -> Any:
    """Make a value fit for strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
