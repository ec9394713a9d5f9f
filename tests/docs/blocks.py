# SPDX-License-Identifier: Apache-2.0
"""The code blocks of Markdown pages: fenced ones by language, indented ones by their words."""

from __future__ import annotations

import re
from typing import NamedTuple

NOT_RUN = re.compile(r"# Not run: \S.{10,}")
COMMANDS = {"dit-sparse", "make", "pip", "python", "accelerate", "torchrun", "git", "cp"}


class Block(NamedTuple):
    """One block: where it is, what it is written in, its text, and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """List the code blocks of a page."""
    found: list[Block] = []
    lines = text.splitlines()
    i = 0
    before_is_text = False
    while i < len(lines):
        fence = re.match(r"(`{3,}|~{3,})\s*(\w*)", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(fence[1]))
            language = {"sh": "shell", "bash": "shell", "console": "shell"}.get(fence[2], fence[2])
            found.append(_block(page, i + 2, language or "text", lines[i + 1 : end]))
            i, before_is_text = end + 1, False
        elif lines[i].startswith("    ") and not before_is_text:
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found += _indented(page, i + 1, [line[4:] for line in lines[i:end]])
            i = end
        else:
            listed = re.match(r"\s*([-*]|\d+\.|:::)\s", lines[i])
            before_is_text = bool(lines[i].strip()) or (before_is_text and not lines[i].strip())
            if not lines[i].strip() and not _in_list(lines, i):
                before_is_text = False
            elif listed:
                before_is_text = True
            i += 1
    return found


def _in_list(lines: list[str], i: int) -> bool:
    """Say whether the paragraph before line ``i`` is an item of a list, which goes on indented."""
    while i > 0 and not lines[i].strip():
        i -= 1
    while i > 0 and lines[i - 1].strip():
        i -= 1
    return bool(re.match(r"\s*([-*]|\d+\.|:::)\s", lines[i]))


def _block(page: str, line: int, language: str, lines: list[str]) -> Block:
    first = lines[0].strip() if lines else ""
    reason = first if NOT_RUN.fullmatch(first) else None
    return Block(page, line, language, "\n".join(lines), reason)


def _indented(page: str, line: int, lines: list[str]) -> list[Block]:
    """Cut an indented block at empty lines where shell and Python meet."""
    pieces: list[Block] = []
    start = 0
    for end in range(len(lines) + 1):
        if end < len(lines) and lines[end].strip():
            continue
        piece = lines[start:end]
        if piece:
            words = piece[0].split()
            shell = words[0] in COMMANDS or bool(re.match(r'[A-Z]+="', piece[0]))
            language = "shell" if shell else "python"
            last = pieces[-1] if pieces else None
            if last is not None and last.language == language == "python":
                joined = [*last.text.splitlines(), "", *piece]
                pieces[-1] = _block(page, last.line, language, joined)
            else:
                pieces.append(_block(page, line + start, language, piece))
        start = end + 1
    return pieces
