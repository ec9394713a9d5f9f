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

if TYPE_CHECKING:
    from dit_sparse.pipelines.size import ModelSize
    from dit_sparse.profiler.candidates import Wanted
    from dit_sparse.profiler.capture import Measuring

OWN = 0.01  # of a dense call: what a candidate takes beside attention, to plan and to be compared
UNKNOWN = LEVELS[1]  # density of a candidate whose params do not say it
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
        return self.generation * (self.per_unit * self.units + self.timing + self.check)


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
    micro = sum(_density(want) for want in how.wanted) / efficiency * MICRO_RUNS * batch
    return Expected(
        generation,
        (bands + 1) / 2 if sequential == "bands" else 1.0,
        calls * size.layers * call * batch / generation,
        micro * call / generation if timing else 0.0,
        2.0 if check else 0.0,
        units,
        sum(captured.values()) * size.layers,
        _state(how, size, num_steps, batch),
    )


def _state(how: Measuring, size: ModelSize, num_steps: int, batch: int) -> dict[str, int]:
    """Play each method by its default params on tensors without data."""
    found: Counter[str] = Counter()
    for name, count in Counter(want.method for want in how.wanted).items():
        method = build_method(name, method_class(name).at_start)
        one = forecast_method(name, method, size, num_steps, batch).state_bytes
        found[name] = one * count * size.layers
    return dict(found)


def _calls(how: Measuring, size: ModelSize, efficiency: float) -> tuple[float, float]:
    """Count dense calls: of a band's first captured call of a layer, and of a later one."""
    rows = how.rows(size.grid)
    tokens = size.grid.tokens
    share = 1.0 if rows is None else min(1.0, rows * block_for(size.grid) / tokens)
    first = later = 1.0
    methods = [build_method(want.method, want.params) for want in how.wanted]
    if any(method.at_start for method in methods):
        first += SEARCH
    for want, method in zip(how.wanted, methods, strict=True):
        attend = _density(want) / efficiency
        later += share * attend + OWN
        if method.period is not None:
            first += attend + OWN  # its mask on all rows, beside the dense result
        else:
            first += (0.0 if method.at_start else share * attend) + OWN
    return first, later


def _density(want: Wanted) -> float:
    """Guess what a candidate keeps: its level, or what its params ask for."""
    if want.level is not None:
        return want.level
    asked = build_method(want.method, want.params).asked_density
    return UNKNOWN if asked is None else asked
