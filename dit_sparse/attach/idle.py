# SPDX-License-Identifier: Apache-2.0
"""Notice a run on which sparse attention had no effect: all dense, or with every block kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dit_sparse.attach.report import CallRecord
    from dit_sparse.attach.run import Run
    from dit_sparse.strategy import Strategy


def remarks(run: Run, strategy: Strategy, *, over: bool) -> Iterable[str]:
    """Name what had no effect on a run; reads the densities that are still on the device.

    Args:
        run: As far as it went.
        strategy: What it ran.
        over: Its last step has run. Before that, what is still dense may become sparse.
    """
    if all(rule.method == "dense" for rule in strategy.rules):
        return
    records = run.records
    planned = {part.method for record in records for part in record.parts} - {"dense"}
    if not planned:
        if records and all(record.reason for record in records):
            yield f"had no effect, because every attention call was dense: {records[0].reason}"
        elif over and records:
            yield (
                "had no effect, because its schedule and rules make every attention call of "
                f"this run ({run.num_steps} steps) dense; reduce dense_warmup_steps or "
                "dense_last_steps"
            )
        return
    for method in sorted(planned) if over else ():
        if not any(_dropped(record, method) for record in records):
            yield (
                f"had no effect, because {method} keeps every block pair on this grid "
                f"({run.grid} tokens); change its params, or generate a larger video or image"
            )


def _dropped(record: CallRecord, method: str) -> bool:
    return any(
        float(part.density if isinstance(part.density, float | int) else part.density.min()) < 1
        for part in record.parts
        if part.method == method
    )
