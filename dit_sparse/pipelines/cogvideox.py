# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 1.0 and 1.5: text tokens first (all attended), then video; one batch for guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family

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


COGVIDEOX = Family(
    name="cogvideox",
    attention=r"transformer_blocks\.\d+\.attn1",
    shape=shape,
    text_first=True,
    batched_cfg=True,
)
