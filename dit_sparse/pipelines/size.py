# SPDX-License-Identifier: Apache-2.0
"""How much a transformer computes at a size, from its config alone: no weights, no data.

The model is built and called on torch's "meta" device, where tensors have shapes only, under
torch's own counter of floating-point operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.family import heads_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.grid import LatentsGrid
    from dit_sparse.pipelines.family import Family


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What one pass of one sample through a transformer takes.

    Args:
        class_name: Of the transformer.
        family: Its family.
        grid: Where its tokens stand.
        layers: Main self-attention layers.
        heads: Heads in each.
        head_dim: Width of a head.
        parameters: Number of weights.
        attention_flops: Of all main self-attentions, 4 tokens^2 heads head_dim layers.
        other_flops: Of everything else: projections, feed-forward, cross-attention.
    """

    class_name: str
    family: Family
    grid: LatentsGrid
    layers: int
    heads: int
    head_dim: int
    parameters: int
    attention_flops: float
    other_flops: float


def model_size(
    config: Mapping[str, Any],
    height: int,
    width: int,
    num_frames: int = 1,
    *,
    vae: Mapping[str, Any] | None = None,
    text: int | None = None,
) -> ModelSize:
    """Count what a transformer computes.

    Args:
        config: The transformer's ``config.json``, with ``_class_name``; what it leaves out has
            the class's default.
        height: Pixels.
        width: Pixels.
        num_frames: Frames; 1 for image models.
        vae: The VAE's ``config.json``; None: the family's usual compression.
        text: Text tokens; None: as many as the family's pipeline passes.

    Raises:
        UnsupportedError: No adapter for the class, a config it does not take, or a size that does
            not make whole tokens.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    family = family_by_name(name)
    spatial, temporal = compression(vae, family)
    if height % spatial or width % spatial or (num_frames - 1) % temporal:
        raise UnsupportedError(
            f"{name}: {height} x {width} pixels x {num_frames} frames does not make whole "
            f"latents: height and width must be multiples of {spatial}, frames 1 more than a "
            f"multiple of {temporal}"
        )
    latents = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, name).from_config(dict(config))
        inputs = family.example(
            model.config, *latents, family.text_tokens if text is None else text
        )
        shape = family.shape(model.config, inputs)
        if shape is None:
            raise UnsupportedError(f"{name}: its own example makes no token grid")
        grid = family.grid(shape)
        on_meta = {key: _to_meta(value) for key, value in inputs.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**on_meta)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedError(f"{name}: cannot be sized from this config: {error}") from error
    modules = family.attention_modules(model)
    heads, head_dim = heads_of(modules[0][1]), int(model.config.attention_head_dim)
    attention = 4.0 * grid.tokens**2 * heads * head_dim * len(modules)
    return ModelSize(
        class_name=name,
        family=family,
        grid=grid,
        layers=len(modules),
        heads=heads,
        head_dim=head_dim,
        parameters=sum(weight.numel() for weight in model.parameters()),
        attention_flops=attention,
        other_flops=counter.get_total_flops() - attention,
    )


def compression(vae: Mapping[str, Any] | None, family: Family) -> tuple[int, int]:
    """Read a VAE's compression (pixels of a latent pixel's side, frames of a latent frame)."""
    if vae is None:
        return family.compression
    spatial, temporal = family.compression
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        spatial = int(vae.get(key) or spatial)
    for key in ("scale_factor_temporal", "temporal_compression_ratio"):
        temporal = int(vae.get(key) or temporal)
    if "block_out_channels" in vae and not vae.get("spatial_compression_ratio"):
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    return spatial, temporal


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _to_meta(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_meta(part) for part in value)
    return value
