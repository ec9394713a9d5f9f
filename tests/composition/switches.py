# SPDX-License-Identifier: Apache-2.0
"""How features are switched on, ``(pipe, args) -> args``, and off, ``pipe -> None``."""

from __future__ import annotations

import functools
import warnings

import accelerate.hooks
import diffusers
import peft
import torch
from diffusers.hooks import HookRegistry, group_offloading
from diffusers.models import attention_dispatch
from torch import nn

from tests import tiny

CPU = torch.device("cpu")
STEPS = 4


def quietly(function):
    """Let a feature warn about itself."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return call


def group(kind):
    def on(pipe, args):
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(CPU, CPU, offload_type=kind, **more)
        return args

    return on


def no_group(pipe):
    """Take off what Diffusers itself takes off before it loads a LoRA."""
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for name in (
        "_GROUP_OFFLOADING",
        "_LAYER_EXECUTION_TRACKER",
        "_LAZY_PREFETCH_GROUP_OFFLOADING",
    ):
        registry.remove_hook(getattr(group_offloading, name), recurse=True)


def offload(method):
    def on(pipe, args):
        getattr(pipe, method)(device="cpu")
        return args

    return on


def no_offload(pipe):
    pipe.remove_all_hooks()


def aligned(pipe, args):
    accelerate.hooks.attach_execution_device_hook(pipe.transformer, CPU)
    return args


def casting(pipe, args):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return args


LINEARS = ["to_q", "to_k", "to_v", "to_out.0"]


def seeded(model, mark, seed=11):
    """Fill the weights of an adapter, whose second half is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if mark in name:
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)


def lora(pipe, args):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")
    seeded(pipe.transformer, "lora_")
    return args


def no_lora(pipe):
    pipe.transformer.delete_adapters("one")


def fused_lora(pipe, args):
    lora(pipe, args)
    pipe.transformer.fuse_lora()
    return args


def unloaded_lora(pipe):
    pipe.transformer.unfuse_lora()
    pipe.transformer.unload_lora()


def whole_peft(pipe, args):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    seeded(pipe.transformer, "lora_")
    return args


def no_peft(pipe):
    pipe.transformer = pipe.transformer.unload()


def fuse(pipe, args):
    pipe.transformer.fuse_qkv_projections()
    return args


def unfuse(pipe):
    pipe.transformer.unfuse_qkv_projections()


def ip_adapter(pipe, args):
    """Load an adapter of four image tokens, made up here, the way a file of one is loaded."""
    width, joint = pipe.transformer.inner_dim, pipe.transformer.config.joint_attention_dim
    layers = pipe.transformer.config.num_layers
    state = {"image_proj": {}, "ip_adapter": {}}
    shapes = {"proj.weight": (4 * joint, 6), "proj.bias": (4 * joint,)}
    shapes |= {"norm.weight": (joint,), "norm.bias": (joint,)}
    for i, (name, shape) in enumerate(shapes.items()):
        state["image_proj"][name] = tiny.normal(*shape, seed=i)
    for layer in range(layers):
        for i, side in enumerate(("k", "v")):
            own = f"{layer}.to_{side}_ip"
            state["ip_adapter"][f"{own}.weight"] = tiny.normal(width, joint, seed=20 + i)
            state["ip_adapter"][f"{own}.bias"] = tiny.normal(width, seed=30 + i)
    pipe.transformer._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    images = {"ip_adapter_image_embeds": [tiny.normal(1, 1, 6)]}
    return {**args, **images, "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 6)]}


def no_ip_adapter(pipe):
    """Do what pipe.unload_ip_adapter does of it; the image encoder does not exist here."""
    pipe.transformer.encoder_hid_proj = None
    pipe.transformer.config.encoder_hid_dim_type = None
    plain = diffusers.models.transformers.transformer_flux.FluxAttnProcessor
    pipe.transformer.set_attn_processor(
        {name: plain() for name in pipe.transformer.attn_processors}
    )


def int8(pipe, args):
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, inplace=True)
    return args


def torchao(pipe, args):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())
    return args


def quanto(pipe, args):
    from optimum.quanto import freeze, qint8, quantize

    quantize(pipe.transformer, weights=qint8)
    freeze(pipe.transformer)
    return args


def backend(pipe, args):
    pipe.transformer.set_attention_backend("_native_math")
    return args


def no_backend(pipe):
    pipe.transformer.reset_attention_backend()
    # diffusers leaves the global default set (0.42.1)
    attention_dispatch._AttentionBackendRegistry._active_backend = (
        attention_dispatch.AttentionBackendName.NATIVE
    )


def cached(make):
    def on(pipe, args):
        pipe.transformer.enable_cache(make(pipe))
        return args

    return on


def no_cache(pipe):
    pipe.transformer.disable_cache()


def cache_dit(pipe, args):
    """Skip all layers but the first on every step after the first."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=10.0,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return args


def no_cache_dit(pipe):
    import cache_dit

    cache_dit.disable_cache(pipe)


def timestep(pipe):
    return lambda: float(getattr(pipe, "_current_timestep", None) or 500.0)


def broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=timestep(pipe),
    )


def faster(pipe):
    batched = isinstance(pipe, diffusers.CogVideoXPipeline)
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 960),  # not the first step
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=timestep(pipe),
        tensor_format="BFCHW" if batched else "BCFHW",
        is_guidance_distilled=not batched,
    )


def magnitude(pipe):
    return tiny.newer("MagCacheConfig")(
        threshold=10.0,
        max_skip_steps=1,
        retention_ratio=0.2,
        num_inference_steps=STEPS,
        mag_ratios=[1.0, 0.99, 0.98, 0.97],
    )


def skip(**what):
    def on(pipe, args):
        model = pipe.transformer
        name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
        config = diffusers.LayerSkipConfig(indices=[0], fqn=name, **what)
        diffusers.apply_layer_skip(model, config)
        return args

    return on


def no_skip(pipe):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.remove_hook("layer_skip_hook", recurse=True)
