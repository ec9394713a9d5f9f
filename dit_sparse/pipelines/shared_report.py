# SPDX-License-Identifier: Apache-2.0
"""Join what the processes that share a model's heads report of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch


def merged(report: Any, config: Any) -> Any:
    """Join the reports of all processes that share a transformer; all must call it together.

    Heads are put together. A call's density is the mean over its heads, and so is its recall; its
    time, and the memory held at most, are those of the process that had most.
    """
    group = config.context_parallel_config._ulysses_mesh.get_group()  # noqa: SLF001
    reports: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(reports, report, group)
    calls = zip(*(each.rows for each in reports), strict=True)
    return replace(
        report,
        rows=[_joined(rows) for rows in calls],
        state_bytes=max(each.state_bytes for each in reports),
        peak_state_bytes=max(each.peak_state_bytes for each in reports),
        guarantee=_kept([each.guarantee for each in reports]),
    )


def _joined(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Join what all processes say of one call."""
    heads = [sum(map(len, row["methods"].values())) for row in rows]
    if rows[0]["methods"] == rows[-1]["methods"]:  # not exchanged: each had all heads
        return rows[0]

    def mean(key: str) -> float | None:
        known = [(row[key], n) for row, n in zip(rows, heads, strict=True) if row[key] is not None]
        total = sum(n for _, n in known)
        return sum(value * n for value, n in known) / total if total else None

    methods: dict[str, list[int]] = {}
    for row in rows:
        for name, own in row["methods"].items():
            methods[name] = sorted([*methods.get(name, []), *own])
    return {
        **rows[0],
        "methods": methods,
        "kernels": sorted({name for row in rows for name in row["kernels"]}),
        "density": mean("density"),
        "recall": mean("recall"),
        "ms": max(row["ms"] for row in rows),
        "error": max((row["error"] for row in rows if row["error"] is not None), default=None),
        "returned": sorted(head for row in rows for head in row["returned"]),
    }


def _kept(each: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Join what became of a guarantee in each process."""
    known = [one for one in each if one is not None]
    if not known:
        return None
    worst = [one["worst_kept"] for one in known if one["worst_kept"] is not None]
    return {
        **known[0],
        "probes": sum(one["probes"] for one in known),
        "heads": sum(one["heads"] for one in known),
        "worst_kept": max(worst, default=None),
        "returned": [head for one in known for head in one["returned"]],
    }
