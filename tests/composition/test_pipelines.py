# SPDX-License-Identifier: Apache-2.0
"""LoRA through pipelines, modular and guided pipelines, old processors, every method cached."""

from __future__ import annotations

import diffusers
import peft
import pytest
import torch

import dit_sparse
from tests import tiny
from tests.composition.features import NO_CACHE
from tests.composition.switches import LINEARS, STEPS, quietly, seeded
from tests.composition.table import Cannot, Refused, Works, cells
from tests.composition.test_features import SPARSE, alone, build, enable, is_plain

WEIGHTS = "pytorch_lora_weights.safetensors"  # named: diffusers before 0.40 demands it offline
NO_LORA_LOADER = Cannot("diffusers has no LoRA loader for PixArt pipelines")
GUIDED = ("wan", "flux")


@cells(
    "LoRA: load and unload through the pipeline",
    {"pixart_sigma": NO_LORA_LOADER},
    quick=("wan", "pixart_sigma"),
)
def test_lora_of_the_pipeline(family, verdict, tmp_path):
    pipe, args = build(family)
    if isinstance(verdict, Cannot):
        assert not hasattr(pipe, "load_lora_weights")
        return
    stock, plain = alone(family)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "made")
    seeded(pipe.transformer, "lora_")
    weights = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="made")
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    del pipe

    pipe, args = build(family)
    load = quietly(
        lambda: pipe.load_lora_weights(tmp_path, weight_name=WEIGHTS, adapter_name="one")
    )
    load()
    theirs = tiny.run(pipe, args)
    enable(pipe)
    both = tiny.run(pipe, args)
    assert not torch.equal(both, plain)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.run(pipe, args), plain)
    load()
    assert torch.equal(tiny.run(pipe, args), both)
    pipe.set_adapters("one", 0.0)
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.set_adapters("one", 1.0)
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), theirs)
    pipe.unload_lora_weights()
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), stock)


@cells("LoRA: hot swap", {"pixart_sigma": NO_LORA_LOADER}, quick=("flux", "pixart_sigma"))
def test_lora_hot_swap(family, verdict):
    if isinstance(verdict, Cannot):
        assert not hasattr(build(family)[0].transformer, "enable_lora_hotswap")
        return
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, init_lora_weights=False)
    weights = []
    for seed in (3, 4):
        source = build(family)[0].transformer
        source.add_adapter(config, "made")
        seeded(source, "lora_", seed)
        found = peft.get_peft_model_state_dict(source, adapter_name="made")
        weights.append({f"transformer.{name}": value.clone() for name, value in found.items()})

    def load(pipe, i, **options):
        own = {name: value.clone() for name, value in weights[i].items()}  # a swap exchanges them
        pipe.transformer.load_lora_adapter(own, adapter_name="one", **options)

    pipe, args = build(family)
    enable(pipe)
    load(pipe, 1)
    wanted = tiny.run(pipe, args)
    for sparse_first in (True, False):
        pipe, args = build(family)
        pipe.transformer.enable_lora_hotswap(target_rank=2)
        if sparse_first:
            enable(pipe)
        load(pipe, 0)
        if not sparse_first:
            enable(pipe)
        assert not torch.equal(tiny.run(pipe, args), wanted)
        load(pipe, 1, hotswap=True)
        assert torch.equal(tiny.run(pipe, args), wanted)


@cells("modular pipelines", families=GUIDED)
def test_modular(family, verdict):
    assert isinstance(verdict, Works)
    pipe, args = build(family)
    if family == "flux":
        from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep

        blocks = FluxCoreDenoiseStep
    else:
        from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

        blocks = WanCoreDenoiseStep
    modular = blocks().init_pipeline()
    modular.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler)
    modular.set_progress_bar_config(disable=True)
    call = {key: value for key, value in args.items() if key != "guidance_scale"}
    if family == "flux":  # without a VAE it takes eight pixels for a latent one
        call |= {"height": 160, "width": 224}

    def run():
        with torch.no_grad():
            return modular(**call, generator=torch.Generator().manual_seed(0), output="latents")

    stock = run()
    modular.enable_sparse_attention("dense", strict=True)
    assert torch.equal(run(), stock)
    modular.disable_sparse_attention()
    handle = modular.enable_sparse_attention("adaspa", strict=True, **SPARSE)
    ours = run()
    report = handle.report()
    assert {row["step"] for row in report.rows} == set(range(STEPS))
    assert {row["branch"] for row in report.rows} == (
        {"cond", "uncond"} if family == "wan" else {"cond"}
    )
    assert not torch.equal(ours, stock)
    assert torch.equal(run(), ours)
    with pytest.raises(dit_sparse.AttachError, match="first"):
        modular.update_components(transformer=build(family)[0].transformer)
    modular.disable_sparse_attention()
    assert torch.equal(run(), stock)


