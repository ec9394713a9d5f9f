# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 1.0 and 1.5: text tokens first (all attended), then video; one batch for guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family, Usual, empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, frames, channels, height, width]``.

    Version 1.5 puts ``patch_size_t`` frames into one token; frames padded in front are real
    tokens to attention.
    """
    _, frames, _, height, width = inputs["hidden_states"].shape
    patch_t = config.patch_size_t or 1
    text = inputs["encoder_hidden_states"].shape[1]
    patch = config.patch_size
    return -(-frames // patch_t), height // patch, width // patch, text


def example(config: Any, frames: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Make forward arguments without data; version 1.5 pads frames to whole tokens."""
    patch_t = config.patch_size_t or 1
    frames += -frames % patch_t
    made: dict[str, Any] = {
        "hidden_states": empty(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": empty(1, text, config.text_embed_dim),
        "timestep": empty(1),
    }
    if config.use_rotary_positional_embeddings:
        patch = config.patch_size
        tokens = frames // patch_t * (height // patch) * (width // patch)
        rotary = empty(tokens, config.attention_head_dim)
        made["image_rotary_emb"] = (rotary, rotary)
    if config.ofs_embed_dim is not None:
        made["ofs"] = empty(1)
    return made


COGVIDEOX = Family(
    name="cogvideox",
    attention=r"transformer_blocks\.\d+\.attn1",
    shape=shape,
    text_first=True,
    batched_cfg=True,
    example=example,
    usual=Usual(480, 720, 49),
    text_tokens=226,
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
)
