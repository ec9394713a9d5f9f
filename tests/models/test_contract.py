# SPDX-License-Identifier: Apache-2.0
"""One contract for every row of the table of models, on tiny models of the real classes."""

from __future__ import annotations

import pytest
import torch

import dit_sparse
from dit_sparse.pipelines import MODELS
from dit_sparse.pipelines.processors import SITE
from tests.models.builders import CASES
from tests.models.case import call, make

# Mochi asks for autocast in float32, and torch says that there is none.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
GNA = {"window": (2, 3, 3), "tile": (2, 2, 2)}
POOLED = {"density": 0.4, "block_size": 8}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    """Build each model once, with what it gives unmodified."""
    found = CASES[request.param]
    model = make(request.param, found)
    return found, model, call(model, found.inputs(1))


def distance(one, other):
    """Give the largest difference, relative to the size of the prediction."""
    return ((one - other).abs().max() / other.abs().max()).item()


def run(model, inputs, method, steps=1, **params):
    """Call a bare model sparsely; give what it predicted, every call's description, the report."""
    calls = []
    with dit_sparse.sparse_attention(model, method, strict=True, **params) as handle:
        handle.watch = lambda described, plan, _: calls.append((described, plan))
        for step in range(steps):
            handle.at(step, steps)
            output = call(model, inputs)
        return output, calls, handle.report()


def grid_of(described):
    grid = described.grid
    return grid.frames, grid.height, grid.width, grid.text_length


def test_every_row_has_a_case():
    assert {name.split("/")[0] for name in CASES} == set(MODELS)


def test_a_dense_strategy_is_the_model_itself(case):
    found, model, stock = case
    assert stock.isfinite().all()
    output, _, report = run(model, found.inputs(1), "dense")
    assert torch.equal(output, stock)
    assert report.density == 1.0
    assert len(report.rows) == found.layers


def test_keeping_every_block_equals_dense(case):
    found, model, stock = case
    output, _, report = run(model, found.inputs(1), "pooled", density=1.0, block_size=16)
    assert report.density == 1.0
    assert not report.reasons
    assert {"native", "cpu"} & set(report.kernels)
    assert distance(output[:, found.unread :], stock[:, found.unread :]) < 1e-5


@pytest.mark.parametrize(("method", "params"), [("gna", GNA), ("pooled", POOLED)])
def test_it_runs_sparse_and_reports_its_grid(case, method, params):
    found, model, stock = case
    output, calls, report = run(model, found.inputs(1), method, **params)
    assert output.isfinite().all()
    assert not torch.equal(output, stock)
    assert 0 < report.density < 1
    assert not report.reasons
    assert len(report.rows) == found.layers
    assert {described.layer for described, _ in calls} == set(range(found.layers))
    assert {grid_of(described) for described, _ in calls} == found.grids(1)
    for described, plan in calls:
        assert described.num_layers == found.layers
        assert plan.density().max() < 1
        if found.bare:
            assert (described.grid.text_length == 0) == (described.layer in found.bare)
        assert described.grid.text_first == (found.first and described.grid.text_length > 0)
    frames, height, width, _ = grid_of(calls[-1][0])
    assert report.grid.startswith(f"{frames} x {height} x {width}")


def test_each_token_stands_where_the_row_says(case):
    """Latents that differ in one token change that one query in the first layer, and no text."""
    found, model, _ = case
    frames, height, width = found.grid
    place = (frames - 1, height - 2, width - 3)  # no two axes alike
    _, before, _ = run(model, found.inputs(1), "gna", **GNA)
    _, after, _ = run(model, found.poked(place), "gna", **GNA)
    (one, _), (two, _) = before[0], after[0]
    changed = (one.query != two.query).flatten(2).any(-1).any(0).nonzero().flatten()
    start = one.grid.video_start
    if found.mixed:
        assert start <= int(changed[0])
        assert int(changed[-1]) < start + found.mixed
    else:
        assert changed.tolist() == [start + (place[0] * height + place[1]) * width + place[2]]


@pytest.mark.parametrize(("method", "params"), [("gna", GNA), ("pooled", POOLED)])
def test_a_batch_of_two_begins_like_its_first_sample(case, method, params):
    found, model, stock = case
    own = distance(call(model, found.inputs(2))[0], stock[0])  # Kandinsky 5 rounds keys to bf16
    both, calls, _ = run(model, found.inputs(2), method, **params)
    alone, _, _ = run(model, found.inputs(1), method, **params)
    assert both.shape[0] == 2
    assert {grid_of(described) for described, _ in calls} == found.grids(2)
    assert distance(both[0], alone[0]) < 1e-4 + 4 * own
    assert own < 1e-4
    assert distance(both[1], alone[0]) > 1e-3


def test_it_is_left_as_it_was(case):
    found, model, stock = case
    run(model, found.inputs(1), "pooled", steps=2, **POOLED)
    for module in model.modules():
        assert not hasattr(module, SITE)
        assert "stock" not in vars(type(getattr(module, "processor", None)))
    assert torch.equal(call(model, found.inputs(1)), stock)
