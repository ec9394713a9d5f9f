# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2 (T2V, I2V): video tokens only; text and image come in by cross-attention.

Wan 2.2 A14B has two transformers, ``transformer`` for high noise and ``transformer_2`` for low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family, empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, frames, height, width]``."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch_t, patch_h, patch_w = config.patch_size
    return frames // patch_t, height // patch_h, width // patch_w, 0


def example(config: Any, frames: int, height: int, width: int, text: int) -> dict[str, Any]:
    """Make forward arguments without data."""
    made = {
        "hidden_states": empty(1, config.in_channels, frames, height, width),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, text, config.text_dim),
    }
    if config.image_dim is not None:
        made["encoder_hidden_states_image"] = empty(1, 257, config.image_dim)
    return made


WAN = Family(
    name="wan",
    attention=r"blocks\.\d+\.attn1",
    shape=shape,
    text_free=True,
    example=example,
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "LucyEditPipeline",
    ),
)
