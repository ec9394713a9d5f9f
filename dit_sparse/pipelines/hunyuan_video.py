# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo: video tokens, then text tokens whose padding the model masks.

Dual-stream layers come first, then single-stream ones; the text refiner is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.pipelines.family import Family, empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, frames, height, width]`` and the text's length."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch = config.patch_size
    text = inputs["encoder_hidden_states"].shape[1]
    return frames // config.patch_size_t, height // patch, width // patch, text


def example(config: Any, frames: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Make forward arguments without data."""
    return {
        "hidden_states": empty(1, config.in_channels, frames, height, width),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, text, config.text_embed_dim),
        "encoder_attention_mask": empty(1, text, dtype=torch.bool),
        "pooled_projections": empty(1, config.pooled_projection_dim),
        "guidance": empty(1),
    }


HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=shape,
    text_padding=True,
    example=example,
    text_tokens=256,
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
)
