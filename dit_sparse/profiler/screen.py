# SPDX-License-Identifier: Apache-2.0
"""Screen candidates on a few calls, so that only the useful ones are measured on all.

One dense generation of the first prompt. Of some layers, in the first and in the last step band,
two calls are taken: the band's first, for methods that search on it, and the last captured one.
On each such pair

1. every candidate is set to its level: the density that its method is asked for is bisected
   until the plans keep the level (means counted);
2. all candidates are measured as the search measures them, on few rows.

The shortlist is built greedily: over a range of prices of error, each step adds the candidate that
lowers the sum of time and priced error most, each head taking its best; what they all remember
stays within the limit. Families that make it to the list then get finer densities next to those
that were chosen. Levels are averages over the
screened calls; the search measures what each candidate really keeps.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, replace
from math import log, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_sparse.attach.apply import enable
from dit_sparse.core.plan import BlockPlan
from dit_sparse.profiler.capture import BRANCHES, Enough, about_of, call_of
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import DENSE_BLOCK, Meter, Screened, step_seen
from dit_sparse.profiler.shared import SharedOps
from dit_sparse.profiler.table import NOT_MEASURED, cells_of, sum_up
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.profiler.candidates import Candidate, Wanted
    from dit_sparse.profiler.capture import Measuring
    from dit_sparse.profiler.search import Cell

    Array = np.ndarray[Any, np.dtype[np.float64]]

SHARE, MOST = 1 / 3, 4  # of the layers that are screened; layers at most
ROWS = 6  # of blocks that are compared
BISECTIONS = 6
NEAR, SETTLED = 0.03, 0.12  # of the density, close enough: where calls must tell it, where not
PRICES = 12
FINER = 1 / 3  # of the shortlist: finer densities of what was chosen
LEAST = 0.04  # density below which no finer one is tried
STOP = 1e-4  # relative gain below which no candidate is added


class Screen:
    """Listens to one generation (``SparseEngine.watch``), tunes and measures.

    Args:
        how: The search's candidates, bands and limits.
        layers: Of the model.
        tick: Called with (pairs screened, pairs to screen).
    """

    def __init__(
        self,
        how: Measuring,
        layers: int,
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        self.how, self.tick = how, tick
        self.layers = screened_layers(layers)
        self.grid: LatentsGrid | None = None
        self.about: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []
        self.asked: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, int] = {}
        self._steps: dict[int, tuple[int, ...]] = {}
        self._band_of: dict[int, int] = {}
        self._held: dict[tuple[str, int, int], list[AttentionCall]] = defaultdict(list)
        self._done: set[tuple[str, int, int]] = set()

    def __call__(self, call: AttentionCall, plan: BlockPlan | None, method: str) -> None:  # noqa: ARG002
        """Keep a call, or screen the candidates on it and the one that was kept."""
        if call.branch not in BRANCHES:
            return
        if self.grid is None:
            self._begin(call)
        if call.step > max(self._band_of):
            raise Enough
        band = self._band_of.get(call.step)
        if band is None or call.layer not in self.layers:
            return
        place = (call.stage, call.layer, band)
        tensors = {name: getattr(call, name).clone() for name in ("query", "key", "value")}
        self._held[place].append(replace(call, **tensors, state={}, shared={}))
        if call.step == self._steps[band][-1]:
            self._screen(band, self._held.pop(place))
            self._done.add(place)
            if self.tick is not None:
                self.tick(len(self._done), len(self._steps) * len(self.layers))

    def _begin(self, call: AttentionCall) -> None:
        self.grid, self.about = call.grid, about_of(call)
        captured: dict[int, list[int]] = defaultdict(list)
        for step, band in self.how.bands.captured(call.num_steps).items():
            captured[band].append(step)
        for band in {min(captured), max(captured)}:
            self._steps[band] = tuple(sorted({captured[band][0], captured[band][-1]}))
        self._band_of = {step: band for band, steps in self._steps.items() for step in steps}

    def _screen(self, band: int, calls: list[AttentionCall]) -> None:
        """Set every candidate to its level on one pair of calls, and measure all."""
        assert self.grid is not None
        candidates: list[Candidate] = []
        with torch.no_grad():
            pair = Pair(calls)
            for want in self.how.wanted:
                asked = None if want.level is None else pair.asked(want)
                if asked is not None:
                    self.asked[want.text].append(asked)
                candidates.append(want.fitted(self.grid, asked))
            pair.end()
            meter = Meter(candidates, sample=ROWS, state_limit=self.how.state_limit)
            first, last = calls[0], calls[-1]
            if first is not last:
                replace(meter, candidates=list(filter(searches, candidates))).measure(
                    first, first.step
                )
            power, found = meter.measure(last, first.step)
        for name, size in meter.remembered().items():  # of this layer
            self.bytes[name] = max(self.bytes.get(name, 0), size * last.num_layers)
        self.calls.append(
            {
                "stage": last.stage, "layer": last.layer, "step": last.step, "band": band,
                "power": power, "found": [asdict(each) for each in found],
            }
        )  # fmt: skip


def screened_layers(layers: int) -> set[int]:
    """Choose layers, spread evenly over the model."""
    count = max(1, min(round(layers * SHARE), MOST))
    return {(2 * i + 1) * layers // (2 * count) for i in range(count)}


def searches(candidate: Candidate) -> bool:
    """Whether a candidate must see the first step of a band before it drops anything."""
    return bool(candidate.instance.at_start) or candidate.period is not None


class Pair:
    """Sets candidates to a density on one or two calls of a layer.

    Args:
        calls: In the order of their steps; the first is the first of its band.
    """

    def __init__(self, calls: Sequence[AttentionCall]) -> None:
        self.calls = [(call, SharedOps()) for call in calls]
        for call, ops in self.calls:
            everything = BlockPlan.full(call.layout(DENSE_BLOCK), call.key_layout(DENSE_BLOCK))
            qkv = (call.query, call.key, call.value)
            ops.begin(call, *ops.attend(*qkv, everything, call.scale))

    def end(self) -> None:
        """Free what candidates shared."""
        for _, ops in self.calls:
            ops.end()

    def asked(self, want: Wanted) -> float:
        """Find the density to ask a method for, so that its plans keep the level.

        Returns:
            It, in (0, 1]; the nearest that was tried where the method cannot have the level.
        """
        assert want.level is not None
        grid = self.calls[0][0].grid
        wanted = self.of_all(want.level)
        near = (SETTLED if want.settled else NEAR) * wanted
        low, high = 0.0, 1.0
        asked, best = want.level, (float("inf"), want.level)
        for _ in range(BISECTIONS + 1):
            kept = self.density(want.fitted(grid, asked))
            best = min(best, (abs(kept - wanted), asked))
            if best[0] <= near:
                break
            low, high = (asked, high) if kept < wanted else (low, asked)
            # Halving the ratio is quicker where the level is far below what was asked for.
            asked = sqrt(low * high) if low > 0 else high / 2 if kept > 0 else high
            asked = float(f"{asked:.4g}")
        return best[1]

    def of_all(self, level: float) -> float:
        """Give the share of all pairs where ``level`` of the video's are kept, and all others."""
        call = self.calls[0][0]
        queries, keys = (
            layout.lengths.sum(-1).double() for layout in (call.layout(64), call.key_layout(64))
        )
        video = float((call.grid.video_tokens**2 / (queries * keys)).mean())
        return 1 - video * (1 - level)

    def density(self, candidate: Candidate) -> float:
        """Count what a candidate keeps on these calls, those on which it searches left out."""
        method, first = candidate.instance, self.calls[0][0].step
        state: dict[str, Any] = {}
        found: list[float] = []
        for call, ops in self.calls if searches(candidate) else self.calls[-1:]:
            step = step_seen(candidate, call.step, first)
            own = replace(call, step=step, state=state, shared={})
            plan = method.plan(own, ops)
            if plan is None:
                if candidate.period is None or step > first:
                    found.append(1.0)
            elif plan.complete:
                output, lse = ops.attend(own.query, own.key, own.value, plan, own.scale)
                method.finish(own, output, lse, ops)
            else:
                found.append(float(plan.density().mean()))
        return sum(found) / len(found) if found else 1.0