@cells("PAG pipelines", families=("pixart_sigma",))
def test_perturbed_attention_pipeline(family, verdict):
    assert isinstance(verdict, Works)
    pipe, args = build(family)
    pipe = diffusers.PixArtSigmaPAGPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=pipe.vae,
        transformer=pipe.transformer,
        scheduler=pipe.scheduler,
        pag_applied_layers="blocks.1",
    )
    pipe.set_progress_bar_config(disable=True)
    args["pag_scale"] = 3.0
    theirs = tiny.run(pipe, args)
    with enable(pipe, dense=True):
        assert torch.equal(tiny.run(pipe, args), theirs)
    handle = enable(pipe)
    both = tiny.run(pipe, args)
    assert handle.report().sparse_rows
    assert not torch.equal(both, theirs)
    assert torch.equal(tiny.run(pipe, args), both)
    unguided = tiny.run(pipe, {**args, "pag_scale": 0.0})
    assert not torch.equal(unguided, both)
    pipe.disable_sparse_attention()
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), theirs)


OLD = Refused("a processor that makes no attention call to take over: put the default one back")


@cells("old or sliced attention processors", {"pixart_sigma": OLD}, ("pixart_sigma",))
def test_old_processor(family, verdict):
    assert isinstance(verdict, Refused)
    stock, plain = alone(family)
    pipe, args = build(family)
    module = pipe.transformer.transformer_blocks[1].attn1
    usual = module.processor
    module.set_processor(diffusers.models.attention_processor.AttnProcessor())
    theirs = tiny.run(pipe, args)
    with pytest.raises(dit_sparse.UnsupportedError, match="AttnProcessor"):
        enable(pipe)
    assert is_plain(pipe)
    assert torch.equal(tiny.run(pipe, args), theirs)
    module.set_processor(usual)
    enable(pipe)
    module.set_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(dit_sparse.UnsupportedError, match="AttnProcessor"):  # by the first call
        tiny.run(pipe, args)
    module.set_processor(usual)
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)


@cells("all methods under FirstBlockCache", {"pixart_sigma": NO_CACHE}, ("flux", "pixart_sigma"))
def test_methods_under_a_cache(family, verdict):
    pipe, args = build(family)
    if isinstance(verdict, Cannot):
        assert not hasattr(pipe.transformer, "enable_cache")
        return
    from tests.pipelines.test_families import SPARSE as EVERY

    skipping = diffusers.FirstBlockCacheConfig(threshold=1e6)
    pipe.transformer.enable_cache(skipping)  # before 0.41 diffusers lists hooked layers once
    pipe.transformer.disable_cache()
    for method, options in EVERY.items():
        with dit_sparse.sparse_attention(pipe, method, strict=True, **options) as handle:
            alone_ = tiny.run(pipe, args)
            calls = len(handle.report().rows)
            pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=-1.0))
            assert torch.equal(tiny.run(pipe, args), alone_)  # a cache that never skips
            pipe.transformer.disable_cache()
            pipe.transformer.enable_cache(skipping)
            both = tiny.run(pipe, args)
            assert len(handle.report().rows) == calls // 2 + calls // 2 // STEPS
            assert both.isfinite().all()
            pipe.transformer.disable_cache()


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache's
def test_a_cache_that_halves_the_batch_keeps_the_branches_apart():
    pipe, args = build("cogvideox")
    handle = enable(pipe)
    config = diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-2, -1),  # no attention is skipped
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: 500,
        tensor_format="BFCHW",
    )
    pipe.transformer.enable_cache(config)
    tiny.run(pipe, args)
    rows = handle.report().rows
    assert {row["step"] for row in rows if row["branch"] == "both"} == {0, 2}
    assert {row["step"] for row in rows if row["branch"] == "cond"} == {1, 3}
