# SPDX-License-Identifier: Apache-2.0
"""Gradients through sparse attention in a model: against one plain softmax in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.distill.attention import TrainableAttention, check_trainable
from dit_sparse.distill.errors import DistillError
from dit_sparse.errors import GeometryError
from dit_sparse.kernels import reference
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods.blade import Blade
from dit_sparse.methods.gilbert import gilbert_order
from dit_sparse.strategy import Strategy
from tests import tiny
from tests.distill import setup

SCALE = 0.5


def one_softmax(query, key, value, plan, grid, pooled, order):
    """Attend to kept keys and, for the video, to the means of every ``pooled`` keys, + ln n."""
    first, last = grid.video_start, grid.video_start + grid.video_tokens
    rows = []
    for h in range(query.shape[2]):
        q, k, v = (x[0, :, h].double() for x in (query, key, value))
        mask, _ = reference.token_mask(plan, 0, h)
        along = order[0, 0, first:last]
        groups = [along[i : i + pooled] for i in range(0, len(along), pooled)]
        keys = torch.cat([k, torch.stack([k[g].mean(0) for g in groups])])
        values = torch.cat([v, torch.stack([v[g].mean(0) for g in groups])])
        is_video = torch.zeros(len(q), dtype=torch.bool)
        is_video[first:last] = True
        coarse = is_video[:, None].expand(-1, len(groups))
        count = torch.tensor([len(g) for g in groups], dtype=torch.float64)
        bias = torch.cat([torch.zeros(len(k), dtype=torch.float64), count.log()])
        score = q @ keys.T * SCALE + bias
        score = score.masked_fill(~torch.cat([mask, coarse], 1), -torch.inf)
        rows.append(score.softmax(-1) @ values)
    return torch.stack(rows, 1)[None]


@given(
    pooled=st.integers(1, 7),
    text=st.sampled_from([0, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_blade_with_pooled_keys_has_the_gradient_of_one_softmax(pooled, text, dtype, seed):
    grid = LatentsGrid(2, 3, 5, text, text_first=False)
    method = Blade(density=0.4, floor=0.0, block_size=8, samples=4, pooled=pooled)
    random = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(1, grid.tokens, 2, 8, generator=random).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    into = torch.randn(1, grid.tokens, 2, 8, generator=random).double()
    ops = Backends("cpu")
    call = AttentionCall(*leaves, grid, SCALE, heads=(0, 1))
    plan = method.plan(call, ops)
    output, lse = ops.attend(*leaves, plan, SCALE)
    found = method.finish(call, output, lse, ops)
    got = torch.autograd.grad((found.double() * into).sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = one_softmax(*exact, plan, grid, pooled, gilbert_order(grid))
    grads = torch.autograd.grad((wanted * into).sum(), exact)
    # LSEs are fp32 numbers, so the merge is fp32 whatever the inputs are.
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(found.double(), wanted, **close)
    for one, other in zip(got, grads, strict=True):
        torch.testing.assert_close(one.double(), other, **close)
    # And it is what sampling computes.
    with torch.no_grad():
        plain, lse = ops.attend(*leaves, plan, SCALE)
        sampled = method.finish(call, plain, lse, ops)
    torch.testing.assert_close(found.detach(), sampled, rtol=1e-5, atol=1e-6)


def outputs(model, args, handle, step, *, grad):
    x = tiny.normal(1, 16, 3, 8, 12, seed=9)
    handle.begin(step, 4)
    with torch.set_grad_enabled(grad):
        return model(
            hidden_states=x,
            timestep=torch.tensor([500]),
            encoder_hidden_states=args["prompt_embeds"],
            return_dict=False,
        )[0]


STRATEGIES = {
    "blade": setup.BLADE_G,
    "pooled": {"method": "pooled", "density": 0.5, "block_size": 16},
    "radial": {"method": "radial", "block_size": 8, "decay_factor": 0.1, "sink": False},
}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_training_pass_is_a_sampling_pass_with_gradients(name):
    pipe, args = setup.pipeline()
    model = pipe.transformer
    options = dict(STRATEGIES[name])
    handle = TrainableAttention(model, Strategy.single(options.pop("method"), **options))
    output = outputs(model, args, handle, 1, grad=True)
    assert list(handle.report().rows[0]["methods"]) == [name]
    assert all(row["reason"] is None for row in handle.report().rows)
    output.square().sum().backward()
    for key in ("to_q", "to_k", "to_v"):
        grad = getattr(model.blocks[0].attn1, key).weight.grad
        assert float(grad.abs().max()) > 0
    again = outputs(model, args, handle, 1, grad=False)
    torch.testing.assert_close(output.detach(), again, rtol=1e-5, atol=1e-5)
    handle.paused = True
    dense = outputs(model, args, handle, 1, grad=False)
    handle.remove()
    assert float((dense - again).abs().max()) > 1e-4


def test_checkpointed_gradients_are_the_same_after_other_passes(tmp_path):
    """The backward pass runs the model again: it must find its own adapter, step and mask."""
    found = {}
    for again in (False, True):
        made = setup.trainer(
            tmp_path / str(again), train={"gradient_checkpointing": again, "iterations": 1}
        )
        # Without training the adapters are zero, and the roles could not be told apart.
        random = torch.Generator().manual_seed(1)
        for role in ("student", "critic"):
            for weight in made.networks.parameters(role).values():
                weight.data.copy_(0.2 * torch.randn(weight.shape, generator=random))
        row = made._distill(0)
        found[again] = row, setup.weights(made)
        made.networks.detach()
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for key, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][key], value, rtol=1e-4, atol=1e-6)


def test_a_call_that_is_not_understood_raises_instead_of_training_dense():
    pipe, args = setup.pipeline()
    model = pipe.transformer
    handle = TrainableAttention(model, Strategy.single("radial", block_size=16))
    stage = handle.stages["transformer"]
    object.__setattr__(stage, "family", _Wrong(stage.family))
    with pytest.raises(GeometryError, match="forbids dense fallback"):
        outputs(model, args, handle, 0, grad=True)
    handle.remove()


class _Wrong:
    """A family whose grid has another number of tokens than attention gets."""

    def __init__(self, family):
        self.family = family

    def __getattr__(self, name):
        return getattr(self.family, name)

    def grid(self, *_):
        return LatentsGrid(1, 1, 1)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("adaspa", {}),
        ("rettention", {}),
        ("sparsed", {}),
        ("composed", {"score": "mass", "refresh": 2}),
    ],
)
def test_methods_that_live_on_earlier_steps_are_refused(method, params):
    with pytest.raises(DistillError, match=rf"rules\[0\]: {method} does not support training"):
        check_trainable(Strategy.single(method, **params))


@pytest.mark.parametrize("method", ["centroid", "composed", "svg2"])
def test_methods_that_choose_on_every_step_are_allowed(method):
    check_trainable(Strategy.single(method))