def shortlist(
    wanted: Sequence[Wanted], screen: Screen, how: Measuring
) -> tuple[list[Candidate], list[Screened]]:
    """Choose what is measured on all calls.

    Args:
        wanted: All candidates, in the order in which they were measured.
        screen: After its generation.
        how: Bands, and how many candidates are kept at most.

    Returns:
        The shortlist, in the candidates' order, and what was found of every candidate.
    """
    assert screen.grid is not None
    asked = {name: sum(values) / len(values) for name, values in screen.asked.items()}
    candidates = [want.fitted(screen.grid, asked.get(want.text)) for want in wanted]
    # Measured under the names that the pairs' own candidates had.
    steps = {stage: list(range(screen.about["num_steps"])) for stage in _stages(screen.calls)}
    unit = {"about": screen.about, "steps": steps, "calls": screen.calls}
    rows = sum_up([unit], candidates, how.bands)
    costs = CostModel.assumed(candidates, screen.about["heads"])
    cells = cells_of(rows, candidates, costs)
    limit = len(candidates) if how.shortlist == 0 else how.shortlist
    first = max(1, limit - int(limit * FINER))
    sizes = [0, *(screen.bytes.get(candidate.name, 0) for candidate in candidates)]
    picked = ranked(cells, first, sizes, how.state_limit)
    room = how.state_limit - sum(sizes[column] for column in picked)
    told = []
    for column, (want, candidate) in enumerate(zip(wanted, candidates, strict=True), 1):
        measured = [
            each for call in screen.calls if not (each := call["found"][column - 1])["searched"]
        ]
        error = [x * x for each in measured for x in each["error"]]
        density = [x for each in measured for x in each["density"]]
        told.append(
            Screened(
                candidate.name,
                asked.get(want.text),
                float(f"{np.mean(density or [1.0]):.4g}"),
                float(f"{sqrt(np.mean(error or [0.0])):.4g}"),
                sizes[column],
                picked.index(column) if column in picked else None,
            )
        )
    chosen = [wanted[column - 1] for column in picked]
    found = [candidates[column - 1] for column in sorted(picked)]
    for want in finer(wanted, chosen):
        size = max(screen.bytes.get(w.text, 0) for w in wanted if w.family == want.family)
        if len(found) >= limit:
            break
        if size > room:
            continue
        at = _interpolated(want, wanted, asked)
        made = want.fitted(screen.grid, at)
        if all((made.method, made.params) != (c.method, c.params) for c in found):
            found.append(made)
            room -= size
    return found, told


