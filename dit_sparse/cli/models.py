# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse methods --models``: which transformer classes are served, why others are not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from dit_sparse.cli.console import OUT, UserError, styled

if TYPE_CHECKING:
    from dit_sparse.pipelines.table import Row

DETAILED = 8  # of so many classes at most, all is printed


def show_models(name: str | None, *, as_json: bool) -> None:
    """Print the table of models.

    Args:
        name: Only classes and pipelines with this in their name, in any case; None: all.
        as_json: As JSON, one object a class.
    """
    from dit_sparse.pipelines.table import rows

    found = [row for row in rows() if name is None or _has(row, name.lower())]
    if not found:
        raise UserError(
            f"no known transformer class or pipeline has {name!r} in its name; to list all: "
            "dit-sparse methods --models"
        )
    if as_json:
        listed = [{**asdict(row), "served": row.served} for row in found]
        typer.echo(json.dumps({"models": listed}, indent=2))
        return
    _print(found)


def _has(row: Row, part: str) -> bool:
    return any(part in each.lower() for each in (row.class_name, *row.pipelines))


def _print(found: list[Row]) -> None:
    served = [row for row in found if row.served]
    if served:
        OUT.print(styled(("supported", "bold"), "  tested at tiny size with random weights"))
        if len(served) > DETAILED:
            _overview(served)
        else:
            _details(served)
    if len(served) < len(found):
        OUT.print(styled(("declined", "bold")))
        for row in found:
            if not row.served:
                OUT.print(f"  {row.class_name}: {row.reason}", highlight=False)


def _overview(served: list[Row]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for title in ("class", "text", "tested with; what stays dense"):
        table.add_column(title, no_wrap=title == "class")
    for row in served:
        table.add_row(row.class_name, row.text, _tried(row))
    OUT.print(table)
    OUT.print("Details of one class: dit-sparse methods NAME --models\n")


def _details(served: list[Row]) -> None:
    for row in served:
        OUT.print(styled("  ", (row.class_name, "bold")))
        table = Table(box=None, padding=(0, 2, 0, 4), show_header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for title, text in (
            ("pipelines", ", ".join(row.pipelines) or "modular"),
            ("attention", row.layers),
            ("text", row.text),
            ("grid from", row.grid),
            ("forecast at", row.forecast),
            ("tested with", _tried(row)),
        ):
            table.add_row(title, text)
        OUT.print(table)
    OUT.print()


def _tried(row: Row) -> str:
    return f"{row.tested}; {row.note}" if row.note else row.tested
