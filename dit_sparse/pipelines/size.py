# SPDX-License-Identifier: Apache-2.0
"""How much a transformer computes at a size, from its config alone: no weights, no data.

The model is built and called on torch's "meta" device, where tensors have shapes only, under
torch's own counter of floating-point operations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.counting import Attended, Mixed, Repeated
from dit_sparse.pipelines.family import Unsized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.pipelines.family import Family, Shape


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
        attention_flops: Of all main self-attentions, 4 tokens^2 heads head_dim of each, with the
            tokens that it was called with.
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
        text: Text tokens of the first prompt; None: as many as the family's pipeline passes.

    Raises:
        UnsupportedError: No adapter for the class, one that cannot be counted without data, a
            config it does not take, or a size that does not make whole tokens.
    """
    import diffusers

    name = str(config.get("_class_name", ""))
    family = family_by_name(name)
    if isinstance(family.example, Unsized):
        raise UnsupportedError(f"{name}: cannot be counted without data: {family.example.reason}")
    spatial, temporal = compression(vae, family)
    if num_frames > 1 and family.usual.num_frames == 1:
        raise UnsupportedError(
            f"{name} generates images, so the number of frames must be 1, got {num_frames}"
        )
    if height % spatial or width % spatial or (num_frames - 1) % temporal:
        raise UnsupportedError(
            f"{name}: {height} x {width} pixels x {num_frames} frames does not match the latent "
            f"grid: height and width must be multiples of {spatial}, and frames one more than a "
            f"multiple of {temporal}"
        )
    latents = ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    try:
        model = _build(getattr(diffusers, name), config, family)
        inputs = family.example(
            model.config, *latents, family.text_tokens if text is None else text
        )
        shape = family.shape(model.config, inputs)
        modules = [module for _, module in family.attention_modules(model)]
        attended = Attended(modules)
        counter, mixed = FlopCounterMode(display=False), Mixed()  # type: ignore[no-untyped-call]
        repeated = Repeated(model, counter, attended)
        with warnings.catch_warnings(), torch.no_grad(), counter, mixed, attended.watching():
            warnings.simplefilter("ignore")  # of dtypes and devices that nothing is computed in
            model(**inputs)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedError(
            f"{name}: tokens cannot be counted with this config: {error}"
        ) from error
    grid = _checked(shape, attended, family, name)
    attention = sum(4.0 * b * h * q * k * width for b, h, q, k, width in attended.calls)
    return ModelSize(
        class_name=name,
        family=family,
        grid=grid,
        layers=len(modules),
        heads=attended.calls[0][1],
        head_dim=attended.calls[0][4],
        parameters=sum(weight.numel() for weight in model.parameters()),
        attention_flops=attention,
        other_flops=counter.get_total_flops() + repeated.flops - attention,
    )


def _build(cls: Any, config: Mapping[str, Any], family: Family) -> Any:
    """Build a model without weights; refuse a checkpoint that cannot be served."""
    with torch.device("meta"):
        model = cls.from_config(dict(config))
        if (reason := family.refuses(model.config)) is not None:
            raise UnsupportedError(f"this checkpoint is not supported: {reason}")
        if changed := family.stands_in(model.config):
            model = cls.from_config({**model.config, **changed})
    model.requires_grad_(False)
    for name, weight in model.named_parameters(recurse=False):
        # Small tables of the model itself get data: some are asked for their device.
        empty = torch.zeros(weight.shape, dtype=weight.dtype)
        model.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    return model


def _checked(shape: Shape | None, attended: Attended, family: Family, name: str) -> LatentsGrid:
    """Compare the grid with the lengths that attention was really called with."""
    lengths = {length for _, _, *pair, _ in attended.calls for length in pair}
    grid = family.grid(shape, max(lengths)) if shape is not None and lengths else None
    if grid is not None and max(lengths) == grid.tokens:
        least = grid.video_tokens if family.text_varies else grid.tokens
        if min(lengths) >= least:
            return grid
    raise UnsupportedError(
        f"{name}: its token grid is {grid}, and its attention was called with "
        f"{sorted(lengths) or 'no'} tokens; this version of diffusers may call it differently, "
        "please report it"
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
    if vae.get("spatial_compression_ratio"):
        return spatial, temporal
    if "spatio_temporal_scaling" in vae:  # LTX-Video's, where the config leaves the ratios out
        halved = 2 ** sum(vae["spatio_temporal_scaling"])
        return vae["patch_size"] * halved, vae["patch_size_t"] * halved
    if "block_out_channels" in vae:
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    return spatial, temporal
