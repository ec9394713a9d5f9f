# SPDX-License-Identifier: Apache-2.0
"""Others wrap a transformer's forward too: what is taken off first must not cut off the rest."""

from __future__ import annotations

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from tests import tiny
from tests.composition.test_features import alone, build, enable, is_plain


class Counter(ModelHook):
    """A hook of diffusers that counts passes, with or without a forward of its own."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def pre_forward(self, module, *args, **kwargs):
        self.passes += 1
        return args, kwargs


class Owning(Counter):
    """One that calls the model's forward itself, as FasterCache does."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


class Wrapping:
    """What a user may put over forward by hand."""

    def __init__(self, module):
        self.inner, self.passes = module.forward, 0
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.passes += 1
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", [Counter, Owning])
@pytest.mark.parametrize("order", ["ours first", "ours last", "ours between"])
def test_hooks_of_diffusers_stay_when_ours_goes(kind, order):
    stock, plain = alone("flux")
    pipe, args = build("flux")
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    hooks = []

    def register():
        hooks.append(kind())
        registry.register_hook(hooks[-1], f"counter{len(hooks)}")

    if order != "ours first":
        register()
    handle = enable(pipe)
    if order != "ours last":
        register()
    assert torch.equal(tiny.run(pipe, args), plain)
    assert not handle.report().reasons
    pipe.disable_sparse_attention()
    before = [hook.passes for hook in hooks]
    assert min(before) > 0
    assert torch.equal(tiny.run(pipe, args), stock)
    assert [hook.passes for hook in hooks] == [2 * passes for passes in before]
    enable(pipe)
    for i in reversed(range(len(hooks))):  # the other way round diffusers loses the outer one
        registry.remove_hook(f"counter{i + 1}", recurse=False)
    assert torch.equal(tiny.run(pipe, args), plain)
    assert [hook.passes for hook in hooks] == [2 * passes for passes in before]
    pipe.disable_sparse_attention()
    assert is_plain(pipe)
    assert "forward" not in pipe.transformer.__dict__


def test_a_wrapper_that_hides_ours_keeps_an_inert_one():
    stock, plain = alone("flux")
    pipe, args = build("flux")
    enable(pipe)
    outer = Wrapping(pipe.transformer)
    assert torch.equal(tiny.run(pipe, args), plain)
    passes = outer.passes
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)
    assert outer.passes == 2 * passes
    enable(pipe)
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)


def test_a_forward_that_was_put_aside_can_be_bound_again():
    """cache-dit keeps ``forward``, puts its own in place, and binds the kept one at the end."""
    stock, plain = alone("flux")
    pipe, args = build("flux")
    model, times = pipe.transformer, []
    handle = enable(pipe)
    kept = model.forward

    def counted(self, *args, **kwargs):
        times.append(self)
        return kept(*args, **kwargs)

    model.forward = counted.__get__(model)
    assert torch.equal(tiny.run(pipe, args), plain)
    assert len(times) == 4
    model.forward = kept.__get__(model)
    assert torch.equal(tiny.run(pipe, args), plain)
    assert len(times) == 4
    assert handle.report().sparse_rows
    pipe.disable_sparse_attention()
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), stock)


@pytest.mark.parametrize("family", ["flux", "pixart_sigma"])  # PixArt opens no cache_context
def test_accelerates_hook_may_come_and_go_over_and_under_ours(family):
    stock, plain = alone(family)
    pipe, args = build(family)
    pipe.enable_model_cpu_offload(device="cpu")
    enable(pipe)
    for _ in range(3):  # diffusers takes accelerate's hooks off and on again after every run
        assert torch.equal(tiny.run(pipe, args), plain)
    pipe.disable_sparse_attention()
    assert hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(tiny.run(pipe, args), stock)
    enable(pipe)
    pipe.remove_all_hooks()
    assert torch.equal(tiny.run(pipe, args), plain)
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.remove_all_hooks()
    pipe.disable_sparse_attention()
    assert is_plain(pipe)


def test_calling_forward_itself_is_sparse_too():
    pipe, args = build("wan")
    model = pipe.transformer
    inputs = {
        "hidden_states": tiny.normal(1, 16, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": args["prompt_embeds"],
    }
    handle = model_handle(model)
    with torch.no_grad():
        called = model(**inputs).sample
        assert torch.equal(model.forward(**inputs).sample, called)
    assert handle.report().density < 1
    # A block by itself: the grid of the last pass is not taken for its grid.
    block = model.blocks[0]
    hidden = tiny.normal(1, 72, 24)
    rotary = model.rope(inputs["hidden_states"])
    with torch.no_grad():
        block(hidden, tiny.normal(1, 512, 24), torch.zeros(1, 6, 24), rotary)
    assert any("token grid" in reason for reason in handle.report().reasons)


def model_handle(model):
    """Attach to a bare transformer, at the first step."""
    import dit_sparse

    options = {"form": "paper", "decay_factor": 0.3, "block_size": 8}
    handle = dit_sparse.enable(model, "radial", **options)
    handle.at(0, 2)
    return handle


def test_an_attachment_that_fails_leaves_nothing(monkeypatch):
    from dit_sparse.pipelines import taps

    stock, _ = alone("flux")
    pipe, args = build("flux")

    def fail(*_):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(taps, "attach", fail)
        with pytest.raises(RuntimeError, match="no"):
            enable(pipe)
    assert pipe.sparse_attention is None
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_processors_put_aside_by_fused_qkv_come_back_plain():
    stock, _ = alone("cogvideox")
    pipe, args = build("cogvideox")
    enable(pipe)
    pipe.transformer.fuse_qkv_projections()
    tiny.run(pipe, args)
    pipe.disable_sparse_attention()
    pipe.transformer.unfuse_qkv_projections()
    assert is_plain(pipe)
    stock_class = diffusers.models.attention_processor.CogVideoXAttnProcessor2_0
    assert all(type(p) is stock_class for p in pipe.transformer.attn_processors.values())
    assert torch.equal(tiny.run(pipe, args), stock)
