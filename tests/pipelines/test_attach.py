# SPDX-License-Identifier: Apache-2.0
"""Attaching and detaching when things go wrong: errors before any change, nothing lost."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import diffusers
import pytest
import torch

import dit_sparse
from dit_sparse.pipelines.processors import SITE
from tests import tiny

RADIAL = {"form": "paper", "decay_factor": 0.3, "block_size": 8}
ADASPA = {"density": 0.4, "block_size": 8, "search_steps": (0.0, 0.5)}


@pytest.fixture
def wan():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args, tiny.run(pipe, args)


def is_plain(pipe):
    return not any(
        hasattr(module, SITE) or "stock" in type(getattr(module, "processor", None)).__dict__
        for module in pipe.transformer.modules()
    )


@pytest.mark.parametrize(
    ("profile", "options", "error", "words"),
    [
        ("radal", {}, dit_sparse.StrategyError, "radial"),
        ("no/such/file.json", {}, dit_sparse.StrategyError, "file.json"),
        ("radial", {"windw": 3}, dit_sparse.StrategyError, "windw"),
        ("radial", {"kernel": "warp"}, dit_sparse.KernelError, "warp"),
        ("radial", {"probe": -1}, ValueError, "probe"),
        (3, {}, dit_sparse.StrategyError, "int"),
    ],
)
def test_a_bad_request_changes_nothing(wan, profile, options, error, words):
    pipe, args, stock = wan
    with pytest.raises(error, match=words):
        pipe.enable_sparse_attention(profile, **options)
    assert is_plain(pipe)
    assert pipe.sparse_attention is None
    assert torch.equal(tiny.run(pipe, args), stock)


def test_a_strategy_of_another_model_is_refused(wan):
    pipe, _, _ = wan
    strategy = dit_sparse.Strategy.single("radial").to_dict()
    strategy["model"] = {"classes": ["FluxTransformer2DModel"]}
    with pytest.raises(dit_sparse.StrategyError, match="FluxTransformer2DModel"):
        pipe.enable_sparse_attention(strategy)
    strategy["model"] = None
    strategy["rules"][0]["layers"] = [7]
    with pytest.raises(dit_sparse.StrategyError, match="layer 7"):
        pipe.enable_sparse_attention(strategy)
    assert is_plain(pipe)


def test_an_unsupported_pipeline_is_named():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    with pytest.raises(dit_sparse.UnsupportedError, match="WanTransformer3DModel"):
        pipe.enable_sparse_attention("radial")
    with pytest.raises(dit_sparse.UnsupportedError, match="UNet2DModel"):
        dit_sparse.enable(unet, "radial")


def test_an_old_processor_is_refused_before_any_change():
    pipe, _ = tiny.pixart()
    pipe.transformer.transformer_blocks[1].attn1.set_processor(
        diffusers.models.attention_processor.AttnProcessor()
    )
    with pytest.raises(dit_sparse.UnsupportedError, match="AttnProcessor"):
        pipe.enable_sparse_attention("radial")
    assert is_plain(pipe)


def test_attaching_twice_names_what_is_attached(wan):
    pipe, _, _ = wan
    pipe.enable_sparse_attention("radial", **RADIAL)
    with pytest.raises(dit_sparse.AttachError, match="'radial' is already enabled"):
        pipe.enable_sparse_attention("adaspa")
    with pytest.raises(dit_sparse.AttachError, match="shares this transformer"):
        dit_sparse.enable(pipe.transformer, "adaspa")
    assert pipe.sparse_attention.strategy.name == "radial"
    pipe.disable_sparse_attention()
    with pytest.warns(UserWarning, match="so it cannot be disabled"):
        pipe.disable_sparse_attention()


def test_a_shared_transformer_of_a_dead_pipeline_says_so(wan):
    pipe, args, _ = wan
    model = pipe.transformer
    pipe.enable_sparse_attention("radial", **RADIAL)
    other = diffusers.WanPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    del pipe, wan
    gc.collect()
    # The first pipeline may live on in the fixture: only the message of a dead one is at stake.
    site = next(getattr(m, SITE) for m in model.modules() if hasattr(m, SITE))
    if site._engine() is None:
        with pytest.raises(dit_sparse.AttachError, match="from_pipe"):
            tiny.run(other, args)
    else:
        tiny.run(other, args)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["radial", "adaspa"])
def test_an_exception_in_the_middle_leaves_the_pipeline_usable(wan, kind, method):
    pipe, args, stock = wan
    options = RADIAL if method == "radial" else ADASPA
    pipe.enable_sparse_attention(method, **options)
    whole = tiny.run(pipe, args)

    def stop(_pipe, step, _timestep, tensors):
        if step == 1:
            raise kind("stop")
        return tensors

    with pytest.raises(kind):
        tiny.run(pipe, args, callback_on_step_end=stop)
    assert torch.equal(tiny.run(pipe, args), whole)
    with pytest.raises(kind):
        tiny.run(pipe, args, callback_on_step_end=stop)
    pipe.disable_sparse_attention()
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_an_exception_inside_attention_leaves_the_pipeline_usable(wan, monkeypatch):
    pipe, args, stock = wan
    handle = pipe.enable_sparse_attention("radial", **RADIAL)
    with monkeypatch.context() as patch:
        patch.setattr(type(handle.backends), "attend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.run(pipe, args)
    assert tiny.run(pipe, args).isfinite().all()
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)


@pytest.mark.parametrize("method", ["radial", "adaspa"])
def test_enabling_during_a_generation_takes_effect_at_the_next_pass(wan, method):
    pipe, args, stock = wan

    def switch(running, step, _timestep, tensors):
        if step == 1:
            options = RADIAL if method == "radial" else ADASPA
            running.enable_sparse_attention(method, **options)
        return tensors

    late = tiny.run(pipe, args, callback_on_step_end=switch)
    report = pipe.sparse_attention.report()
    assert report.attached_at == 2
    assert {row["step"] for row in report.rows} == {2, 3}
    assert not torch.equal(late, stock)
    tiny.run(pipe, args)
    assert pipe.sparse_attention.report().attached_at is None
    assert "from step" not in pipe.sparse_attention.summary()


def test_disabling_during_a_generation_takes_effect_at_the_next_pass(wan):
    pipe, args, stock = wan
    handle = pipe.enable_sparse_attention("radial", **RADIAL)

    def switch(running, step, _timestep, tensors):
        if step == 1:
            running.disable_sparse_attention()
        return tensors

    tiny.run(pipe, args, callback_on_step_end=switch)
    assert {row["step"] for row in handle.report().rows} == {0, 1}
    assert torch.equal(tiny.run(pipe, args), stock)


@pytest.mark.parametrize("method", ["radial", "adaspa"])
def test_another_resolution_in_between(wan, method):
    pipe, args, _ = wan
    options = RADIAL if method == "radial" else ADASPA
    with dit_sparse.sparse_attention(pipe, method, strict=True, **options) as handle:
        first = tiny.run(pipe, args)
        small = tiny.run(pipe, args, height=48, width=64, num_frames=5)
        assert handle.report().grid == "2 x 3 x 4"
        assert torch.equal(tiny.run(pipe, args), first)
    with dit_sparse.sparse_attention(pipe, method, strict=True, **options):
        assert torch.equal(tiny.run(pipe, args, height=48, width=64, num_frames=5), small)


def test_state_is_held_during_a_generation_and_freed_after_it(wan):
    pipe, args, _ = wan
    handle = pipe.enable_sparse_attention("adaspa", **ADASPA)
    held = []

    def watch(_pipe, _step, _timestep, tensors):
        held.append(sum(handle.memory.sizes.values()))
        return tensors

    tiny.run(pipe, args, callback_on_step_end=watch)
    assert min(held[:-1]) > 0
    assert held[-1] == 0
    assert not handle.memory.states
    assert handle.report().peak_state_bytes > 0
    with pytest.raises(RuntimeError):
        tiny.run(pipe, args, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError()))
    pipe.disable_sparse_attention()
    assert handle.state_size() == 0


def test_concurrent_pipelines_do_not_share_state():
    made = [tiny.wan(), tiny.hunyuan_video(), tiny.pixart()]
    alone, together = [], [None] * len(made)
    for pipe, args in made:
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_sparse_attention("adaspa", strict=True, **ADASPA)
        alone.append(tiny.run(pipe, args))

    def work(i):
        for _ in range(3):
            together[i] = tiny.run(*made[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_the_handle_is_a_context_manager_and_reports(wan):
    pipe, args, stock = wan
    with pipe.enable_sparse_attention("radial", **RADIAL) as handle:
        assert "no generation has run yet" in handle.summary()
        tiny.run(pipe, args)
        text = str(handle.report())
    assert "radial" in text
    assert "density" in text
    assert torch.equal(tiny.run(pipe, args), stock)
    with pytest.raises(dit_sparse.AttachError, match="not enabled"):
        dit_sparse.report(pipe)


def test_a_mask_that_is_no_text_padding_is_declined_or_raises():
    pipe, args = tiny.hunyuan_video()
    pipe.set_progress_bar_config(disable=True)
    stock = tiny.run(pipe, args)
    model = pipe.transformer
    original = model.context_embedder.forward
    holes = {}

    # The model builds its own prefix mask; a foreign one is put in where attention receives it.
    for block in model.transformer_blocks:
        forward = block.forward

        def with_mask(hidden, text, temb, mask, *rest, forward=forward, **kwargs):
            mask = mask.clone()
            mask[..., 5] = False  # hides a video token
            holes["mask"] = mask
            return forward(hidden, text, temb, mask, *rest, **kwargs)

        block.forward = with_mask
    foreign = tiny.run(pipe, args)
    assert not torch.equal(stock, foreign)
    with dit_sparse.sparse_attention(pipe, "radial", **RADIAL) as handle:
        tiny.run(pipe, args)
        reasons = handle.report().reasons
    assert any("hides more than the text padding" in reason for reason in reasons)
    with (
        dit_sparse.sparse_attention(pipe, "radial", strict=True, **RADIAL),
        pytest.raises(dit_sparse.GeometryError, match="strict"),
    ):
        tiny.run(pipe, args)
    assert torch.equal(tiny.run(pipe, args), foreign)
    assert original is not None


def test_copies_and_pickles_are_plain(wan):
    pipe, args, stock = wan
    pipe.enable_sparse_attention("radial", **RADIAL)
    sparse = tiny.run(pipe, args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = pickle.loads(pickle.dumps(pipe.transformer.blocks[0].attn1.processor))
    assert type(processor) is diffusers.models.transformers.transformer_wan.WanAttnProcessor
    weights = copy.deepcopy(pipe.transformer.state_dict())
    assert torch.equal(tiny.run(pipe, args), sparse)
    pipe.disable_sparse_attention()
    pipe.transformer.load_state_dict(weights)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_nothing_keeps_a_dropped_pipeline_alive():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.enable_sparse_attention("radial", **RADIAL)
    tiny.run(pipe, args)
    watch = weakref.ref(pipe.transformer)
    del pipe, handle
    gc.collect()
    assert watch() is None
