# SPDX-License-Identifier: Apache-2.0
"""What ran: one record per attention call, and the report made of them."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attach.head_groups import head_index

MOST_TOLD = 5  # heads that a summary names; a report has them all


class Stopwatch:
    """Times one call: the clock on the CPU, events (no sync until read) on a GPU."""

    __slots__ = ("_end", "_start")

    def __init__(self, device: torch.device) -> None:
        """Start."""
        if device.type == "cuda":
            self._start: Any = torch.cuda.Event(enable_timing=True)
            self._end: Any = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start, self._end = time.perf_counter(), None

    def stop(self) -> None:
        """Stop."""
        if isinstance(self._start, float):
            self._end = time.perf_counter()
        else:
            self._end.record()

    def milliseconds(self) -> float:
        """Read; on a GPU this waits for the call."""
        if isinstance(self._start, float):
            return float((self._end - self._start) * 1e3)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


class Others:
    """Counts the calls of other pipelines on a shared transformer; they stay as they are."""

    def __init__(self) -> None:
        """None yet."""
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # each may run in a thread of its own

    def add(self, reason: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[reason] += 1

    def as_dict(self) -> dict[str, int]:
        """Calls by reason."""
        with self._lock:
            return dict(self._counts)


@dataclass(slots=True)
class Part:
    """What some heads of one call did; tensors stay on the device until a report is made."""

    method: str
    heads: tuple[int, ...]
    kernel: str
    density: Tensor | float = 1.0
    recall: Tensor | None = None

    def without(self, heads: tuple[int, ...]) -> Part:
        """Take heads out of it."""
        stay = [i for i, head in enumerate(self.heads) if head not in heads]

        def own(value: Any) -> Any:
            each = isinstance(value, Tensor) and value.shape == (len(self.heads),)
            if not (each and stay):
                return value
            return value[head_index(tuple(stay), value.device)]

        kept = tuple(self.heads[i] for i in stay)
        return Part(self.method, kept, self.kernel, own(self.density), own(self.recall))


@dataclass(slots=True)
class CallRecord:
    """One attention call.

    ``reason`` says why it was dense although a rule named a method. ``error`` is the largest
    error seen where heads were probed for a guarantee, ``returned`` the heads that are dense for
    its sake.
    """

    stage: str
    layer: int
    step: int
    branch: str
    parts: list[Part]
    watch: Stopwatch
    reason: str | None = None
    error: float | None = None
    returned: tuple[int, ...] = ()

    def take_back(self, heads: tuple[int, ...], kernel: str) -> None:
        """Write down that heads were computed anew, dense."""
        self.parts = [part.without(heads) for part in self.parts]
        self.parts = [part for part in self.parts if part.heads]
        self.parts.append(Part("dense", heads, kernel))
        self.returned += heads

    def row(self) -> dict[str, Any]:
        """Flatten to numbers and names."""
        total = sum(len(part.heads) for part in self.parts)
        density = sum(_mean(part.density) * len(part.heads) for part in self.parts) / total
        probed = [part for part in self.parts if part.recall is not None]
        heads = sum(len(part.heads) for part in probed)
        recall = (
            sum(_mean(part.recall) * len(part.heads) for part in probed) / heads
            if probed
            else None
        )
        methods: dict[str, list[int]] = {}
        for part in self.parts:  # rules may name one method with several params
            methods[part.method] = sorted([*methods.get(part.method, []), *part.heads])
        return {
            "stage": self.stage,
            "layer": self.layer,
            "step": self.step,
            "branch": self.branch,
            "methods": methods,
            "kernels": sorted({part.kernel for part in self.parts}),
            "density": density,
            "recall": recall,
            "ms": self.watch.milliseconds(),
            "reason": self.reason,
            "error": self.error if self.error is None or isfinite(self.error) else None,
            "returned": sorted(self.returned),
        }


def _mean(value: Tensor | float | None) -> float:
    return float(value.cpu().double().mean()) if isinstance(value, Tensor) else float(value or 0.0)


@dataclass(frozen=True)
class Report:
    """What one generation did (the newest one, as far as it went).

    Args:
        strategy: Name of the strategy.
        grid: The latents grid, or an empty text before the first call.
        num_steps: Steps of the generation.
        rows: One entry per attention call: stage, layer, step, branch, methods (with their
            heads), kernels, density, recall, ms, reason; with a guarantee the largest error
            probed (None: none was, or not finite) and the heads returned to dense.
        state_bytes: Memory held for masks, LSEs, centroids when the report was made.
        peak_state_bytes: The most that was held at once during the generation.
        attached_at: Step at which sparse attention was enabled, where that was mid-generation.
        guarantee: What became of the guarantee, where there is one: limit, where it is from, rows
            and every of a probe, probes made, heads watched (each layer and branch by itself),
            the largest error of a probe that held, and the heads returned to dense.
        others: Calls that other pipelines made of the same transformer since sparse attention was
            enabled, by the reason why they were left alone. They are in none of the figures.
        native_missing: Why the native CPU kernel could not run, and what to do; empty where it
            ran, another kernel was asked for, or the device is not a CPU.
    """

    strategy: str
    grid: str
    num_steps: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    state_bytes: int = 0
    peak_state_bytes: int = 0
    attached_at: int | None = None
    guarantee: dict[str, Any] | None = None
    others: dict[str, int] = field(default_factory=dict)
    native_missing: str = ""

    @property
    def density(self) -> float | None:
        """Mean density over all attention calls, dense ones counted as 1."""
        return _average(self.rows, "density")

    @property
    def sparse_rows(self) -> list[dict[str, Any]]:
        """The calls that dropped something (a search step that keeps all is dense)."""
        return [row for row in self.rows if row["density"] < 1]

    @property
    def recall(self) -> float | None:
        """Mean recall over the probed rows of sparse calls; None where nothing was probed."""
        return _average(self.sparse_rows, "recall")

    @property
    def worst_recall(self) -> float | None:
        """The lowest recall of any probed call."""
        probed = [row["recall"] for row in self.sparse_rows if row["recall"] is not None]
        return min(probed, default=None)

    @property
    def attention_ms(self) -> float:
        """Time in self-attention, all calls together, milliseconds."""
        return float(sum(row["ms"] for row in self.rows))

    @property
    def kernels(self) -> dict[str, int]:
        """Calls per kernel."""
        return dict(Counter(name for row in self.rows for name in row["kernels"]))

    @property
    def reasons(self) -> dict[str, int]:
        """Calls that were dense against the strategy's word, by reason."""
        return dict(Counter(row["reason"] for row in self.rows if row["reason"]))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        totals = {
            "density": self.density,
            "recall": self.recall,
            "worst_recall": self.worst_recall,
            "attention_ms": self.attention_ms,
            "kernels": self.kernels,
            "reasons": self.reasons,
            "calls": len(self.rows),
            "sparse_calls": len(self.sparse_rows),
        }
        return {**totals, **asdict(self)}

    def summary(self) -> str:
        """Say in a few lines what ran."""
        others = [f"  not replaced x {count}: {why}" for why, count in self.others.items()]
        if not self.rows:
            return "\n".join(
                [f"sparse attention {self.strategy!r}: no generation has run yet", *others]
            )
        sparse = self.sparse_rows
        grid = f" on {self.grid} tokens" if self.grid else ""
        lines = [
            f"sparse attention {self.strategy!r}{grid}, {self.num_steps} steps",
            f"  {len(sparse)} of {len(self.rows)} attention calls sparse; density "
            f"{self.density:.3f} over all, "
            + (f"{_average(sparse, 'density'):.3f} over those" if sparse else "none sparse"),
            f"  {self.attention_ms:.0f} ms in self-attention, kernels: "
            + ", ".join(f"{name} x {count}" for name, count in sorted(self.kernels.items())),
        ]
        if not sparse and not self.reasons:
            lines.append("  the strategy keeps every call of this run dense")
        if self.recall is not None:
            lines.append(
                f"  recall on probed rows {self.recall:.3f}, worst call {self.worst_recall:.3f}"
            )
        lines.append(
            f"  state held now {_size(self.state_bytes)}, at most {_size(self.peak_state_bytes)}"
        )
        if self.native_missing:
            lines.append(f"  the native CPU kernel was not used: {self.native_missing}")
        if self.guarantee is not None:
            lines += _told(self.guarantee)
        if self.attached_at is not None:
            lines.append(f"  enabled during a generation, active from step {self.attached_at}")
        lines += [f"  stayed dense x {count}: {why}" for why, count in self.reasons.items()]
        return "\n".join(lines + others)

    def __str__(self) -> str:
        """Give the summary and a table by layer."""
        if not self.rows:
            return self.summary()
        layers: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows:
            layers[row["stage"], row["layer"]].append(row)
        lines = [self.summary(), "  layer  calls  sparse  density  recall      ms  methods"]
        for (stage, layer), rows in sorted(layers.items()):
            sparse = [row for row in rows if row["density"] < 1]
            recall = _average(rows, "recall")
            names = sorted({name for row in rows for name in row["methods"]})
            prefix = "2:" if stage.endswith("_2") else ""
            lines.append(
                f"  {prefix + str(layer):>5}  {len(rows):>5}  {len(sparse):>6}  "
                f"{_average(rows, 'density'):>7.3f}  "
                + (f"{recall:>6.3f}" if recall is not None else "     -")
                + f"  {sum(row['ms'] for row in rows):>6.0f}  {', '.join(names)}"
            )
        return "\n".join(lines)


