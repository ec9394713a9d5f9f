# SPDX-License-Identifier: Apache-2.0
"""Screen candidates on a few calls, so that only the useful ones are measured on all.

One dense generation of the first prompt. Of some layers, in the first and in the last step band,
two calls are taken: the band's first, for methods that search on it, and the last captured one. On
each such pair every candidate is set to its level (``tuning.py``), and all are measured as the
search measures them, on few rows. ``shortlist.py`` chooses. Levels are averages over the screened
calls; the search measures what each candidate really keeps.

First calls are held in host memory until the last one of their layer and band comes: query, key
and value of at most ``MOST`` layers.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import enable
from dit_sparse.profiler.capture import BRANCHES, Enough, about_of, call_of
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.measure import Meter
from dit_sparse.profiler.shortlist import Observed, shortlist
from dit_sparse.profiler.tuning import Tuner, searches
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.profiler.capture import Measuring

SHARE, MOST = 1 / 3, 4  # of the layers that are screened; layers at most
ROWS = 6  # of blocks that are compared


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
        self.observed: Observed | None = None
        self._steps: dict[int, tuple[int, ...]] = {}
        self._band_of: dict[int, int] = {}
        self._first: dict[tuple[str, int, int], AttentionCall] = {}
        self._done = 0

    def __call__(self, call: AttentionCall, plan: BlockPlan | None, method: str) -> None:  # noqa: ARG002
        """Keep a call, or screen the candidates on it and the one that was kept."""
        if call.branch not in BRANCHES:
            return
        if self.observed is None:
            self._begin(call)
        if call.step > max(self._band_of):
            raise Enough
        band = self._band_of.get(call.step)
        if band is None or call.layer not in self.layers:
            return
        place = (call.stage, call.layer, band)
        if call.step < self._steps[band][-1]:
            self._first[place] = _moved(call, "cpu")
            return
        first = self._first.pop(place, None)
        calls = [call] if first is None else [_moved(first, call.query.device), call]
        self._screen(band, [replace(each, state={}, shared={}) for each in calls])
        self._done += 1
        if self.tick is not None:
            self.tick(self._done, len(self._steps) * len(self.layers))

    def _begin(self, call: AttentionCall) -> None:
        self.observed = Observed(call.grid, about_of(call))
        captured: dict[int, list[int]] = defaultdict(list)
        for step, band in self.how.bands.captured(call.num_steps).items():
            captured[band].append(step)
        for band in {min(captured), max(captured)}:
            self._steps[band] = tuple(sorted({captured[band][0], captured[band][-1]}))
        self._band_of = {step: band for band, steps in self._steps.items() for step in steps}

    def _screen(self, band: int, calls: list[AttentionCall]) -> None:
        """Set every candidate to its level on one pair of calls, and measure all."""
        assert self.observed is not None
        seen, candidates = self.observed, []
        with torch.no_grad():
            tuner = Tuner(calls)
            for want in self.how.wanted:
                request = None if want.level is None else tuner.request(want)
                if request is not None:
                    seen.requested.setdefault(want.text, []).append(request)
                candidates.append(want.fitted(seen.grid, request))
            tuner.end()
            meter = Meter(candidates, sample=ROWS, state_limit=self.how.state_limit)
            first, last = calls[0], calls[-1]
            if first is not last:
                replace(meter, candidates=list(filter(searches, candidates))).measure(
                    first, first.step
                )
            power, found = meter.measure(last, first.step)
        for name, size in meter.remembered().items():  # of this layer
            seen.bytes[name] = max(seen.bytes.get(name, 0), size * last.num_layers)
        seen.calls.append(
            {
                "stage": last.stage, "layer": last.layer, "step": last.step, "band": band,
                "power": power, "found": [asdict(each) for each in found],
            }
        )  # fmt: skip


def _moved(call: AttentionCall, device: torch.device | str) -> AttentionCall:
    """Copy a call's tensors to a device; a pipeline may reuse its own."""
    names = ("query", "key", "value")
    return replace(call, **{name: getattr(call, name).to(device, copy=True) for name in names})


def screened_layers(layers: int) -> set[int]:
    """Choose layers, spread evenly over the model."""
    count = max(1, min(round(layers * SHARE), MOST))
    return {(2 * i + 1) * layers // (2 * count) for i in range(count)}


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
    if listener.observed is None or not listener.observed.calls:
        why = "; ".join(reasons) or "the pipeline called no attention that dit_sparse supports"
        raise ProfileError(f"nothing could be measured: {why}")
    found, screened = shortlist(listener.observed, how)
    return {
        "candidates": [asdict(each) for each in found],
        "screened": [asdict(each) for each in screened],
    }
