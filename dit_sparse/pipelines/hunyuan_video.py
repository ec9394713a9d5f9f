# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo: video tokens, then text tokens whose padding the model masks.

Dual-stream layers come first, then single-stream ones; the text refiner is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.examples import PROMPT_MASK, VIDEO_LATENTS, Example
from dit_sparse.pipelines.family import Family, Usual

if TYPE_CHECKING:
    from dit_sparse.pipelines.examples import Part
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, frames, height, width]`` and the text's length."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch = config.patch_size
    text = inputs["encoder_hidden_states"].shape[1]
    return frames // config.patch_size_t, height // patch, width // patch, text


PARTS: dict[str, Part] = {
    "hidden_states": VIDEO_LATENTS,
    "timestep": "1",
    "encoder_hidden_states": "1 text text_embed_dim",
    "encoder_attention_mask": PROMPT_MASK,
    "pooled_projections": "1 pooled_projection_dim",
    "guidance": "1 ?guidance_embeds",
}

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=shape,
    text_padding=True,
    example=Example(PARTS),
    usual=Usual(720, 1280, 129),
    text_tokens=256,
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
    ),
)
