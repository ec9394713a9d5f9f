# SPDX-License-Identifier: Apache-2.0
"""Re-ttention against sums over kept and dropped keys written out in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import StrategyError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.params import build_method, params_of
from dit_sparse.methods.rettention import Rettention
from tests.methods.chosen import runs, valid_keys
from tests.methods.naive import NaiveOps, make_call, run, token_mask

NARROW = {"decay_factor": 0.2, "block_size": 3, "sink": False}
MASKS = {
    "radial": NARROW,
    "window": {"share": 0.3, "block_size": 3},
    "pooled": {"density": 0.4, "block_size": 3},
    "xattention": {"threshold": 0.5, "stride": 2, "block_size": 4},
    "blade": {"density": 0.4, "samples": 2, "block_size": 4},
    "svg": {"density": 0.3, "rows": 4, "sink": False, "block_size": 3},
    "svg2": {"top_p": 0.4, "first_iterations": 3, "block_size": 8},
}


def weights(call):
    """Exp of all scores, 0 for padding: ``[batch, heads, queries, keys]``, float64."""
    q, k = (x.double().transpose(1, 2) for x in (call.query, call.key))
    found = (q @ k.transpose(-1, -2) * call.scale).exp()
    for b in range(found.shape[0]):
        padding = sorted(set(range(call.grid.tokens)) - set(valid_keys(call, b)))
        found[b, :, :, padding] = 0
    return found


def masked(call, mask, params, state):
    """Which pairs the mask keeps, asked of the mask itself (its own tests say what is right)."""
    batch, tokens, heads, _ = call.query.shape
    call = dataclasses.replace(call, state=state, shared={})
    plan = build_method(mask, params).plan(call, NaiveOps())
    return token_mask(plan, batch, heads, tokens, tokens)


@given(
    runs(num_steps=8), st.integers(2, 5), st.sampled_from([0.0, 0.04, 0.5]), st.booleans(),
    st.integers(0, 3), st.sampled_from(sorted(MASKS)),
)  # fmt: skip
def test_a_run_is_what_the_formula_says(calls, refresh, ramp, clamp, warmup, name):
    method = Rettention(name, MASKS[name], refresh, ramp, clamp)
    first = ratio = dropped = mask = None
    state = {}  # of a mask that runs beside the method's own
    for call in calls[warmup:]:
        plan, output = run(method, call, NaiveOps())
        value = call.value.double().transpose(1, 2)
        weight = weights(call)
        if (call.step - warmup) % refresh == 0:
            mask = masked(call, name, MASKS[name], state)
        kept = weight * mask
        if (call.step - warmup) % refresh == 0:
            if call.step == len(calls) - 1:
                assert plan is None
                continue
            first = call.step
            total = weight.sum(-1, keepdim=True)
            ratio = kept.sum(-1, keepdim=True) / total
            dropped = (weight * ~mask / total) @ value
            wanted = weight / total @ value
            assert plan.complete
        else:
            plan.validate()
            share = ratio + (call.step - first - 1) * ramp
            if clamp:
                share = share.clamp(max=1)
            own = (kept / kept.sum(-1, keepdim=True)) @ value
            wanted = share * own + dropped
            text = torch.ones(call.grid.tokens, dtype=torch.bool)
            text[call.grid.video_start :][: call.grid.video_tokens] = False
            wanted[:, :, text] = own[:, :, text]
        torch.testing.assert_close(output, wanted.transpose(1, 2))


@pytest.mark.parametrize(
    ("mask", "params"),
    [("radial", NARROW), ("gna", {"window": [1, 2, 3], "tile": [2, 2, 2], "exact": True})],
)
def test_a_refresh_computes_each_pair_once(mask, params):
    computed = []

    class Counting(Backends):
        def attend(self, query, key, value, plan, scale):
            computed.append(plan.density())
            return super().attend(query, key, value, plan, scale)

    method = build_method("rettention", {"mask": mask, "mask_params": params})
    random, size = torch.Generator().manual_seed(5), (2, 64, 2, 8)
    qkv = [torch.randn(size, generator=random) for _ in range(3)]
    call = make_call(LatentsGrid(4, 3, 5, 4), 0, 2, num_steps=6, state={})
    call.query, call.key, call.value = qkv
    _, output = run(method, call, Counting())
    total = torch.stack([density.mean() for density in computed]).sum()
    assert len(computed) == 2
    torch.testing.assert_close(total, torch.ones_like(total))
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    weights = (q @ k.transpose(-1, -2) * call.scale).softmax(-1)
    torch.testing.assert_close(output, (weights @ v).transpose(1, 2).float())


@pytest.mark.parametrize(
    ("kept_in", "offload", "size"),
    [("same", False, 8), ("float32", True, 4), ("float16", False, 2)],
)
def test_the_residual_is_as_large_as_said(kept_in, offload, size):
    method = Rettention(mask_params=NARROW, residual_dtype=kept_in, offload=offload)
    state = {}
    grid = LatentsGrid(4, 3, 4, 5)
    outputs = []
    for step in range(2):
        call = make_call(grid, 3, step=step, num_steps=6, state=state)
        outputs.append(run(method, call, NaiveOps())[1])
    # The same inputs again: the second, sparse step gives the dense output back.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-3, atol=2e-3)
    residual = state["residual"]
    assert residual.device.type == "cpu"
    assert residual.untyped_storage().nbytes() == grid.video_tokens * 2 * 8 * size
    assert state["ratio"].untyped_storage().nbytes() == grid.video_tokens * 2 * 8


class Scored(NaiveOps):
    """Ops that count how often pooled scores are asked for."""

    def __init__(self):
        super().__init__()
        self.scored = 0

    def pooled_scores(self, *args):
        self.scored += 1
        return NaiveOps.pooled_scores(*args)


@pytest.mark.parametrize(("own_refresh", "choices"), [(1, 3), (4, 2)])
def test_a_dynamic_mask_is_asked_on_refreshes_and_keeps_its_own_memory(own_refresh, choices):
    params = {"density": 0.4, "block_size": 4, "refresh": own_refresh}
    method, state, ops = Rettention("pooled", params, 3), {}, Scored()
    plans = []
    for step in range(9):
        call = make_call(LatentsGrid(4, 3, 4), step, step=step, num_steps=10, state=state)
        plans.append(run(method, call, ops)[0])
        assert plans[-1].complete == (step % 3 == 0)
    assert plans[1] is plans[2]
    assert plans[4] is plans[5]
    # Refreshes on steps 0, 3 and 6: what is 3 steps old is still good to a refresh of 4.
    assert ops.scored == choices
    same = torch.equal(plans[1].block_mask(), plans[4].block_mask())
    assert same == (own_refresh == 4)
    assert not torch.equal(plans[1].block_mask(), plans[7].block_mask())


def test_a_dynamic_mask_that_keeps_all_stays_dense():
    method, state = Rettention("pooled", {"density": 1.0, "block_size": 4}, 3), {}
    for step in range(5):
        call = make_call(LatentsGrid(4, 3, 4), step, step=step, num_steps=10, state=state)
        _, output = run(method, call, NaiveOps())
        weight = weights(call)
        wanted = weight / weight.sum(-1, keepdim=True) @ call.value.double().transpose(1, 2)
        torch.testing.assert_close(output, wanted.transpose(1, 2))


def test_another_shape_refreshes():
    method, state = Rettention(mask_params=NARROW), {}
    for step, batch in ((0, 1), (1, 2), (2, 2)):
        call = make_call(LatentsGrid(4, 3, 4), 0, batch, step=step, num_steps=9, state=state)
        plan, _ = run(method, call, NaiveOps())
        assert plan.complete == (step < 2)


def test_nested_params_travel_and_are_hashable():
    method = build_method("rettention", {"mask_params": {"decay_factor": 1}})
    same = build_method("rettention", {"mask_params": {"decay_factor": 1.0}})
    assert method == same
    assert hash(method) == hash(same)
    assert build_method("rettention", params_of(method)) == method


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"mask": "adaspa"}, "mask: 'adaspa' cannot be .*: it searches with its own dense calls"),
        (
            {"mask": "sparsed"},
            "mask: 'sparsed' cannot be .*: it searches with its own dense calls",
        ),
        ({"mask": "dense"}, "mask: 'dense' cannot be .*: it keeps everything"),
        ({"mask": "rettention"}, "mask: 'rettention' cannot be .*: it refreshes"),
        (
            {"mask": "blade", "mask_params": {"pooled": 6}},
            "mask: 'blade' cannot be .*: it already compensates",
        ),
        (
            {"mask": "svg2", "mask_params": {"compensate": "means"}},
            "mask: 'svg2' cannot be .*: it already compensates",
        ),
        ({"mask": "centroid"}, "mask: 'centroid' cannot be .*: it already compensates"),
        (
            {
                "mask": "composed",
                "mask_params": {"compensate": "none", "score": "mass", "refresh": 4},
            },
            "mask: 'composed' cannot be .*: it refreshes with its own dense calls",
        ),
        ({"mask": "x"}, "mask must be a method that chooses blocks, got 'x'; try 'window'"),
        ({"mask_params": {"decay": 1}}, "mask_params: unknown key 'decay'.*; radial takes: form"),
        ({"mask_params": {"decay_factor": 0}}, "mask_params: decay_factor must be .* above 0"),
        ({"mask_params": 3}, "mask_params: .*dict.*got 3|mask_params: .*object.*got 3"),
        ({"refresh": 1}, "refresh must be a whole number in .2, 1000000., got 1"),
        ({"ramp": -0.1}, "ramp must lie in .0, 1., got -0.1; try 0.04"),
        ({"residual_dtype": "int8"}, "residual_dtype: .*'same'.*got 'int8'"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises(StrategyError, match=message):
        build_method("rettention", params)
