# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2 (T2V, I2V): video tokens only; text and image come in by cross-attention.

Wan 2.2 A14B has two transformers, ``transformer`` for high noise and ``transformer_2`` for low.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.examples import WAN_PARTS, Example
from dit_sparse.pipelines.family import Family, Usual

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, frames, height, width]``."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    patch_t, patch_h, patch_w = config.patch_size
    return frames // patch_t, height // patch_h, width // patch_w, 0


WAN = Family(
    name="wan",
    attention=r"blocks\.\d+\.attn1",
    shape=shape,
    text_free=True,
    example=Example(WAN_PARTS),
    usual=Usual(720, 1280, 81),  # of the larger models
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "LucyEditPipeline",
    ),
)
