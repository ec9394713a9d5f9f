# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: text tokens first (all attended), then the image's; dual- then single-stream layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.pipelines.family import Family, empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:  # noqa: ARG001  (one signature)
    """Read the image's rows and columns from the last of ``img_ids [tokens, 3]``.

    The latents arrive packed, so only the ids know the picture's two sides. Where reference
    images were appended (Kontext) the product differs from the token count: that call is dense.
    """
    ids = inputs["img_ids"]
    last = (ids[0] if ids.ndim == 3 else ids)[-1]
    text = inputs["encoder_hidden_states"].shape[1]
    return 1, int(last[1]) + 1, int(last[2]) + 1, text


def example(config: Any, frames: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Make forward arguments without data; two by two latent pixels are packed into a token."""
    del frames
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[-1, -1] = torch.tensor([0, height // 2 - 1, width // 2 - 1])
    return {
        "hidden_states": empty(1, (height // 2) * (width // 2), config.in_channels),
        "encoder_hidden_states": empty(1, text, config.joint_attention_dim),
        "pooled_projections": empty(1, config.pooled_projection_dim),
        "timestep": empty(1),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": empty(text, 3),
        "guidance": empty(1) if config.guidance_embeds else None,
    }


FLUX = Family(
    name="flux",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=shape,
    text_first=True,
    shape_input="img_ids",
    example=example,
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "VisualClozePipeline",
        "VisualClozeGenerationPipeline",
    ),
    note="passes with reference pictures (Kontext) stay dense",
)
