# SPDX-License-Identifier: Apache-2.0
"""A strategy run call by call, without Diffusers; the samples' tests compare whole generations."""

import pytest
import torch

from dit_sparse import GeometryError, LatentsGrid, Strategy, StrategyError
from dit_sparse.attach.runtime import Runtime
from dit_sparse.kernels import reference
from dit_sparse.methods.params import build_method
from dit_sparse.strategy import Rule
from tests import tiny
from tests.methods.naive import make_call

GRID = LatentsGrid(3, 4, 6)
METHOD = {"window": [1, 3, 3], "tile": [1, 4, 4]}
HALF = Strategy(name="half", rules=(Rule(method="gna", heads=(1,), params=METHOD),))


def inputs(heads=2):
    return tuple(tiny.normal(1, GRID.tokens, heads, 8, seed=i) for i in range(3))


def place(**changes):
    return {"grid": GRID, "layer": 0, "step": 0, "num_steps": 2, **changes}


def test_heads_of_a_rule_are_sparse_and_the_others_go_to_the_program():
    runtime, (q, k, v) = Runtime(HALF, num_layers=1, num_heads=2), inputs()
    plans = []
    runtime.watch = lambda call, plan, name: plans.append((call.heads, plan))
    given = []

    def dense(query, key, value):
        given.append(query.shape[2])
        return torch.zeros_like(query)

    output = runtime.attend(q, k, v, dense=dense, scale=0.5, **place())
    assert given == [1]
    assert output[:, :, 0].eq(0).all()
    (plan,) = [each for heads, each in plans if heads == (1,)]
    wanted, _ = reference.attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], plan, 0.5)
    torch.testing.assert_close(output[:, :, 1:], wanted.float())
    (row, *_) = runtime.report().rows
    assert row["layer"] == 0


def test_every_call_is_planned_on_its_own_grid():
    runtime, plans = Runtime(HALF, num_layers=1, num_heads=2), []
    runtime.watch = lambda call, plan, name: plans.append((call.grid, plan))
    grids = (
        GRID,
        LatentsGrid(2, 4, 6),
        LatentsGrid(3, 6, 4),
        GRID,
    )  # the third is as long
    for grid in grids:
        q, k, v = (tiny.normal(1, grid.tokens, 2, 8, seed=i) for i in range(3))
        runtime.attend(q, k, v, grid=grid, layer=0, step=0, num_steps=2)
    seen = [(grid, plan) for grid, plan in plans if plan is not None]
    assert [grid for grid, _ in seen] == list(grids)
    for grid, plan in seen:
        fresh = build_method("gna", METHOD).plan(make_call(grid, heads=1), None)
        assert torch.equal(plan.block_mask(), fresh.block_mask())


@pytest.mark.parametrize("scale", [None, 0.7])
def test_without_a_program_dense_is_torchs(scale):
    runtime, (q, k, v) = Runtime(Strategy(name="none"), num_layers=1, num_heads=2), inputs()
    by = 8**-0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * by
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).float()
    torch.testing.assert_close(runtime.attend(q, k, v, scale=scale, **place()), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 1}, r"layer must lie in \[0, 1\), got 1"),
        ({"layer": -1}, "got -1"),
        (
            {"key": tiny.normal(1, 9, 2, 8), "value": tiny.normal(1, 9, 2, 8)},
            "compute cross-attention without dit_sparse",
        ),
        ({"value": tiny.normal(1, 72, 1, 8)}, "the same number of tokens and heads"),
        (
            {"heads": 4},
            r"half has rules for individual heads of 2, but this call has 4 heads \(split",
        ),
    ],
)
def test_calls_that_cannot_be_right_raise(changes, message):
    runtime = Runtime(HALF, num_layers=1, num_heads=2)
    q, k, v = inputs(changes.pop("heads", 2))
    k, v = changes.pop("key", k), changes.pop("value", v)
    with pytest.raises(GeometryError, match=message):
        runtime.attend(q, k, v, **place(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": None}, "transformer, layer 0: the grid of tokens of this call is unknown"),
        ({"step": None}, "the step of this call is unknown"),
        ({"step": 2}, "the step of this call is unknown"),
        ({"grid": LatentsGrid(1, 4, 6)}, "has 24 tokens, but attention was called with 72"),
    ],
)
def test_what_is_not_known_is_dense_once_said_or_raises(changes, message):
    q, k, v = inputs()
    runtime = Runtime(HALF, num_layers=1, num_heads=2)
    dense = Runtime(Strategy(name="none"), num_layers=1, num_heads=2)
    with pytest.warns(UserWarning, match=f"half: dense from now on: .*{message}"):
        output = runtime.attend(q, k, v, **place(**changes))
    assert torch.equal(output, dense.attend(q, k, v, **place()))
    runtime.attend(q, k, v, **place(**changes))  # a second warning would be an error
    with pytest.raises(GeometryError, match=f"{message}.*strict=True forbids"):
        Runtime(HALF, num_layers=1, num_heads=2, strict=True).attend(q, k, v, **place(**changes))


def test_a_strategy_that_does_not_fit_is_refused():
    with pytest.raises(StrategyError, match="head 1 is out of range; this model has 1"):
        Runtime(HALF, num_layers=1, num_heads=1)
    made = Strategy.load("wan2.1-14b.720p.svg2")
    with pytest.raises(
        StrategyError, match="made for WanTransformer3DModel, but this model is a FluxTrans"
    ):
        Runtime(made, num_layers=40, num_heads=40, model_class="FluxTransformer2DModel")
    assert Runtime(made, num_layers=40, num_heads=40).strategy is made