def _told(guarantee: dict[str, Any]) -> list[str]:
    """Say what became of a guarantee: one line, and one for each of the first heads returned."""
    limit, probes = f"  guarantee {guarantee['limit']:.3g}", guarantee["probes"]
    returned, worst = guarantee["returned"], guarantee["worst_kept"]
    how = f"{probes} probes of {guarantee['rows']} rows"
    if not probes:
        return [f"{limit}: no sparse calls, no probes"]
    if not returned:
        return [f"{limit} held: {how}, largest error {worst:.3g}"]
    others = (
        "all probes exceeded it" if worst is None else f"largest error of the others {worst:.3g}"
    )
    lines = [
        f"{limit}: {len(returned)} of {guarantee['heads']} heads went back to dense; {how}, "
        + others
    ]
    for each in returned[:MOST_TOLD]:
        error = (
            "not finite"
            if each["error"] is None
            else f"{each['error']:.3g} +- {each['spread'] or 0:.2g}"
        )
        prefix = "2:" if each["stage"].endswith("_2") else ""
        lines.append(
            f"    layer {prefix}{each['layer']} head {each['head']} ({each['branch']}), "
            f"{each['method']}, from step {each['step']}: error {error}"
        )
    if len(returned) > MOST_TOLD:
        lines.append(f"    ... and {len(returned) - MOST_TOLD} more")
    return lines


def _average(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"
