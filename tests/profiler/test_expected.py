# SPDX-License-Identifier: Apache-2.0
"""The forecast of a search, counted again by hand."""

from dataclasses import replace

import pytest

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.forecast.generation import ATTENTION_RATE, OTHER_RATE
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.size import ModelSize
from dit_sparse.profiler.candidates import parse_candidates
from dit_sparse.profiler.capture import Bands, Measuring
from dit_sparse.profiler.expected import expected

HALVES = Bands((0.0, 0.5, 1.0))
SIZE = ModelSize(
    class_name="WanTransformer3DModel",
    family=family_by_name("WanTransformer3DModel"),
    grid=LatentsGrid(20, 64, 64),
    layers=4,
    heads=2,
    head_dim=64,
    parameters=1,
    attention_flops=ATTENTION_RATE * 1e12 * 8,  # two seconds a layer
    other_flops=OTHER_RATE * 1e12 * 3,
)


def test_a_search_by_hand():
    how = Measuring(parse_candidates("radial,adaspa:density=0.25"), HALVES)
    found = expected(SIZE, how, num_steps=10, units=3, passes=2, efficiency=0.5)
    assert found.generation == pytest.approx(10 * 2 * 11)
    share = 64 * 128 / 81920
    radial = share * (0.5 + 0.25 + 0.125) / 0.5 + 3 * 0.01
    first = 1 + 1 + radial + 0.01  # the dense result, a search, Radial, AdaSpa's lists
    later = 1 + radial + share * 0.25 / 0.5 + 0.01
    assert found.captured == 2 * 2 * 4
    assert found.measuring * found.generation == pytest.approx(2 * 4 * 2 * (first + later))
    assert found.timing * found.generation == pytest.approx(10 * (0.875 + 0.25) / 0.5 * 2)
    assert found.per_unit == pytest.approx(1 + found.measuring)
    whole = 3 * found.per_unit + found.timing + 2
    assert found.seconds == pytest.approx(whole * found.generation)
    assert found.state_bytes == found.state["adaspa"] > 0 == found.state["radial"]


def test_bands_in_order_and_batches_of_both_branches():
    how = Measuring(parse_candidates("radial"), HALVES, sample=0)
    plain = expected(SIZE, how, num_steps=10, units=1, passes=2, check=False, timing=False)
    bands = expected(SIZE, how, num_steps=10, units=1, passes=2, sequential="bands")
    assert (plain.own, bands.own) == (1.0, 1.5)
    assert (plain.check, plain.timing) == (0.0, 0.0)
    both = replace(SIZE, family=replace(SIZE.family, batched_cfg=True))
    batched = expected(both, how, num_steps=10, units=1, passes=2)
    assert batched.generation == plain.generation
    assert batched.measuring == pytest.approx(2 * plain.measuring)


def test_a_compensating_method_needs_memory_for_every_layer():
    how = Measuring(parse_candidates("rettention"), HALVES)
    found = expected(SIZE, how, num_steps=10, units=1, passes=2)
    residual = 81920 * 2 * 64 * 2  # bf16
    assert found.state_bytes >= 3 * 4 * residual


def test_screening_costs_one_generation_and_some_calls():
    """Of ten layers three are screened, in two bands; the shortlist is measured on all calls."""
    size = replace(SIZE, layers=10, attention_flops=SIZE.attention_flops / 4 * 10)
    wanted = parse_candidates("radial,pooled,svg2")
    plain = expected(size, Measuring(wanted, HALVES, shortlist=0), num_steps=10, units=1, passes=2)
    found = expected(size, Measuring(wanted, HALVES, shortlist=3), num_steps=10, units=1, passes=2)
    assert plain.screening == 0
    attend = 3 * (0.5 + 0.25 + 0.125) / 0.9 * 6 * 128 / 81920
    pair = 2 * (3 + 1 + attend + 9 * 4 * 0.01)  # seconds; two for a dense call
    assert (found.screening - 1) * found.generation == pytest.approx(3 * 2 * pair)
    first, later = (found.measuring, plain.measuring)
    calls = 2 * 2 * 10 * 2 / found.generation  # the dense results alone
    assert (first - calls) == pytest.approx((later - calls) / 3)
    assert found.seconds - plain.seconds == pytest.approx(
        found.generation
        * (found.screening + found.measuring + found.timing - plain.measuring - plain.timing)
    )
