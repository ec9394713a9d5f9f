# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: text tokens first (all attended), then the image's; dual- then single-stream layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.family import Family

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


FLUX = Family(
    name="flux",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=shape,
    text_first=True,
    shape_input="img_ids",
)
