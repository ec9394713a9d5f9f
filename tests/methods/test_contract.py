# SPDX-License-Identifier: Apache-2.0
"""What every method owes: the same tests for each name in the table."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method, param_names, params_of
from dit_sparse.strategy.schedule import Schedule
from tests.methods.naive import NaiveOps, make_call, masked_attention, run, token_mask
from tests.strategies import latents_grids, seeds, valid_text_lengths

NUM_STEPS = 6
names = st.sampled_from(sorted(METHODS))
COMPENSATED = [name for name in sorted(METHODS) if "compensate" in param_names(name)]


def smallest(name):
    """Params that make a method's blocks small enough for these grids."""
    return {"block_size": 4} if "block_size" in param_names(name) else {}


@st.composite
def generations(draw):
    """Draw the calls of one layer over a whole run."""
    text = draw(st.sampled_from([0, 0, 3, 6]))
    size = draw(latents_grids.filter(lambda size: math.prod(size) <= 150))
    grid = LatentsGrid(*size, text, draw(st.booleans()))
    batch, heads, seed = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(seeds) % 10**6
    valid = draw(valid_text_lengths(text, batch)) if text and draw(st.booleans()) else None
    state, shared = {}, {}
    return [
        make_call(
            grid,
            seed + step,
            batch,
            heads,
            step=step,
            num_steps=NUM_STEPS,
            state=state,
            shared=shared,
            text_valid=None if valid is None else torch.tensor(valid),
        )
        for step in range(NUM_STEPS)
    ]


def living(call):
    """Keys that are not padding: bool ``[batch, 1, 1, tokens]``."""
    mask = torch.ones(call.query.shape[0], call.grid.tokens, dtype=torch.bool)
    if call.text_valid is not None:
        place = torch.arange(call.grid.tokens) - call.grid.text_start
        mask &= ~((place >= call.text_valid[:, None]) & (place < call.grid.text_length))
    return mask[:, None, None]