def ranked(
    cells: Sequence[Cell], limit: int, sizes: Sequence[int] = (), room: int = 0
) -> list[int]:
    """Order candidates by what each adds to those before it.

    The measure is the mean over prices of error of (time + price * error), with every head at its
    best among the chosen and dense, relative to its best among all.

    Args:
        cells: Tables of the screened layers and bands; launches are not counted.
        limit: Candidates at most.
        sizes: Bytes that each column's candidate remembers.
        room: Bytes that all of them may remember.

    Returns:
        Columns, dense (0) not among them; the first gains most.
    """
    time = np.concatenate([cell.time for cell in cells])
    error = np.concatenate([cell.steps * cell.error for cell in cells])
    usable = (error > 0) & (error < NOT_MEASURED / 2)
    if not usable.any():
        return []
    scale = float(time[:, 0].mean() / np.median(error[usable]))
    prices = scale * np.logspace(-1.5, 2.5, PRICES)
    value = time[None] + prices[:, None, None] * error[None]  # [prices, heads, candidates]
    ideal = value.min(-1).sum(-1)
    best, left = value[:, :, 0], set(range(1, time.shape[1]))
    found: list[int] = []
    worth = float((best.sum(-1) / ideal).mean())
    while len(found) < limit:
        left = {column for column in left if not sizes or sizes[column] <= room}
        if not left:
            break
        gains = {
            column: float((np.minimum(best, value[:, :, column]).sum(-1) / ideal).mean())
            for column in sorted(left)
        }
        column = min(gains, key=lambda c: (gains[c], c))
        if worth - gains[column] < STOP * worth:
            break
        worth, best = gains[column], np.minimum(best, value[:, :, column])
        found.append(column)
        left.remove(column)
        room -= sizes[column] if sizes else 0
    return found


