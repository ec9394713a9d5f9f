# SPDX-License-Identifier: Apache-2.0
"""Measure sparse against dense attention, side by side, as ratios (``dit-sparse bench``).

The figure of merit is ``efficiency = dense time x density / sparse time``: 1 where every dropped
block saves its whole share of the dense time. Dense and sparse calls alternate in one process;
medians after a warm-up. A configuration whose result is wrong gets no time.

On one CPU thread time is that thread's own processor time, which other programs on the machine
disturb little; on more threads and on GPUs it is the wall clock's.

One file because it is one table: what is measured, how, and how it is shown belong together.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.backends import Backends, compare
from dit_sparse.doctor import environment
from dit_sparse.errors import KernelError
from dit_sparse.grid import BlockLayout, LatentsGrid
from dit_sparse.plan import BlockPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table
    from torch import Tensor

Pattern = Literal["random", "local"]
PATTERNS: tuple[Pattern, ...] = ("random", "local")
CHECKED_BLOCKS = 2  # query blocks whose result is compared with the reference before timing


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call's size."""

    name: str
    tokens: int
    heads: int
    head_dim: int


CPU_SHAPES = (Shape("8k, head_dim 64", 8192, 2, 64), Shape("8k, head_dim 128", 8192, 2, 128))
MODEL_SHAPES = (
    Shape("HunyuanVideo 720p 129 frames", 119_056, 24, 128),
    Shape("Wan 2.1 14B 720p 81 frames", 75_600, 40, 128),
    Shape("CogVideoX 1.5 768x1360 81 frames", 45_106, 48, 64),
    Shape("FLUX 2048 px", 16_896, 24, 128),
    Shape("PixArt 1024 px", 4_096, 16, 72),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One configuration's result.

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
    pattern: Pattern
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


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Most memory that one sparse CPU call took beyond query, key, value and output."""

    tokens: int
    heads: int
    head_dim: int
    density: float
    threads: int
    extra_mib: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All measurements of one run, with what they depend on."""

    device: str
    environment: dict[str, Any]
    commit: str | None
    command: str
    repeats: int
    measurements: tuple[Measurement, ...]
    peak_memory: PeakMemory | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for JSON, the derived ratios included."""
        plain = asdict(self)
        for told, found in zip(plain["measurements"], self.measurements, strict=True):
            told["efficiency"], told["speedup"] = found.efficiency, found.speedup
        return plain

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.as_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def table(self) -> Table:
        """Lay the measurements out for a terminal."""
        from rich.table import Table

        table = Table(title=f"sparse against dense attention on {self.device}")
        for name in ("shape", "dtype", "block", "pattern", "kernel"):
            table.add_column(name)
        for name in ("threads", "density", "dense ms", "sparse ms", "speed-up", "efficiency"):
            table.add_column(name, justify="right")
        for m in self.measurements:
            cells = [m.shape.name, m.dtype, str(m.block_size), m.pattern, m.kernel or "-"]
            cells += [str(m.threads), f"{m.density:.1%}"]
            if m.dense_ms is None or m.sparse_ms is None:
                cells += [f"no time: {m.fault}", "", "", ""]
            else:
                cells += [f"{m.dense_ms:.1f}", f"{m.sparse_ms:.1f}"]
                cells += [f"{m.speedup:.2f} x", f"{m.efficiency:.2f}"]
            table.add_row(*cells)
        if self.peak_memory is not None:
            p = self.peak_memory
            table.caption = (
                f"{p.tokens} tokens, {p.heads} heads, head_dim {p.head_dim}, density "
                f"{p.density:.0%}, {p.threads} threads: {p.extra_mib:.1f} MiB beyond query, key, "
                "value and output"
            )
        return table


def run_bench(
    device: str = "cpu",
    *,
    shapes: Sequence[Shape] | None = None,
    block_sizes: Sequence[int] = (64, 128),
    densities: Sequence[float] = (0.5, 0.25, 0.125),
    patterns: Sequence[Pattern] = PATTERNS,
    dtypes: Sequence[torch.dtype] | None = None,
    threads: Sequence[int] | None = None,
    repeats: int = 5,
    kernel: str | None = None,
    memory: bool = True,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Time dense and sparse attention in alternation.

    Args:
        device: "cpu" or "cuda".
        shapes: Sizes; two of 8k tokens on the CPU, the models' own on a GPU where None.
        block_sizes: Tokens in a block, of queries and of keys.
        densities: Kept share of the key blocks.
        patterns: "random": blocks anywhere, the hardest; "local": the nearest ones.
        dtypes: fp32 on the CPU, bf16 on a GPU where None.
        threads: CPU threads to try; one and all where None.
        repeats: Timed rounds, after one that is not timed.
        kernel: Name of our kernel; the first that can run where None.
        memory: Also measure peak memory at 32k tokens in a fresh process (CPU only).
        command: What the user typed, for the record.
        progress: Called with one line before each configuration.
    """
    where = torch.device(device)
    on_cpu = where.type == "cpu"
    shapes = (CPU_SHAPES if on_cpu else MODEL_SHAPES) if shapes is None else shapes
    if dtypes is None:
        dtypes = (torch.float32,) if on_cpu else (torch.bfloat16,)
    available = torch.get_num_threads()
    if threads is None:
        threads = sorted({1, available}) if on_cpu else (available,)
    found: list[Measurement] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for shape in shapes:
                for dtype in dtypes:
                    for size in block_sizes:
                        if progress is not None:
                            progress(f"{shape.name}, {dtype}, block {size}, {count} threads")
                        found += _measure(
                            where, shape, dtype, size, densities, patterns, repeats, kernel
                        )
    finally:
        torch.set_num_threads(available)
    return BenchReport(
        device=device,
        environment=environment(),
        commit=_commit(),
        command=command,
        repeats=repeats,
        measurements=tuple(found),
        peak_memory=measure_peak_memory() if memory and on_cpu else None,
    )


def _measure(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    block_size: int,
    densities: Sequence[float],
    patterns: Sequence[Pattern],
    repeats: int,
    kernel: str | None,
) -> list[Measurement]:
    """Measure one shape and block size at all densities, all in one alternation."""
    random = torch.Generator().manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    query, key, value = (torch.randn(size, generator=random).to(device, dtype) for _ in range(3))
    backends = Backends(kernel)
    scale = shape.head_dim**-0.5
    threads = torch.get_num_threads()
    clock = "thread" if device.type == "cpu" and threads == 1 else "wall"
    plans: list[BlockPlan] = []
    results: list[Measurement] = []
    with torch.no_grad():
        for pattern in patterns:
            for density in densities:
                plan = make_plan(shape, block_size, density, pattern, random).to(device)
                try:
                    output, lse = backends.attend(query, key, value, plan, scale)
                    fault = _check(query, key, value, plan, scale, output, lse)
                except KernelError as error:
                    fault = str(error)
                results.append(
                    Measurement(
                        shape=shape,
                        dtype=str(dtype).removeprefix("torch."),
                        block_size=block_size,
                        pattern=pattern,
                        density=float(plan.density().mean()),
                        threads=threads,
                        clock=clock,
                        kernel=backends.last_kernel,
                        fault=fault,
                    )
                )
                plans.append(plan)
        calls: dict[str, Callable[[], object]] = dict(_dense_calls(query, key, value, scale))
        dense_names = list(calls)
        for i, (plan, result) in enumerate(zip(plans, results, strict=True)):
            if result.fault is None:
                calls[str(i)] = lambda plan=plan: backends.attend(query, key, value, plan, scale)  # type: ignore[misc]
        times = _alternate(calls, repeats, clock, device)
    dense = min(dense_names, key=times.__getitem__)
    return [
        result
        if result.fault is not None
        else Measurement(
            **{name: getattr(result, name) for name in Measurement.__slots__[:8]},
            dense_kernel=dense,
            dense_ms=times[dense],
            sparse_ms=times[str(i)],
        )
        for i, result in enumerate(results)
    ]


def make_plan(
    shape: Shape, block_size: int, density: float, pattern: Pattern, random: torch.Generator
) -> BlockPlan:
    """Keep the same number of key blocks in every row: random ones, or the nearest ones."""
    layout = LatentsGrid(1, 1, shape.tokens).layout(block_size)
    blocks = layout.blocks
    kept = max(1, round(blocks * density))
    if pattern == "random":
        score = torch.rand(1, shape.heads, blocks, blocks, generator=random)
    else:
        place = torch.arange(blocks, dtype=torch.float32)
        score = -(place[:, None] - place).abs().expand(1, shape.heads, -1, -1)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(-1, score.topk(kept, dim=-1).indices, value=True)
    return BlockPlan.from_block_mask(mask, layout, layout)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> str | None:
    """Compare some query blocks, over all their keys, with the reference."""
    for i_q in torch.linspace(0, plan.q.blocks - 1, CHECKED_BLOCKS).long().tolist():
        start, length = int(plan.q.starts[0, 0, i_q]), int(plan.q.lengths[0, 0, i_q])
        rows = slice(start, start + length)
        part = BlockPlan(
            BlockLayout.from_lengths([length], plan.device),
            plan.kv,
            plan.kv_indices[:, :, i_q : i_q + 1],
            plan.kv_num_blocks[:, :, i_q : i_q + 1],
        )
        fault = compare(query[:, rows], key, value, part, scale, output[:, rows], lse[:, :, rows])
        if fault is not None:
            return f"query block {i_q}: {fault}"
    return None


def _dense_calls(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> dict[str, Callable[[], object]]:
    """Give torch's own dense attention, each of its backends that takes this call."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def sdpa() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    if query.device.type == "cpu":
        return {"sdpa": sdpa}
    calls: dict[str, Callable[[], object]] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):

        def only(backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                return sdpa()

        try:
            only()
        except RuntimeError:  # not on this card, or not in this dtype
            continue
        calls[backend.name.lower()] = only
    return calls or {"sdpa": sdpa}


def _alternate(
    calls: dict[str, Callable[[], object]], repeats: int, clock: str, device: torch.device
) -> dict[str, float]:
    """Run all calls in turn, one round for warming up; median milliseconds of each."""
    now = time.thread_time if clock == "thread" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = now()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (now() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


PEAK_MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from dit_sparse.backends import Backends
from dit_sparse.bench import Shape, make_plan

tokens, heads, head_dim, density, threads = map(float, sys.argv[1:])
torch.set_num_threads(int(threads))

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

def memory():  # (now, peak, of mapped files) in bytes; elsewhere the peak so far stands for now
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return found, found, 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssFile"))

random = torch.Generator().manual_seed(0)
backends = Backends()
for length in (512, int(tokens)):  # the first call loads libraries and makes the canary's check
    shape = Shape("", length, int(heads), int(head_dim))
    plan = make_plan(shape, 128, density, "random", random)
    query, key, value = (torch.randn(1, length, int(heads), int(head_dim)) for _ in range(3))
    if CLEAR.exists():
        CLEAR.write_text("5")  # forget the peak of imports and of the canary
    before, _, code = memory()
    output, _ = backends.attend(query, key, value, plan, head_dim**-0.5)
_, peak, code_after = memory()  # code that the call was the first to touch is not its memory
print((peak - before - (code_after - code) - output.nbytes) / 2**20)
"""


def measure_peak_memory(
    tokens: int = 32_768,
    heads: int = 2,
    head_dim: int = 128,
    density: float = 0.25,
    threads: int | None = None,
) -> PeakMemory:
    """Measure, in a fresh process, what one sparse CPU call takes beyond its tensors."""
    threads = torch.get_num_threads() if threads is None else threads
    sizes = (tokens, heads, head_dim, density, threads)
    done = subprocess.run(  # noqa: S603 (our own script, numbers only)
        [sys.executable, "-c", PEAK_MEMORY_SCRIPT, *map(str, sizes)],
        check=True,
        capture_output=True,
        text=True,
    )
    return PeakMemory(tokens, heads, head_dim, density, threads, float(done.stdout))


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