def dropped_blocks(plan, mask):
    """For every (sample, head): pairs of a query and a key block of which it reads nothing."""
    batch, heads, _, keys = mask.shape
    order = torch.arange(keys).expand(batch, heads, -1)
    if plan.kv_permutation is not None:
        order = plan.kv_permutation.expand(batch, heads, -1)
    pairs = torch.zeros(batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            lead = (min(b, plan.kv.starts.shape[0] - 1), min(h, plan.kv.starts.shape[1] - 1))
            for start, length in zip(plan.kv.starts[lead], plan.kv.lengths[lead], strict=True):
                block = order[b, h, start : start + length]
                pairs[b, h] += (~mask[b, h][:, block].any(-1)).sum() if length else 0
    return pairs


@given(names, generations())
def test_keeping_everything_is_dense(name, calls):
    method = build_method(name, smallest(name) | method_class(name).everything)
    ops = NaiveOps()
    for call in calls:
        plan, output = run(method, call, ops)
        if plan is None:
            continue
        wanted, _ = masked_attention(call.query, call.key, call.value, living(call), call.scale)
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(plan.density(), torch.ones_like(plan.density()))


@given(names, generations())
def test_plans_are_sound_on_any_grid(name, calls):
    method = build_method(name, smallest(name))
    ops = NaiveOps()
    for call in calls:
        plan, output = run(method, call, ops)
        if plan is None:
            continue
        plan.validate()
        batch, tokens, heads, _ = call.query.shape
        assert plan.query_length == plan.key_length == tokens
        assert plan.batch in {1, batch}
        assert plan.heads in {1, heads}
        density = plan.density()
        assert bool(((density > 0) & (density <= 1)).all())
        mask = token_mask(plan, batch, heads, tokens, tokens)
        assert not (mask & ~living(call)).any()  # padding takes no part
        span = slice(call.grid.text_start, call.grid.text_start + call.grid.text_length)
        text = living(call)[..., span].expand(-1, heads, tokens, -1)
        assert torch.equal(mask[..., span], text)  # text keys always
        rows = living(call).expand_as(mask)[:, :, span]
        assert torch.equal(mask[:, :, span], rows)  # and text queries
        assert plan.means or bool(mask.any(-1).all())
        pairs = mask.sum((-1, -2)) + (dropped_blocks(plan, mask) if plan.means else 0)
        share = pairs / living(call).expand_as(mask).sum((-1, -2))
        torch.testing.assert_close(density.expand(batch, heads), share.double())
        assert bool(output.isfinite().all())


@given(st.sampled_from(COMPENSATED), generations())
def test_means_stand_in_for_what_the_same_choice_drops(name, calls):
    if "compensate" not in param_names(name):  # a method outside of the table
        return
    pieces = {"select": "top_k"} if name == "composed" else {}  # a budget has to pay for means
    usual, compensated = (
        build_method(name, smallest(name) | pieces | {"compensate": how})
        for how in ("none", "means")
    )
    plans = []
    for method in (usual, compensated):
        for call in calls:
            call.state.clear()
            call.shared.clear()
        plans.append([run(method, call, NaiveOps()) for call in calls])
    for call, (one, _), (other, output) in zip(calls, *plans, strict=True):
        if one is None or one.complete:
            continue
        assert other.means
        assert torch.equal(one.block_mask(), other.block_mask())
        wanted, _ = NaiveOps().attend(call.query, call.key, call.value, other, call.scale)
        torch.testing.assert_close(output, wanted)


@given(names, generations())
def test_the_same_run_twice_is_the_same(name, calls):
    method = build_method(name, smallest(name))

    def outputs():
        for call in calls:
            call.state.clear()
            call.shared.clear()
        found = (run(method, call, NaiveOps())[1] for call in calls)
        return [None if output is None else output.clone() for output in found]

    for one, two in zip(outputs(), outputs(), strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_cheap_planning_is_a_valid_choice(name):
    params = dict(method_class(name).cheap_planning)
    assert params_of(build_method(name, params)).items() >= params.items()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_the_example_drops_blocks(name):
    method, state = build_method(name, method_class(name).example), {}
    kept = []
    for step in range(NUM_STEPS):
        call = make_call(LatentsGrid(6, 8, 6), step, step=step, num_steps=NUM_STEPS, state=state)
        kept.append(float(run(method, call, Backends("reference"))[0].density().mean()))
    assert min(kept) < 0.9


@given(names, latents_grids, st.floats(0.01, 1), st.sampled_from([16, 64, 128]))
def test_params_for_a_density_are_valid(name, size, density, block_size):
    cls, grid = method_class(name), LatentsGrid(*size)
    params = cls.at_density(density, grid, block_size)
    for one in (params or {}, *cls.knobs(density, grid, block_size)):
        build_method(name, smallest(name) | dict(one))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_on_the_same_grid_params_stay(name):
    for params in ({}, method_class(name).everything, method_class(name).example):
        method = build_method(name, params)
        assert method.rescaled(LatentsGrid(3, 4, 5), LatentsGrid(3, 4, 5, 7)) == method


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_few_step_models(name, num_steps):
    method = build_method(name, smallest(name))
    state, shared = {}, {}
    for step in range(num_steps):
        call = make_call(
            LatentsGrid(3, 4, 4), step=step, num_steps=num_steps, state=state, shared=shared
        )
        run(method, call, NaiveOps())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_frozen_hashable_data(name):
    cls = method_class(name)
    method = cls()
    assert dataclasses.is_dataclass(cls)
    assert not hasattr(method, "__dict__")
    assert hash(method) == hash(cls())
    assert isinstance(cls.summary, str)
    assert "\n" not in cls.summary
    assert not set(param_names(name)) & set(Schedule.model_fields)
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)
        assert f"{field.name}:" in cls.__doc__


@pytest.mark.parametrize("name", sorted(METHODS))
def test_params_travel_through_json(name):
    cls = method_class(name)
    for params in ({}, cls.everything, cls.example, cls.at_start, cls.alone):
        method = build_method(name, params)
        written = params_of(method)
        assert tuple(written) == param_names(name)
        assert build_method(name, json.loads(json.dumps(written))) == method


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("radial", {"decay_fact": 1}, "unknown key 'decay_fact' .did you mean 'decay_factor'"),
        ("dense", {"x": 1}, "unknown key 'x'; dense takes: no params"),
        ("radial", {"decay_factor": "1"}, "decay_factor: .* number, got '1'"),
        ("radial", {"block_size": True}, "block_size: .* integer, got True"),
        ("radial", {"block_size": 64.5}, "block_size: .* integer.*, got 64.5"),
        ("radial", {"form": "x"}, "form: .*'paper' or 'released', got 'x'"),
        ("radial", {"decay_factor": None}, "decay_factor: .* number, got None"),
        ("radial", {"decay_factor": float("nan")}, "plain JSON"),
        ("adaspa", {"search_steps": 0.1}, "search_steps: .*array, got 0.1"),
        ("adaspa", {"search_steps": [0.1, "b"]}, "search_steps: .*number"),
        ("adaspa", {"density": 7}, r"density must lie in \(0, 1\], got 7"),
        ("radiall", {}, "unknown method 'radiall'; available methods: adaspa, .*radial"),
    ],
)  # fmt: skip
def test_bad_params_name_the_key(name, params, message):
    with pytest.raises(StrategyError, match=message):
        build_method(name, params)