def finer(wanted: Sequence[Wanted], chosen: Sequence[Wanted]) -> list[Wanted]:
    """List further densities of chosen families, of those chosen first before others.

    For each chosen level: halfway (by ratio) to the next lower and the next higher level, and
    below the lowest one half of it.
    """
    known = {want.text for want in wanted}
    found: dict[str, Wanted] = {}
    for want in chosen:
        if want.level is None:
            continue
        levels = sorted({w.level for w in wanted if w.family == want.family and w.level})
        at = levels.index(want.level)
        near = [
            sqrt(levels[at] * levels[at - 1]) if at else levels[0] / 2,
            sqrt(levels[at] * levels[at + 1]) if at + 1 < len(levels) else 0.0,
        ]
        for level in near:
            made = replace(want, level=float(f"{level:.2g}"))
            if level >= LEAST and made.text not in known:
                found.setdefault(made.text, made)
    return list(found.values())


def _interpolated(
    want: Wanted, wanted: Sequence[Wanted], asked: Mapping[str, float]
) -> float | None:
    """Read off what to ask for at a level between those that were tuned; None: the level."""
    assert want.level is not None
    tuned = sorted(
        (w.level, asked[w.text])
        for w in wanted
        if w.family == want.family and w.level and w.text in asked
    )
    if not tuned:
        return None
    levels, values = ([log(x) for x in side] for side in zip(*tuned, strict=True))
    at = log(want.level)
    if at < levels[0]:  # as far below what was asked for at the lowest level
        return float(f"{np.exp(values[0] + at - levels[0]):.4g}")
    return float(f"{np.exp(np.interp(at, levels, values)):.4g}")


def _stages(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({call["stage"] for call in calls})


def screen(
    pipe: Any,
    arguments: dict[str, Any],
    seed: int,
    how: Measuring,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate once, dense, and choose the candidates of the search.

    Args:
        pipe: A Diffusers pipeline with nothing attached; it is detached afterwards.
        arguments: Of its call.
        seed: Of the noise.
        how: What is to be measured.
        tick: Called with (pairs screened, pairs to screen).

    Returns:
        "candidates" (name, method and params of each on the shortlist) and "screened".

    Raises:
        ProfileError: No call could be measured; says why they were declined.
    """
    with enable(pipe, Strategy.single("dense")) as handle, torch.no_grad():
        layers = max(stage.num_layers for stage in handle.stages.values())
        listener = Screen(how, layers, tick)
        handle.watch = listener
        with suppress(Enough):
            pipe(**call_of(pipe, arguments, seed))
        reasons = handle.report().reasons
    if not listener.calls:
        why = "; ".join(reasons) or "the pipeline called no attention that dit_sparse knows"
        raise ProfileError(f"nothing could be measured: {why}")
    found, told = shortlist(how.wanted, listener, how)
    return {
        "candidates": [asdict(each) for each in found],
        "screened": [asdict(each) for each in told],
    }
