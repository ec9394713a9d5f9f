# SPDX-License-Identifier: Apache-2.0
"""Run one generation and measure the candidates on some of its calls.

It is dense but for what earlier choices made sparse: the bands before the measured one
(``before``), or layer by layer what the generation itself chose (``greedy.py``).
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import enable
from dit_sparse.methods.steps import step_at
from dit_sparse.profiler.candidates import SMALL_GRID, resolve
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import STATE_LIMIT, Meter
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.profiler.candidates import Candidate, Wanted

SHORTLIST = 18  # candidates
SAMPLE_SMALL, SAMPLE = 16, 64  # rows of blocks, below SMALL_GRID tokens and from there on
BRANCHES = {"cond", "both"}  # the unconditional pass is not measured, it gets the same strategy


@dataclass(frozen=True)
class Bands:
    """Where a run is cut, and how often each part is captured.

    Args:
        edges: Fractions of the run, ascending from 0 to 1.
        captures: Calls of a layer in a band, >= 2: its first step, where methods search, and
            others spread over the rest.
    """

    edges: tuple[float, ...]
    captures: int = 2

    def __post_init__(self) -> None:
        """Check ranges."""
        edges = self.edges
        if len(edges) < 2 or sorted(set(edges)) != list(edges) or (edges[0], edges[-1]) != (0, 1):
            raise ProfileError(
                f"bands must be ascending fractions of the run from 0 to 1, got {list(edges)}; "
                "try [0, 0.33, 0.67, 1]"
            )
        if self.captures < 2:
            raise ProfileError(
                f"captures must be at least 2 (a search and its use), got {self.captures}"
            )

    def steps(self, num_steps: int) -> list[range]:
        """Give the steps of each band; a short run leaves some empty."""
        cuts = [step_at(edge, num_steps) for edge in self.edges]
        return [range(a, b) for a, b in pairwise(cuts)]

    def captured(self, num_steps: int) -> dict[int, int]:
        """Give the captured steps and the band of each."""
        found: dict[int, int] = {}
        for i_band, steps in enumerate(self.steps(num_steps)):
            if not steps:
                continue
            found[steps.start] = i_band
            rest, others = len(steps) - 1, self.captures - 1
            for i in range(others if rest else 0):
                found[steps.start + 1 + int((i + 0.5) * rest / others)] = i_band
        return found


@dataclass(frozen=True)
class Measuring:
    """What is measured, the same for all generations of a search.

    Args:
        wanted: Candidates.
        bands: Which steps.
        sample: Rows of blocks on which outputs are compared; 0: all; None: 16 below 8,192
            tokens, 64 from there on.
        state_limit: Bytes that candidates may remember.
        shortlist: Candidates that are measured on all calls, at most; 0: all that are wanted,
            each as it is named.
        listed: The shortlist; None: there is none.
    """

    wanted: tuple[Wanted, ...]
    bands: Bands
    sample: int | None = None
    state_limit: int = STATE_LIMIT
    shortlist: int = SHORTLIST
    listed: tuple[Candidate, ...] | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.sample is not None and (self.sample < 2 and self.sample != 0):
            raise ProfileError(f"sample must be at least 2 rows, or 0 for all, got {self.sample}")
        if self.shortlist < 0:
            raise ProfileError(
                f"shortlist must be at least 1, or 0 to measure all candidates, got "
                f"{self.shortlist}"
            )

    @property
    def screens(self) -> bool:
        """Whether candidates are screened first: many, or some whose density calls must tell."""
        if not self.shortlist:
            return False
        return len(self.wanted) > self.shortlist or not all(w.settled for w in self.wanted)

    @property
    def measured(self) -> int:
        """Candidates that are measured on all calls, at most."""
        return min(len(self.wanted), self.shortlist or len(self.wanted))

    def candidates(self, grid: LatentsGrid) -> tuple[Candidate, ...]:
        """Give what is measured on all calls."""
        return resolve(self.wanted, grid) if self.listed is None else self.listed

    def rows(self, grid: LatentsGrid) -> int | None:
        """Give the rows to compare; None: all."""
        if self.sample is None:
            return SAMPLE_SMALL if grid.tokens < SMALL_GRID else SAMPLE
        return self.sample or None


class Enough(Exception):  # noqa: N818  (no error: what follows is not needed)
    """The measured band is over."""


class Capture:
    """Listens to one generation (``SparseEngine.watch``) and measures.

    Args:
        how: What to measure.
        band: The only one to measure; the generation ends with it. None: all.
        tick: Called with (calls measured, calls to measure).
        layers: Of the model, for ``tick``.
    """

    def __init__(
        self,
        how: Measuring,
        band: int | None = None,
        tick: Callable[[int, int], None] | None = None,
        layers: int = 1,
    ) -> None:
        self.how, self.band = how, band
        self.tick, self.layers = tick, layers
        self.meter: Meter | None = None
        self.about: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []
        self.seen: dict[str, set[int]] = {}
        self._captured: dict[int, int] = {}
        self._stop = 0
        self._at: tuple[str, int] = ("", -1)
        self._first = 0

    def __call__(self, call: AttentionCall, plan: BlockPlan | None, method: str) -> None:  # noqa: ARG002
        """Measure one call if it is to be captured."""
        if call.branch not in BRANCHES:
            return
        if self.meter is None:
            self._begin(call)
        assert self.meter is not None
        if call.step >= self._stop:
            raise Enough
        self.seen.setdefault(call.stage, set()).add(call.step)
        band = self._captured.get(call.step)
        if band is None:
            return
        if (call.stage, band) != self._at:
            self.meter.forget()
            self._at, self._first = (call.stage, band), call.step
        self.about["heads"] = len(call.heads)  # what came before may have been a part of them
        power, found = self.meter.measure(call, self._first)
        self.calls.append(
            {
                "stage": call.stage,
                "layer": call.layer,
                "step": call.step,
                "band": band,
                "power": [float(f"{p:.6g}") for p in power],
                "found": [asdict(each) for each in found],
            }
        )
        if self.tick is not None:
            self.tick(len(self.calls), len(self._captured) * self.layers)

    def _begin(self, call: AttentionCall) -> None:
        grid, bands = call.grid, self.how.bands
        self.meter = Meter(
            self.how.candidates(grid),
            state_limit=self.how.state_limit,
            sample=self.how.rows(grid),
        )
        self._captured = bands.captured(call.num_steps)
        self._stop = call.num_steps
        if self.band is not None:
            self._captured = {s: b for s, b in self._captured.items() if b == self.band}
            self._stop = bands.steps(call.num_steps)[self.band].stop
        self.about = about_of(call)

    def unit(self) -> dict[str, Any]:
        """Give everything measured as plain data."""
        steps = {stage: sorted(found) for stage, found in sorted(self.seen.items())}
        kernel = None if self.meter is None else self.meter.ops.last_kernel
        return {"about": self.about, "steps": steps, "kernel": kernel, "calls": self.calls}


def capture(
    pipe: Any,
    arguments: dict[str, Any],
    seed: int,
    how: Measuring,
    *,
    band: int | None = None,
    before: Strategy | None = None,
    follow: Callable[[Capture], Strategy] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Generate once and measure.

    Args:
        pipe: A Diffusers pipeline with nothing attached; it is detached afterwards, whatever
            happens.
        arguments: Of its call.
        seed: Of the noise, drawn on the CPU.
        how: What to measure.
        band: The only one to measure; the generation ends with it. None: all.
        before: What runs in the bands that were decided before; None: dense.
        follow: Makes the strategy that runs while the listener measures, instead of ``before``
            (``Greedy.strategy``); it asks the listener itself.
        tick: Called with (calls measured, calls to measure).

    Returns:
        The unit, plain data.

    Raises:
        ProfileError: No call could be measured; says why they were declined.
    """
    with enable(pipe, before or Strategy.single("dense")) as handle, torch.no_grad():
        layers = max(stage.num_layers for stage in handle.stages.values())
        listener = Capture(how, band, tick, layers)
        if follow is None:
            handle.watch = listener
        else:
            handle.strategy = follow(listener)
        with suppress(Enough):
            pipe(**call_of(pipe, arguments, seed))
        reasons = handle.report().reasons
    if not listener.calls and (band is None or not listener.about):  # a band may have no step
        why = "; ".join(reasons) or "the pipeline called no attention that dit_sparse supports"
        raise ProfileError(f"nothing could be measured: {why}")
    return listener.unit()


def call_of(pipe: Any, arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Complete a call's arguments: seeded noise, and latents instead of pictures."""
    takes = inspect.signature(pipe.__call__).parameters
    made = {**arguments, "generator": torch.Generator().manual_seed(seed)}
    if "output_type" in takes:
        made["output_type"] = "latent"
    return made


def about_of(call: AttentionCall) -> dict[str, Any]:
    """Give what all units of a search have in common, as plain data."""
    grid, (batch, _, heads, head_dim) = call.grid, call.query.shape
    return {
        "grid": [grid.frames, grid.height, grid.width, grid.text_length, grid.text_first],
        "num_steps": call.num_steps,
        "layers": call.num_layers,
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
    }
