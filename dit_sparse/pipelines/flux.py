# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: text tokens first (all attended), then the image's; dual- then single-stream layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.examples import FLUX_PARTS, Example
from dit_sparse.pipelines.family import Family, Usual

if TYPE_CHECKING:
    from dit_sparse.pipelines.examples import Part
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


PARTS: dict[str, Part] = {
    **FLUX_PARTS,
    "pooled_projections": "1 pooled_projection_dim",
    "guidance": "1 ?guidance_embeds",
}

FLUX = Family(
    name="flux",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=shape,
    text_first=True,
    shape_input="img_ids",
    example=Example(PARTS, pack=2),
    usual=Usual(num_steps=28),
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
