# SPDX-License-Identifier: Apache-2.0
"""Write text and strict JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    write_text(scratch, text)
    scratch.replace(path)


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
