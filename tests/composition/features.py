# SPDX-License-Identifier: Apache-2.0
"""Features of Diffusers as data: how each is switched on and off, and what it should change.

A feature that fails in stock Diffusers for some family says so in ``verdicts``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate.hooks
import diffusers
import torch
from diffusers.hooks import group_offloading, layerwise_casting

from tests import tiny
from tests.composition import switches as do
from tests.composition.table import FAMILIES, Cannot, Works

NO_PEFT = Cannot("diffusers' PixArt transformer has no PeftAdapterMixin (see PeftModel below)")
NO_CACHE = Cannot("diffusers' PixArt transformer has no enable_cache")
NOT_DISPATCHED = Cannot(
    "this model calls torch's scaled_dot_product_attention itself: set_attention_backend changes "
    "nothing there"
)
NO_SEQUENTIAL = Cannot(
    "accelerate cannot offload a module to the device that computes, and here is only a CPU; its "
    "hooks themselves are in the row below"
)
NO_INT8 = Cannot("Wan reads the dtype of a parameter that a dynamically quantised layer lacks")
NOT_REGISTERED = Cannot("diffusers' AttentionProcessorRegistry does not have its processor")
FLUX_SKIP = Cannot("diffusers' layer skipping fails on FLUX's blocks (0.42)")
NOT_SKIPPED = dict.fromkeys(("wan", "hunyuan_video", "cogvideox"), NOT_REGISTERED)
NOT_SKIPPED["flux"] = FLUX_SKIP
NOT_FUSED = Cannot("fuse_qkv_projections does nothing for HunyuanVideo's attention class")


@dataclass(frozen=True)
class Feature:
    """One feature.

    Args:
        title: As the page names it.
        on: ``(pipe, args) -> args``: switch it on; may change the arguments of a call.
        off: Switch it off again; None where Diffusers has no way back.
        changes: It changes the numbers of the stock pipeline ("close": by rounding only).
        exact: Switching it off gives the weights back bit for bit.
        probe: (class, method) that must be called as often with us as without us.
        verdicts: Where it does not simply work.
        families: That it exists for.
        needs: Package without which the test is skipped.
        declines: Why some calls stay dense beside it, as the report says; empty: none do.
    """

    title: str
    on: Callable[[Any, dict], dict]
    off: Callable[[Any], None] | None = None
    changes: bool | str = False
    exact: bool = True
    probe: tuple[type, str] | None = None
    verdicts: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = FAMILIES
    needs: str = ""
    declines: str = ""


CACHE = {"off": do.no_cache, "changes": True}
PIXART_NONE = {"pixart_sigma": NO_CACHE}
FEATURES = {
    "group_block": Feature(
        "group offload, by block",
        do.group("block_level"),
        do.no_group,
        probe=(group_offloading.GroupOffloadingHook, "pre_forward"),
    ),
    "group_leaf": Feature(
        "group offload, by leaf",
        do.group("leaf_level"),
        do.no_group,
        probe=(group_offloading.GroupOffloadingHook, "pre_forward"),
    ),
    "model_offload": Feature(
        "enable_model_cpu_offload",
        do.offload("enable_model_cpu_offload"),
        do.no_offload,
        probe=(accelerate.hooks.CpuOffload, "pre_forward"),
    ),
    "sequential_offload": Feature(
        "enable_sequential_cpu_offload",
        do.offload("enable_sequential_cpu_offload"),
        do.no_offload,
        verdicts=dict.fromkeys(FAMILIES, NO_SEQUENTIAL),
    ),
    "aligned": Feature(
        "accelerate's device hooks on every module (device_map)",
        do.aligned,
        do.no_offload,
        probe=(accelerate.hooks.AlignDevicesHook, "pre_forward"),
    ),
    "casting": Feature(
        "enable_layerwise_casting (float8)",
        do.casting,
        changes=True,
        probe=(layerwise_casting.LayerwiseCastingHook, "pre_forward"),
    ),
    "lora": Feature(
        "LoRA: add and delete an adapter",
        do.lora,
        do.no_lora,
        changes=True,
        verdicts={"pixart_sigma": NO_PEFT},
    ),
    "fused_lora": Feature(
        "LoRA: fuse, unfuse, unload",
        do.fused_lora,
        do.unloaded_lora,
        changes=True,
        exact=False,
        verdicts={"pixart_sigma": NO_PEFT},
    ),
    "peft_model": Feature("LoRA: peft's own PeftModel", do.whole_peft, do.no_peft, changes=True),
    "fused_qkv": Feature(
        "fuse_qkv_projections",
        do.fuse,
        do.unfuse,
        changes="close",
        verdicts={"hunyuan_video": NOT_FUSED},
    ),
    "ip_adapter": Feature(
        "IP-adapter", do.ip_adapter, do.no_ip_adapter, changes=True, families=("flux",)
    ),
    "int8": Feature(
        "torch's dynamic int8 weights", do.int8, changes=True, verdicts={"wan": NO_INT8}
    ),
    "torchao": Feature(
        "torchao int8 weights",
        do.torchao,
        changes=True,
        needs="torchao",
        verdicts=dict.fromkeys(FAMILIES, Works("tested where torchao is installed (0.18.0)")),
    ),
    "quanto": Feature(
        "optimum-quanto int8 weights",
        do.quanto,
        changes=True,
        needs="optimum",
        verdicts=dict.fromkeys(
            FAMILIES, Works("tested where optimum-quanto is installed (0.2.7)")
        ),
    ),
    "backend": Feature(
        "set_attention_backend",
        do.backend,
        do.no_backend,
        changes="close",
        verdicts={"cogvideox": NOT_DISPATCHED, "pixart_sigma": NOT_DISPATCHED},
    ),
    "first_block": Feature(
        "FirstBlockCache",
        do.cached(lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e6)),
        verdicts=PIXART_NONE,
        **CACHE,
    ),
    "pyramid": Feature(
        "PyramidAttentionBroadcast", do.cached(do.broadcast), verdicts=PIXART_NONE, **CACHE
    ),
    "faster": Feature("FasterCache", do.cached(do.faster), verdicts=PIXART_NONE, **CACHE),
    "mag": Feature("MagCache", do.cached(do.magnitude), verdicts=PIXART_NONE, **CACHE),
    "taylor": Feature(
        "TaylorSeer",
        do.cached(
            lambda pipe: diffusers.TaylorSeerCacheConfig(
                cache_interval=2,
                disable_cache_before_step=1,
                taylor_factors_dtype=torch.float32,
                # its own patterns match no attention of Wan or CogVideoX (0.42.1)
                cache_identifiers=[r".*blocks\.\d+\.attn1?"],
            )
        ),
        verdicts=PIXART_NONE,
        **CACHE,
    ),
    "sea": Feature(
        "SeaCache",
        do.cached(lambda pipe: tiny.newer("SeaCacheConfig")(threshold=1e6)),
        families=("wan",),
        **CACHE,
    ),
}
# HunyuanVideo's tiny model has one layer of each kind, and cache-dit always runs the first.
FEATURES |= {
    key: Feature(
        title,
        do.cache_dit,
        do.no_cache_dit,
        changes=changes,
        needs="cache_dit",
        verdicts=dict.fromkeys(families, Works("tested where cache-dit is installed (1.5.3)")),
        families=families,
    )
    for key, title, changes, families in (
        ("cache_dit", "cache-dit", True, ("wan", "cogvideox", "flux", "pixart_sigma")),
        ("cache_dit_idle", "cache-dit, with no layer to skip", False, ("hunyuan_video",)),
    )
}
SKIPPING = {
    "skip_block": Feature(
        "skip-layer guidance: whole layers",
        do.skip(),
        do.no_skip,
        changes=True,
        verdicts={"flux": FLUX_SKIP},
    ),
    "skip_attention": Feature(
        "skip-layer guidance: attention",
        do.skip(skip_ff=False),
        do.no_skip,
        changes=True,
        verdicts=NOT_SKIPPED,
    ),
    "perturbed": Feature(
        "perturbed-attention guidance (attention scores)",
        do.skip(skip_attention=False, skip_attention_scores=True, skip_ff=False),
        do.no_skip,
        changes=True,
        verdicts=NOT_SKIPPED,
        declines="replaces the result of this attention",
    ),
}
FEATURES |= SKIPPING


def missing(feature):
    """Whether the package that a feature needs is not installed."""
    return bool(feature.needs) and importlib.util.find_spec(feature.needs) is None
