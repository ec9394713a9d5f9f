# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: INP001  (scripts of the documentation, no package)
"""Markdown from data: tables, numbers, and docstrings as people read them."""

from __future__ import annotations

import re
from html import escape
from textwrap import dedent
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table; a bar inside a cell would end it, so it is written as an entity."""
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "&#124;").replace("\n", " ") for cell in line) + " |\n"
        for line in lines
    )


def code(text: str) -> str:
    """Write code for a table's cell, in which a bar stays a bar."""
    return f"<code>{escape(text, quote=False)}</code>"


def size(count: float) -> str:
    """Write a number of bytes, in powers of 1000; nothing for none."""
    if not count:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def prose(docstring: str | None) -> str:
    """Give a docstring's text without its sections (Args, Returns, Raises), as Markdown."""
    text = dedent(f"    {docstring or ''}").strip()
    text = re.split(r"\n\s*(?:Args|Returns|Raises):\n", text)[0].strip()
    return markdown(dedent(text))


def markdown(text: str) -> str:
    """Turn ``code`` into `code`, and arXiv numbers into links."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"\b(?:arXiv:)?(\d{4}\.\d{5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def environment(found: dict[str, Any]) -> str:
    """Say in one line where figures were made."""
    packages = found.get("packages") or found.get("versions") or {}
    parts = [str(found[key]) for key in ("processor", "device") if found.get(key)] or [
        "device not written down"
    ]
    parts += [f"{name} {packages[name]}" for name in ("torch", "diffusers") if name in packages]
    return ", ".join(parts)
