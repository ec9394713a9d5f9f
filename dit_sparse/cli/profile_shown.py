# SPDX-License-Identifier: Apache-2.0
"""What ``dit-sparse profile`` shows: bars while it measures, then who got what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.cli.console import ERR, OUT, styled

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress, TaskID

    from dit_sparse.profiler import Profile


def bars() -> Progress:
    """Make the bars, for people only."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=ERR,
    )


class Shown:
    """Feeds the bars: one for each kind of work."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of one kind of work."""
        if what not in self._tasks:
            label = what.replace("units", "generations")
            self._tasks[what] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)


def show(found: Profile, output: Path) -> None:
    """Print who got what, and what was measured."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("candidate", "heads x steps", "density", "error"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    total: dict[int, list[float]] = {}
    for key, chosen in found.choices.items():
        row = found.rows[key]
        for head, column in enumerate(chosen):
            part = total.setdefault(column, [0.0, 0.0, 0.0])
            part[0] += row.steps
            part[1] += row.steps * float(row.density[head, column])
            part[2] += row.steps * float(row.error[head, column])
    everything = sum(part[0] for part in total.values())
    for column, (count, density, error) in sorted(total.items(), key=lambda item: -item[1][0]):
        name = "dense" if column == 0 else found.candidates[column - 1].name
        table.add_row(
            name,
            f"{count / everything:.1%}",
            f"{density / count:.3f}",
            f"{(error / count) ** 0.5:.3f}",
        )
    OUT.print()
    OUT.print(table)
    OUT.print()
    for figure, value in found.strategy.receipt.measured.items():
        OUT.print(f"{figure.replace('_', ' ')}: {value:.4g}", highlight=False)
    if not found.strategy.rules:
        OUT.print(
            styled(
                ("Everything stays dense:", "yellow"),
                " no candidate meets the requested limits at a lower cost.",
            )
        )
    OUT.print(styled((str(output), "dim")), soft_wrap=True)
