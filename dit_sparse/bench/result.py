# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: frozen records, JSON, and tables for a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from dit_sparse.bench.shapes import Shape


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel on one plan.

    Args:
        shape: Size of the call.
        dtype: Of query, key and value.
        block_size: Tokens in a query block and in a key block.
        pattern: How kept blocks were chosen.
        density: Kept share of (query, key) pairs.
        threads: CPU threads.
        clock: "thread" (processor time of the one thread) or "wall".
        kernel: Which kernel of ours answered.
        dense_kernel: Which of torch's was fastest for the dense call.
        dense_ms: Median time of the dense call.
        sparse_ms: Median time of the sparse call.
        fault: Why there are no times: the result was wrong, or nothing could run.
    """

    shape: Shape
    dtype: str
    block_size: int
    pattern: str
    density: float
    threads: int
    clock: str
    kernel: str | None = None
    dense_kernel: str | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None
    fault: str | None = None

    @property
    def efficiency(self) -> float | None:
        """Dense time x density / sparse time."""
        if self.dense_ms is None or self.sparse_ms is None:
            return None
        return self.dense_ms * self.density / self.sparse_ms

    @property
    def speedup(self) -> float | None:
        """Dense time / sparse time."""
        if self.dense_ms is None or self.sparse_ms is None:
            return None
        return self.dense_ms / self.sparse_ms

    def cells(self) -> list[str]:
        """One row of the table."""
        cells = [self.shape.name, self.dtype, str(self.block_size), self.pattern]
        cells += [self.kernel or "-", str(self.threads), f"{self.density:.1%}"]
        if self.dense_ms is None or self.sparse_ms is None:
            return [*cells, f"no time: {self.fault}", "", "", ""]
        cells += [f"{self.dense_ms:.1f}", f"{self.sparse_ms:.1f}"]
        return [*cells, f"{self.speedup:.2f} x", f"{self.efficiency:.2f}"]


COLUMNS = ("shape", "dtype", "block", "pattern", "kernel", "threads", "density", "dense ms",
           "sparse ms", "speed-up", "efficiency")  # fmt: skip


@dataclass(frozen=True, slots=True)
class MethodMeasurement:
    """One method over the calls of one layer in a whole generation.

    Args:
        method: Its name.
        params: What differs from its defaults.
        shape: Size of each call.
        dtype: Of query, key and value.
        threads: CPU threads.
        clock: "thread" or "wall".
        num_steps: Calls in the generation.
        sparse_steps: How many of them were sparse; the others are dense, or search densely.
        density: Mean kept share of (query, key) pairs over the sparse ones.
        build_ms: Once per geometry for all layers: tables and static plans.
        planning_ms: Mean per call: plan, and what follows the attention.
        worst_planning_ms: The dearest call's.
        attend_ms: Mean sparse attention of the first and the last sparse call, ordering included.
        dense_ms: Dense attention.
        state_mib: Most that the method remembered for this layer.
        kernel: Which kernel answered.
        dense_kernel: Which of torch's was fastest for the dense call.
    """

    method: str
    params: dict[str, Any]
    shape: Shape
    dtype: str
    threads: int
    clock: str
    num_steps: int
    sparse_steps: int
    density: float
    build_ms: float
    planning_ms: float
    worst_planning_ms: float
    attend_ms: float
    dense_ms: float
    state_mib: float
    kernel: str | None
    dense_kernel: str

    @property
    def planning_share(self) -> float:
        """Planning over dense attention, per call."""
        return self.planning_ms / self.dense_ms

    @property
    def efficiency(self) -> float:
        """Dense time x density / sparse time, planning and ordering included."""
        return self.dense_ms * self.density / (self.attend_ms + self.planning_ms)

    @property
    def speedup(self) -> float:
        """Dense time / sparse time, planning and ordering included."""
        return self.dense_ms / (self.attend_ms + self.planning_ms)

    def cells(self) -> list[str]:
        """One row of the table."""
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return [
            f"{self.method} ({params})" if params else self.method,
            self.shape.name,
            str(self.threads),
            f"{self.density:.1%}",
            f"{self.dense_ms:.1f}",
            f"{self.attend_ms:.1f}",
            f"{self.planning_ms:.2f}",
            f"{self.planning_share:.1%}",
            f"{self.build_ms:.0f}",
            f"{self.state_mib:.1f}",
            f"{self.speedup:.2f} x",
            f"{self.efficiency:.2f}",
        ]


METHOD_COLUMNS = ("method", "shape", "threads", "density", "dense ms", "attend ms", "planning ms",
                  "of dense", "build ms", "state MiB", "speed-up", "efficiency")  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Most memory that one sparse CPU call took beyond query, key, value and output."""

    kernel: str
    tokens: int
    heads: int
    head_dim: int
    density: float
    threads: int
    extra_mib: float

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.kernel}, {self.tokens} tokens, {self.heads} heads, head_dim {self.head_dim}, "
            f"density {self.density:.0%}, {self.threads} threads: {self.extra_mib:.1f} MiB beyond "
            "query, key, value and output"
        )


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All measurements of one run, with what they depend on.

    Args:
        device: "cpu" or "cuda".
        environment: Versions and devices.
        commit: Of this package's checkout.
        command: What the user typed.
        repeats: Timed rounds.
        measurements: Kernels on given plans.
        methods: Methods with their planning.
        peak_memory: Of one CPU call.
        against: Dense backends that could not run, and why.
    """

    device: str
    environment: dict[str, Any]
    commit: str | None
    command: str
    repeats: int
    measurements: tuple[Measurement, ...] = ()
    methods: tuple[MethodMeasurement, ...] = ()
    peak_memory: PeakMemory | None = None
    against: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for JSON, the derived ratios included."""
        plain = asdict(self)
        for told, found in zip(plain["measurements"], self.measurements, strict=True):
            told["efficiency"], told["speedup"] = found.efficiency, found.speedup
        for told, method in zip(plain["methods"], self.methods, strict=True):
            told["planning_share"] = method.planning_share
            told["efficiency"], told["speedup"] = method.efficiency, method.speedup
        return plain

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def table(self) -> Table:
        """Lay the measurements out for a terminal."""
        from rich.table import Table

        columns = METHOD_COLUMNS if self.methods else COLUMNS
        title = "methods, including planning and ordering," if self.methods else "sparse"
        table = Table(title=f"{title} against dense attention on {self.device}")
        words = {"shape", "dtype", "block", "pattern", "kernel", "method"}
        for name in columns:
            table.add_column(name, justify="left" if name in words else "right")
        for row in self.methods or self.measurements:
            table.add_row(*row.cells())
        notes = [f"{name} cannot run: {why}" for name, why in self.against.items()]
        if self.peak_memory is not None:
            notes.append(str(self.peak_memory))
        table.caption = "\n".join(notes) or None
        return table
