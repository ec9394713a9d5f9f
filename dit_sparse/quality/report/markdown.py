# SPDX-License-Identifier: Apache-2.0
"""The same numbers as Markdown, for logs of continuous integration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.core.reading import visible
from dit_sparse.quality.report.charts import number
from dit_sparse.quality.report.comparison import shown

if TYPE_CHECKING:
    from dit_sparse.quality.comparison import Comparison


def comparison(found: Comparison) -> str:
    """Write one pair's numbers."""
    verdict = {True: "**PASS**", False: "**FAIL**", None: "No gates were set."}[found.passed]
    lines = ["# Quality of one pair", "", verdict, ""]
    lines += [f"- {escape(str(each))}" for each in found.verdicts]
    lines += [f"> {escape(note)}" for note in found.notes]
    told = {k: v for k, v in found.context.items() if isinstance(v, str | int | float)}
    lines += [f"- {escape(key)}: {escape(_plain(value))}" for key, value in told.items()]
    lines += ["", "| metric | value | median | worst (frame) | spread |", "|---|---|---|---|---|"]
    for row in found.rows.values():
        cells = shown(row)
        if row.reason is not None:
            lines.append(f"| {row.name} | {row.status}: {escape(row.reason)} | | | |")
            continue
        value = f"{cells['value']} {row.unit}".strip()
        lines.append(
            f"| {row.name} | {value} | {cells['median']} | {cells['worst']} | {cells['spread']} |"
        )
    lines += ["", f"dense: {escape(found.dense.name)} ({found.dense.kind})"]
    lines += [f"sparse: {escape(found.sparse.name)} ({found.sparse.kind})", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Keep a text from being read as Markdown or HTML, on one line."""
    line = visible(" ".join(text.split()))
    for mark in "\\`*_[]<>|#":
        line = line.replace(mark, f"\\{mark}")
    return line


def _plain(value: str | float) -> str:
    return number(value) if isinstance(value, float) else str(value)
