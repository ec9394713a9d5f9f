# SPDX-License-Identifier: Apache-2.0
"""Measure on this device what ``cost.py`` needs: a dense call, sparse launches, and planning."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.bench.attention import make_plan
from dit_sparse.bench.shapes import Shape
from dit_sparse.bench.timing import Clock, alternate
from dit_sparse.core.call import AttentionCall, Method, overrides_attend
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels.dispatch import Backends, describe_device
from dit_sparse.kernels.synthetic import structured_inputs
from dit_sparse.profiler.cost import CostModel, agreement, block_of
from dit_sparse.profiler.measure import computed_share

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.profiler.candidates import Candidate

    Qkv = tuple[Tensor, Tensor, Tensor]

DENSITIES = (0.125, 0.25, 0.5)
REPEATS = 3


@dataclass(frozen=True)
class Size:
    """The call that is played.

    Args:
        grid: Where the tokens stand.
        batch: Samples of a call.
        heads: Heads of a layer.
        head_dim: Width of one.
        layers: Layers of the model.
        num_steps: Steps of a generation.
        device: Where it runs.
        dtype: Of query, key and value.
    """

    grid: LatentsGrid
    batch: int
    heads: int
    head_dim: int
    layers: int
    num_steps: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Timed:
    """A cost model and how well it foretells the candidates' own launches.

    Args:
        model: The model.
        kernel: Name of the kernel that ran.
        rank_correlation: Spearman's, over candidates; None where there are fewer than two.
        median_error: Of relative differences; None likewise.
    """

    model: CostModel
    kernel: str
    rank_correlation: float | None
    median_error: float | None


def measure_costs(
    candidates: Sequence[Candidate],
    size: Size,
    progress: Callable[[int, int], None] | None = None,
) -> Timed:
    """Run the micro-benchmark: synthetic queries and keys, sizes as in the model.

    Launches of random plans at three densities, one head and all heads, give the cost model's
    numbers by least squares of relative errors; nothing of the candidates enters it but their
    block sizes. The candidates' own launches are then timed against its prediction.
    """
    inputs = structured_inputs(
        size.grid, size.heads, size.head_dim, device=size.device, dtype=size.dtype
    )
    query, key, value = (x.expand(size.batch, -1, -1, -1).contiguous() for x in inputs)
    qkv = (query, key, value)
    blocks = sorted({block_of(candidate) for candidate in candidates})
    total, done = len(blocks) + len(candidates), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    ops, scale = Backends(), size.head_dim**-0.5
    with torch.no_grad():
        q, k, v = (x.transpose(1, 2) for x in qkv)
        dense = _time(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale),
            size.device,
        )
        launches, head, pair, extra = [], {}, {}, []
        for block in blocks:
            fitted = _launches(qkv, block, size, ops)
            launches.append(fitted[0])
            head[str(block)], pair[str(block)] = fitted[1:3]
            extra.append(fitted[3:])
            tick()
        model = CostModel(
            source=f"measured on {describe_device(size.device)}, "
            f"{torch.get_num_threads()} threads, kernel {ops.last_kernel}",
            unit="ms",
            heads=size.heads,
            dense=dense,
            launch=min(launches, default=0.0),
            head=head,
            pair=pair,
            order=statistics.median(e[0] for e in extra) if extra else 0.0,
            cut=statistics.median(e[1] for e in extra) if extra else 0.0,
        )
        planning, predicted, measured = {}, [], []
        for candidate in candidates:
            found = _play(candidate, qkv, size, ops, model)
            planning[candidate.name] = found[:2]
            if found[3]:
                predicted.append(found[2])
                measured.append(found[3])
            tick()
    rank, error = agreement(predicted, measured) if len(measured) > 1 else (None, None)
    return Timed(replace(model, planning=planning), ops.last_kernel or "?", rank, error)


def _launches(
    qkv: Qkv, block: int, size: Size, ops: Backends
) -> tuple[float, float, float, float, float]:
    """Time random plans of one block size: launch, head, pair, order and cut of the model."""
    random = torch.Generator().manual_seed(block)
    layout = size.grid.layout(block, size.device)
    rows, times = [], []
    for heads in sorted({1, size.heads}):
        part: Qkv = (qkv[0][:, :, :heads], qkv[1][:, :, :heads], qkv[2][:, :, :heads])
        shape = Shape("", size.grid, heads, size.head_dim)
        for density in DENSITIES:
            plan = make_plan(shape, block, density, "random", random).to(size.device)
            times.append(_attend_time(part, plan, size, ops))
            rows.append([1.0, float(heads), float(computed_share(plan, heads).sum())])
    launch, head, pair = _fit(rows, times)
    shape = Shape("", size.grid, size.heads, size.head_dim)
    plan = make_plan(shape, block, DENSITIES[1], "random", random).to(size.device)
    plain = _attend_time(qkv, plan, size, ops)
    order = torch.randperm(size.grid.tokens, generator=random)[None, None].to(size.device)
    moved = replace(plan, q_permutation=order, kv_permutation=order)
    ordered = _attend_time(qkv, moved, size, ops)
    words = -(-layout.max_length // 32)
    tile = torch.zeros(1, layout.max_length, words, dtype=torch.int32, device=size.device)
    tile[..., 0] = 0x5555555 if layout.max_length >= 28 else 1
    cut = replace(plan, partial=torch.zeros_like(plan.kv_indices), tiles=tile)
    partial = _attend_time(qkv, cut, size, ops)
    work = pair * float(computed_share(plan, size.heads).sum())
    return (
        launch,
        head,
        pair,
        max(0.0, ordered - plain) / size.heads,
        max(0.0, partial - plain) / work if work else 0.0,
    )


def _fit(rows: list[list[float]], times: list[float]) -> list[float]:
    """Fit non-negative weights to relative errors: drop the most negative until none is."""
    live = list(range(len(rows[0])))
    a = torch.tensor(rows, dtype=torch.float64)
    t = torch.tensor(times, dtype=torch.float64)
    weights = [0.0] * len(live)
    while live:
        found = torch.linalg.lstsq(a[:, live] / t[:, None], torch.ones_like(t)[:, None]).solution
        values = found.flatten().tolist()
        if min(values) >= 0:
            for i, value in zip(live, values, strict=True):
                weights[i] = value
            break
        live.pop(values.index(min(values)))
    return weights


def _play(
    candidate: Candidate,
    qkv: Qkv,
    size: Size,
    ops: Backends,
    model: CostModel,
) -> tuple[float, float, float, float]:
    """Play the start of a band twice: what is kept for a geometry is made the first time.

    Returns:
        Planning (with finishing) on the first step and on the next ones, and the predicted and
        the measured time of the last launch (0 where it was dense).
    """
    shared: dict[Hashable, Any] = {}
    spent: list[float] = []
    wanted = got = 0.0
    plan: BlockPlan | None = None
    method, clock = candidate.instance, Clock.of(size.device)
    for _ in range(2):
        state: dict[str, Any] = {}
        spent = []
        for step in range(min(3, size.num_steps)):
            call = AttentionCall(
                *qkv,
                size.grid,
                size.head_dim**-0.5,
                num_layers=size.layers,
                heads=tuple(range(size.heads)),
                step=step,
                num_steps=max(size.num_steps, 4),
                state=state,
                shared=shared,
            )
            start = clock.now()
            plan = method.plan(call, ops)
            planning = clock.now() - start
            if plan is not None:
                planning += _beside_attention(method, call, plan, ops, clock)
            spent.append(planning)
    if plan is not None and not plan.complete:
        live = 0.0
        if plan.partial is not None:
            live = float((plan.partial >= 0).sum() / plan.kv_num_blocks.sum().clamp(min=1))
        wanted = model.launch_time(
            block_of(candidate),
            computed_share(plan, size.heads).tolist(),
            ordered=plan.q_permutation is not None,
            partial=min(live, 1.0),
        )
        got = _attend_time(qkv, plan, size, ops)
    return spent[0], statistics.median(spent[1:] or spent), wanted, got


def _beside_attention(
    method: Method, call: AttentionCall, plan: BlockPlan, ops: Backends, clock: Clock
) -> float:
    """Take a call to its end; milliseconds that the method adds to its plan's attention.

    A pass over a complete plan may give a method more than its result (``Method.attend``): what
    it takes longer than the bare pass counts as planning.
    """
    start = clock.now()
    output, lse = method.attend(call, plan, ops)
    spent = clock.now() - start
    if overrides_attend(method, plan):
        bare = _time(
            lambda: ops.attend(call.query, call.key, call.value, plan, call.scale), clock.device
        )
        extra = max(0.0, spent - bare)
    else:
        extra = 0.0
    start = clock.now()
    method.finish(call, output, lse, ops)
    return extra + clock.now() - start


def _attend_time(qkv: Qkv, plan: BlockPlan, size: Size, ops: Backends) -> float:
    return _time(lambda: ops.attend(*qkv, plan, size.head_dim**-0.5), size.device)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a few runs after one for warming up."""
    return alternate({"call": call}, REPEATS, Clock.of(device))["call"]
