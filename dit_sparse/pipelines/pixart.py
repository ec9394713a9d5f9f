# SPDX-License-Identifier: Apache-2.0
"""PixArt alpha and sigma: image tokens only; text by cross-attention; one batch for guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape


def shape(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read ``hidden_states [batch, channels, height, width]``."""
    _, _, height, width = inputs["hidden_states"].shape
    return 1, height // config.patch_size, width // config.patch_size, 0


PIXART = Family(
    name="pixart", attention=r"transformer_blocks\.\d+\.attn1", shape=shape, batched_cfg=True
)
