# SPDX-License-Identifier: Apache-2.0
"""Patches of what a model's processors call: they apply, and end, as in the stock model."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers import transformer_flux, transformer_wan
from torch.nn import functional

import dit_sparse
from tests import tiny

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "flux", "pixart_sigma")
GNA = {"window": (2, 3, 3), "tile": (2, 2, 2)}


def build(family):
    pipe, args = tiny.PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args


@pytest.fixture
def patched(monkeypatch):
    """Patch torch's attention the way SageAttention's users do; note how it is called."""
    stock, calls = functional.scaled_dot_product_attention, []

    def attention(query, key, value, *args, **kwargs):
        calls.append((tuple(query.shape), len(args), sorted(kwargs)))
        return 0.5 * stock(query, key, value, *args, **kwargs)

    def switch(on):
        wanted = attention if on else stock
        monkeypatch.setattr(functional, "scaled_dot_product_attention", wanted)
        taken = calls.copy()
        calls.clear()
        return taken

    return switch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_of_torchs_attention_comes_and_goes(family, patched):
    pipe, args = build(family)
    stock = tiny.run(pipe, args)
    patched(True)
    theirs = tiny.run(pipe, args)
    wanted = patched(False)
    assert wanted
    assert not torch.equal(theirs, stock)

    patched(True)  # it is there when sparse attention is enabled, and goes
    pipe.enable_sparse_attention("dense", strict=True)
    assert torch.equal(tiny.run(pipe, args), theirs)
    assert patched(False) == wanted
    assert torch.equal(tiny.run(pipe, args), stock)
    patched(True)  # it comes after, and goes
    assert torch.equal(tiny.run(pipe, args), theirs)
    assert patched(False) == wanted
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)
    pipe.enable_sparse_attention("dense", strict=True)
    assert torch.equal(tiny.run(pipe, args), stock)
    assert not patched(False)


def test_a_patch_comes_and_goes_in_compiled_regions(patched):
    pipe, args = build("cogvideox")
    stock = tiny.run(pipe, args)
    pipe.enable_sparse_attention("dense", strict=True)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(tiny.run(pipe, args), stock, rtol=0, atol=1e-5)
        patched(True)
        assert not torch.allclose(tiny.run(pipe, args), stock, rtol=0, atol=1e-3)
        assert patched(False)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_a_patch_of_a_models_own_module_comes_and_goes(family, monkeypatch):
    module = {"wan": transformer_wan, "flux": transformer_flux}[family]
    dispatch = module.dispatch_attention_fn
    pipe, args = build(family)
    stock = tiny.run(pipe, args)
    pipe.enable_sparse_attention("dense", strict=True)
    assert torch.equal(tiny.run(pipe, args), stock)
    with monkeypatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", lambda *a, **k: 0.5 * dispatch(*a, **k))
        halved = tiny.run(pipe, args)
        pipe.disable_sparse_attention()
        assert torch.equal(tiny.run(pipe, args), halved)
    assert not torch.equal(halved, stock)
    pipe.enable_sparse_attention("dense", strict=True)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_any_other_name_of_the_processors_module_may_be_patched(monkeypatch):
    rotary = transformer_flux.apply_rotary_emb
    pipe, args = build("flux")
    stock = tiny.run(pipe, args)
    pipe.enable_sparse_attention("dense", strict=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            transformer_flux, "apply_rotary_emb", lambda x, *a, **k: 2 * rotary(x, *a, **k)
        )
        doubled = tiny.run(pipe, args)
        pipe.disable_sparse_attention()
        assert torch.equal(tiny.run(pipe, args), doubled)
    assert not torch.equal(doubled, stock)
    pipe.enable_sparse_attention("dense", strict=True)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_a_processors_class_may_be_patched(monkeypatch):
    cls = transformer_wan.WanAttnProcessor
    usual = cls.__call__
    pipe, args = build("wan")
    stock = tiny.run(pipe, args)
    with dit_sparse.sparse_attention(pipe, "gna", strict=True, **GNA) as handle:
        sparse = tiny.run(pipe, args)
        blocks, passed = pipe.transformer.blocks, []

        def counted(self, attn, *args, **kwargs):
            passed.append(attn)
            return usual(self, attn, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(cls, "__call__", counted)
            assert torch.equal(tiny.run(pipe, args), sparse)
            assert all(any(block.attn1 is attn for attn in passed) for block in blocks)
            assert handle.report().density < 1
        passed.clear()
        assert torch.equal(tiny.run(pipe, args), sparse)
        assert not passed
    assert torch.equal(tiny.run(pipe, args), stock)
