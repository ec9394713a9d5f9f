# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: text tokens first (all attended), then the image's; dual- then single-stream layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.pipelines.examples import FLUX_PARTS, Example
from dit_sparse.pipelines.family import Family, Usual
from dit_sparse.pipelines.readers import Ids

if TYPE_CHECKING:
    from dit_sparse.pipelines.examples import Part


PARTS: dict[str, Part] = {
    **FLUX_PARTS,
    "pooled_projections": "1 pooled_projection_dim",
    "guidance": "1 ?guidance_embeds",
}

FLUX = Family(
    name="flux",
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    shape=Ids("img_ids"),
    text_first=True,
    shape_inputs=("img_ids",),
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
    note="passes with reference images (Kontext) stay dense",
)
