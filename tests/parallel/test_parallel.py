# SPDX-License-Identifier: Apache-2.0
"""What can be known of context parallelism in one process: order of tokens, heads, refusals."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import ContextParallelConfig
from hypothesis import given
from hypothesis import strategies as st

import dit_sparse
from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method
from dit_sparse.pipelines import parallel
from tests import tiny
from tests.models import case as models
from tests.models.builders import CASES as CLASSES
from tests.parallel.cases import APART

ULYSSES = ContextParallelConfig(ulysses_degree=2)
RING = ContextParallelConfig(ring_degree=2)
UNIFIED = ContextParallelConfig(ulysses_degree=2, ring_degree=2)


def arrived(text, video, processes):
    """Number the tokens as they arrive, from how diffusers splits and concatenates them."""
    parts = zip(text.tensor_split(processes), video.tensor_split(processes), strict=True)
    return torch.cat([each for pair in parts for each in pair])


@given(
    text=st.integers(1, 40),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    processes=st.integers(2, 8),
)
def test_interleaved_tokens_are_put_in_order(text, size, processes):
    tokens = text + size[0] * size[1] * size[2]
    numbers = torch.arange(tokens)
    came = arrived(numbers[:text], numbers[text:], processes)[None, :, None, None]
    pieces = parallel.interleaved((*size, text), processes)
    ordered = parallel.in_order(came, pieces)
    assert torch.equal(ordered.flatten(), numbers)
    assert torch.equal(parallel.as_split(ordered, pieces), came)


def test_video_alone_arrives_in_order():
    assert parallel.interleaved((3, 4, 5, 0), 4) == []
    assert parallel.interleaved(None, 4) == []


@given(heads=st.integers(1, 64), processes=st.integers(2, 8))
def test_every_head_is_in_one_share(heads, processes):
    each = -(-heads // processes)
    if each * (processes - 1) >= heads:
        return  # diffusers forbids it: a process would have no head
    owners = torch.arange(each * processes)[:heads].tensor_split(
        [each * rank for rank in range(1, processes)]
    )
    for rank, own in enumerate(owners):
        mesh = SimpleNamespace(get_local_rank=lambda rank=rank: rank)
        context = SimpleNamespace(ulysses_degree=processes, _ulysses_mesh=mesh)
        share = parallel.share_of(SimpleNamespace(context_parallel_config=context), heads)
        assert share == (int(own[0]), heads)


@pytest.mark.parametrize(
    ("family", "config", "plan", "words"),
    [
        ("wan", RING, None, r"ring_degree=2\).*some of the keys.*ContextParallelConfig\(ulysses"),
        ("wan", UNIFIED, None, "some of the keys"),
        ("flux", RING, None, "some of the keys"),
        ("wan", SimpleNamespace(tp_degree=2), None, "tensor parallelism.*ulysses_degree"),
        (
            "wan",
            ContextParallelConfig(ulysses_degree=4),
            None,
            r"does not divide the number of heads \(2\)",
        ),
        ("wan", ULYSSES, {"": {}}, "custom context parallel plan.*omit cp_plan"),
        ("hunyuan_video", ULYSSES, None, "no plan.*accelerate launch"),
        ("hunyuan_video", ULYSSES, {"": {}}, "no plan.*custom plan"),
        ("cogvideox", ULYSSES, None, "no plan.*accelerate launch"),
        ("pixart_sigma", ULYSSES, None, "no plan.*accelerate launch"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(family, config, plan, words):
    pipe, args = tiny.PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.enable_sparse_attention("radial", **method_class("radial").example)
    sparse = tiny.run(pipe, args, num_inference_steps=2)
    with pytest.raises(dit_sparse.AttachError, match=words):
        pipe.transformer.enable_parallelism(config=config, cp_plan=plan)
    assert pipe.transformer._parallel_config is None
    assert torch.equal(tiny.run(pipe, args, num_inference_steps=2), sparse)
    assert not handle.report().reasons
    pipe.disable_sparse_attention()
    assert "enable_parallelism" not in pipe.transformer.__dict__
    # The other way round. Setting it up needs processes: only what is left of it is set here.
    pipe.transformer._parallel_config = config
    if plan is None:
        with pytest.raises(dit_sparse.AttachError, match=words):
            pipe.enable_sparse_attention("radial", **method_class("radial").example)
        assert pipe.sparse_attention is None


def test_a_plan_of_another_shape_is_not_trusted(monkeypatch):
    pipe, _ = tiny.flux()
    plan = {"": {"hidden_states": None}, "proj_out": None}  # text whole in every process
    monkeypatch.setattr(type(pipe.transformer), "_cp_plan", plan)
    pipe.transformer._parallel_config = ULYSSES
    with pytest.raises(dit_sparse.AttachError, match="token order of the plan"):
        pipe.enable_sparse_attention("radial")


@pytest.mark.parametrize("name", ["LTXVideoTransformer3DModel", "HeliosTransformer3DModel"])
def test_a_class_whose_order_was_not_tried_is_refused(name):
    model = models.make(name, CLASSES[name])
    dit_sparse.enable(model, "radial")
    with pytest.raises(dit_sparse.AttachError, match="token order of the plan"):
        model.enable_parallelism(config=ULYSSES)
    assert model._parallel_config is None


def outputs(name, params, heads):
    """Run a method for some of four heads over four steps: output at each step, all heads."""
    grid, ops, state = LatentsGrid(3, 4, 6), Backends("reference"), {}
    method, found = build_method(name, params), []
    shape = (1, grid.tokens, 4, 16)
    for step in range(4):
        q, k, v = (tiny.normal(*shape, seed=3 * step + i) for i in range(3))
        q, k, v = (3 * q[:, :, heads], k[:, :, heads], v[:, :, heads])
        call = AttentionCall(
            q, k, v, grid, 0.25, heads=tuple(heads), step=step, num_steps=4, state=state
        )
        plan = method.plan(call, ops)
        if plan is None:
            plan = dit_sparse.BlockPlan.full(call.layout(8), call.layout(8))
        output, lse = ops.attend(q, k, v, plan, call.scale)
        found.append(method.finish(call, output, lse, ops))
    return torch.stack(found)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_who_else_is_on_a_process_matters_only_where_it_is_said(name):
    params = APART[name][0] if name in APART else method_class(name).example
    whole = outputs(name, params, [0, 1, 2, 3])
    halves = torch.cat([outputs(name, params, [0, 1]), outputs(name, params, [2, 3])], 3)
    alike = torch.allclose(whole, halves, rtol=0, atol=1e-5)
    assert alike == (not build_method(name, params).heads_tied)


def test_head_levels_switched_off_need_no_remark():
    assert parallel.remarks(dit_sparse.Strategy.single("adaspa"))
    assert not parallel.remarks(dit_sparse.Strategy.single("adaspa", recall_threshold=1.0))
    assert not parallel.remarks(dit_sparse.Strategy.single("radial"))
