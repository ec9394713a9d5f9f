# SPDX-License-Identifier: Apache-2.0
"""Say before a search starts how long it will take, in dense generations and in time.

Counted in dense self-attentions of one layer, one captured call takes: the dense result; one exact
search for all candidates that search; and of each candidate the rows that are compared, planning,
and on a refresh its whole mask. All rates are assumed (``forecast.py``) and named in the result.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_sparse.forecast.generation import ATTENTION_RATE, EFFICIENCY, OTHER_RATE, forecast_method
from dit_sparse.methods import method_class
from dit_sparse.methods.params import build_method
from dit_sparse.profiler.candidates import LEVELS, block_for
from dit_sparse.profiler.cost import SEARCH
from dit_sparse.profiler.screen import ROWS, screened_layers

if TYPE_CHECKING:
    from dit_sparse.pipelines.size import ModelSize
    from dit_sparse.profiler.candidates import Wanted
    from dit_sparse.profiler.capture import Measuring

OWN = 0.01  # of a dense call: what a candidate takes beside attention, to plan and to be compared
UNKNOWN = LEVELS[1]  # density of a candidate whose params do not say it
TRIES = 4  # plans of a candidate on a screened call, to set its density and to measure it
MICRO_RUNS = 10  # of each candidate's launch, to play a band's start twice and to be timed
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Expected:
    """What a search takes.

    Args:
        generation: Seconds of one dense generation (its transformer passes).
        own: Generations that each unit runs to be measured in.
        measuring: What measuring adds to a unit, in generations.
        timing: The micro-benchmark, in generations, once.
        screening: Of the candidates, its own generation included, once.
        check: Generations at the end, once.
        units: Prompts times seeds.
        captured: Captured calls of a unit, all layers.
        state: Bytes that the candidates of each method remember until a band ends, all layers.
    """

    generation: float
    own: float
    measuring: float
    timing: float
    check: float
    units: int
    captured: int
    state: dict[str, int]
    screening: float = 0.0

    @property
    def state_bytes(self) -> int:
        """Bytes that all candidates remember."""
        return sum(self.state.values())

    @property
    def per_unit(self) -> float:
        """Generations that a unit takes."""
        return self.own + self.measuring

    @property
    def seconds(self) -> float:
        """Seconds of the whole search on one card."""
        once = self.screening + self.timing + self.check
        return self.generation * (self.per_unit * self.units + once)


def expected(
    size: ModelSize,
    how: Measuring,
    *,
    num_steps: int,
    units: int,
    passes: int,
    efficiency: float = EFFICIENCY,
    sequential: str = "none",
    check: bool = True,
    timing: bool = True,
) -> Expected:
    """Forecast a search.

    Args:
        size: The model at its resolution.
        how: What is measured.
        num_steps: Of a generation.
        units: Prompts times seeds.
        passes: Of the transformer in a step, for guidance.
        efficiency: Of sparse launches, (dense time x density) / sparse time.
        sequential: As ``profile`` takes it.
        check: The strategy is run once beside dense at the end.
        timing: Costs are measured.
    """
    pass_time = size.attention_flops / ATTENTION_RATE + size.other_flops / OTHER_RATE
    generation = num_steps * passes * pass_time / TERA
    call = size.attention_flops / ATTENTION_RATE / size.layers / TERA  # one layer's dense call
    captured = Counter(how.bands.captured(num_steps).values())
    first, later = _calls(how, size, efficiency)
    # In a batch that holds both branches a captured call is of both.
    batch = passes if size.family.batched_cfg else 1
    calls = sum(first + (count - 1) * later for count in captured.values())
    bands = len(captured)
    kept = sum(_density(want) for want in how.wanted) * _portion(how)
    micro = kept / efficiency * MICRO_RUNS * batch
    screening = 0.0
    if how.screens:
        pairs = len(screened_layers(size.layers)) * min(bands, 2)
        screening = 1.0 + pairs * _pair(how, size, efficiency) * call * batch / generation
    return Expected(
        generation,
        (bands + 1) / 2 if sequential == "bands" else 1.0,
        calls * size.layers * call * batch / generation,
        micro * call / generation if timing else 0.0,
        2.0 if check else 0.0,
        units,
        sum(captured.values()) * size.layers,
        _state(how, size, num_steps, batch),
        screening,
    )


def _portion(how: Measuring) -> float:
    """Give the share of the candidates that make the shortlist: which ones is not known yet."""
    return how.measured / len(how.wanted)


def _pair(how: Measuring, size: ModelSize, efficiency: float) -> float:
    """Count the dense calls that screening takes on one layer in one step band."""
    share = min(1.0, ROWS * block_for(size.grid) / size.grid.tokens)
    attend = sum(_density(want) for want in how.wanted) / efficiency
    return 3 + SEARCH + share * attend + TRIES * OWN * len(how.wanted)


def _state(how: Measuring, size: ModelSize, num_steps: int, batch: int) -> dict[str, int]:
    """Play each method by its default params on tensors without data.

    Of many candidates those that remember most are taken to be on the shortlist, as far as it
    may hold them.
    """
    names = [want.method for want in how.wanted]
    one = {
        name: forecast_method(
            name, build_method(name, method_class(name).at_start), size, num_steps, batch
        ).state_bytes
        for name in dict.fromkeys(names)
    }
    if not how.screens:
        return {name: one[name] * names.count(name) * size.layers for name in one}
    found, room = dict.fromkeys(one, 0), how.state_limit
    for name in sorted(names, key=lambda name: -one[name])[: how.measured]:
        if one[name] * size.layers <= room:
            found[name] += one[name] * size.layers
            room -= one[name] * size.layers
    return found


def _calls(how: Measuring, size: ModelSize, efficiency: float) -> tuple[float, float]:
    """Count dense calls: of a band's first captured call of a layer, and of a later one."""
    rows = how.rows(size.grid)
    tokens = size.grid.tokens
    share = 1.0 if rows is None else min(1.0, rows * block_for(size.grid) / tokens)
    first = later = 1.0
    methods = [build_method(want.method, want.params) for want in how.wanted]
    if any(method.at_start for method in methods):
        first += SEARCH
    portion = _portion(how)
    for want, method in zip(how.wanted, methods, strict=True):
        attend = _density(want) / efficiency
        later += portion * (share * attend + OWN)
        if method.period is not None:
            first += portion * (attend + OWN)  # its mask on all rows, beside the dense result
        else:
            first += portion * ((0.0 if method.at_start else share * attend) + OWN)
    return first, later


def _density(want: Wanted) -> float:
    """Guess what a candidate keeps: its level, or what its params ask for."""
    if want.level is not None:
        return want.level
    asked = build_method(want.method, want.params).asked_density
    return UNKNOWN if asked is None else asked
