# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark over its grid of configurations."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.bench.attention import PATTERNS, Pattern, measure_kernels
from dit_sparse.bench.memory import measure_peak_memory
from dit_sparse.bench.methods import measure_method
from dit_sparse.bench.result import BenchReport, Measurement, MethodMeasurement
from dit_sparse.bench.shapes import CPU_SHAPES, METHOD_SHAPES, MODEL_SHAPES, Shape
from dit_sparse.core.machine import environment
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS, method_class

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def run_bench(
    device: str = "cpu",
    *,
    shapes: Sequence[Shape] | None = None,
    block_sizes: Sequence[int] = (64, 128),
    densities: Sequence[float] | None = None,
    patterns: Sequence[Pattern] = PATTERNS,
    dtypes: Sequence[torch.dtype] | None = None,
    threads: Sequence[int] | None = None,
    repeats: int = 5,
    kernels: Sequence[str] | None = None,
    memory: bool = True,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time dense and sparse attention in alternation.

    Args:
        device: "cpu" or "cuda".
        shapes: Sizes; where None one of 2k and two of 8k tokens on the CPU, the models' own on a
            GPU.
        block_sizes: Tokens in a block, of queries and of keys.
        densities: Kept share of the key blocks; where None 60, 25, 12.5 % on the CPU and 50, 25,
            10 % on a GPU.
        patterns: "random": blocks anywhere, the hardest; "local": the nearest ones.
        dtypes: fp32 on the CPU, bf16 on a GPU where None.
        threads: CPU threads to try; one and all where None.
        repeats: Timed rounds, after one that is not timed.
        kernels: Names of our kernels; where None the first that can run on the CPU, all that can
            on a GPU (but not the reference).
        memory: Also measure peak memory at 32k tokens in a fresh process (CPU only).
        command: What the user typed, for the record.
        progress: Called with one line before each configuration.
    """
    where = torch.device(device)
    on_cpu = where.type == "cpu"
    shapes = (CPU_SHAPES if on_cpu else MODEL_SHAPES) if shapes is None else shapes
    if dtypes is None:
        dtypes = (torch.float32,) if on_cpu else (torch.bfloat16,)
    if densities is None:
        densities = (0.6, 0.25, 0.125) if on_cpu else (0.5, 0.25, 0.1)
    tried = _kernels(where, dtypes[0]) if kernels is None else tuple(kernels)
    found: list[Measurement] = []
    against: dict[str, str] = {}

    def measure(count: int) -> None:
        for shape in shapes:
            for dtype in dtypes:
                for size in block_sizes:
                    if progress is not None:
                        progress(f"{shape.name}, {dtype}, block {size}, {count} threads")
                    part, notes = measure_kernels(
                        where, shape, dtype, size, densities, patterns, repeats, tried
                    )
                    found.extend(part)
                    against.update(notes)

    _for_each_thread_count(where, threads, measure)
    return BenchReport(
        device=device,
        environment=environment(),
        commit=_commit(),
        command=command,
        repeats=repeats,
        measurements=tuple(found),
        peak_memory=measure_peak_memory() if memory and on_cpu else None,
        against=against,
    )


def run_method_bench(
    device: str = "cpu",
    *,
    methods: Sequence[str] | None = None,
    shapes: Sequence[Shape] | None = None,
    dtype: torch.dtype | None = None,
    threads: Sequence[int] | None = None,
    num_steps: int = 50,
    repeats: int = 3,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time methods, planning and ordering included, over the calls of one layer.

    Args:
        device: "cpu" or "cuda".
        methods: Names; all but dense where None. Each runs with its default params, and on a
            CPU once more with those that make its planning cheap (``Method.cheap_planning``).
        shapes: Sizes; 8k and 32k tokens on the CPU, the models' own on a GPU where None.
        dtype: fp32 on the CPU, bf16 on a GPU where None.
        threads: CPU threads to try; one where None.
        num_steps: Steps of the generation.
        repeats: Timed rounds of dense and of sparse attention.
        command: What the user typed, for the record.
        progress: Called with one line before each configuration.
    """
    where = torch.device(device)
    on_cpu = where.type == "cpu"
    shapes = (METHOD_SHAPES if on_cpu else MODEL_SHAPES) if shapes is None else shapes
    names = [name for name in METHODS if name != "dense"] if methods is None else methods
    if dtype is None:
        dtype = torch.float32 if on_cpu else torch.bfloat16
    variants: list[tuple[str, dict[str, Any]]] = []
    for name in names:
        cheap = dict(method_class(name).cheap_planning)
        variants += [(name, {})] + [(name, cheap)] * bool(on_cpu and cheap)
    found: list[MethodMeasurement] = []

    def measure(count: int) -> None:
        for shape in shapes:
            for name, params in variants:
                if progress is not None:
                    progress(f"{name}, {shape.name}, {count} threads")
                found.append(measure_method(where, name, params, shape, dtype, num_steps, repeats))

    _for_each_thread_count(where, (1,) if threads is None and on_cpu else threads, measure)
    return BenchReport(
        device=device,
        environment=environment(),
        commit=_commit(),
        command=command,
        repeats=repeats,
        methods=tuple(found),
    )


def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[str | None, ...]:
    """Name the kernels that are tried where the user named none."""
    if device.type == "cpu":
        return (None,)
    explained = Backends().explain(device, dtype)
    return tuple(name for name, reasons in explained if not reasons and name != "reference")


def _for_each_thread_count(
    device: torch.device, threads: Sequence[int] | None, measure: Callable[[int], None]
) -> None:
    """Measure with each number of threads; afterwards it is as it was."""
    available = torch.get_num_threads()
    if threads is None:
        threads = sorted({1, available}) if device.type == "cpu" else (available,)
    try:
        for count in threads:
            torch.set_num_threads(count)
            measure(count)
    finally:
        torch.set_num_threads(available)


def _commit() -> str | None:
    """Name the commit that this package was run from; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 (git is wherever the user has it)
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
