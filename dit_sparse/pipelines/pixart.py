# SPDX-License-Identifier: Apache-2.0
"""PixArt alpha and sigma: image tokens only; text by cross-attention; one batch for guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family, Usual, empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, height, width]``."""
    _, _, height, width = inputs["hidden_states"].shape
    return 1, height // config.patch_size, width // config.patch_size, 0


def example(config: Any, frames: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Make forward arguments without data."""
    del frames
    return {
        "hidden_states": empty(1, config.in_channels, height, width),
        "encoder_hidden_states": empty(1, text, config.caption_channels),
        "timestep": empty(1),
        "added_cond_kwargs": {"resolution": empty(1, 2), "aspect_ratio": empty(1, 1)},
    }


PIXART = Family(
    name="pixart",
    attention=r"transformer_blocks\.\d+\.attn1",
    shape=shape,
    text_free=True,
    batched_cfg=True,
    example=example,
    usual=Usual(num_steps=20),
    text_tokens=300,
    pipelines=(
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "PixArtSigmaPAGPipeline",
    ),
)
