# SPDX-License-Identifier: Apache-2.0
"""Rows of models whose main attention holds video or picture tokens alone.

The prompt comes in by cross-attention, by modulation, or not at all.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.pipelines.family import Family
from dit_sparse.pipelines.readers import Arguments, Latents

BLOCKS = r"blocks\.\d+\.attn1"
ATTN1 = r"transformer_blocks\.\d+\.attn1"
VIDEO = Latents(("bcthw",))
PICTURE = Latents(("bchw",))


def _frame_blocks(config: Any) -> str | None:
    """Refuse checkpoints of SkyReels-V2 that were trained to look back only."""
    frames = config.num_frame_per_block
    if frames <= 1:
        return None
    return f"it masks what comes later, {frames} frames at a time (num_frame_per_block)"


def _nabla(config: Any) -> str | None:
    """Refuse Kandinsky 5's own block-sparse checkpoints."""
    if config.attention_type != "nabla":
        return None
    return (
        "it was trained with NABLA and computes that block-sparse attention by itself "
        '(attention_type "nabla"): it is sparse already'
    )


WAN_VACE = Family(
    name="wan_vace",
    attention=r"(vace_)?blocks\.\d+\.attn1",
    shape=VIDEO,
    text_free=True,
    pipelines=("WanVACEPipeline",),
)
WAN_ANIMATE = Family(
    name="wan_animate",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    pipelines=("WanAnimatePipeline",),
)
CHRONOEDIT = Family(
    name="chronoedit",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    pipelines=("ChronoEditPipeline",),
)
SKYREELS_V2 = Family(
    name="skyreels_v2",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    refuses=_frame_blocks,
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    note="its diffusion-forcing pipelines, with a clock for each frame, were not run",
)
ANYFLOW = Family(
    name="anyflow",
    attention=BLOCKS,
    shape=Latents(("btchw",)),
    text_free=True,
    batched_cfg=True,
    pipelines=("AnyFlowPipeline",),
)
LTX = Family(
    name="ltx",
    attention=ATTN1,
    shape=Arguments(),
    text_free=True,
    pipelines=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
    ),
    note="passes with coordinates instead of a size (conditions on frames) stay dense",
)
LTX2 = Family(
    name="ltx2",
    attention=ATTN1,
    shape=Arguments(),
    text_free=True,
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    ),
    note="the sound's attention is left alone; passes with a mask or reference tokens stay dense",
)
COSMOS = Family(
    name="cosmos",
    attention=ATTN1,
    shape=VIDEO,
    text_free=True,
    pipelines=(
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    ),
)
ALLEGRO = Family(
    name="allegro",
    attention=ATTN1,
    shape=Latents(("bcthw",), patch_t="patch_size_t"),
    text_free=True,
    batched_cfg=True,
    pipelines=("AllegroPipeline",),
)
LATTE = Family(
    name="latte",
    attention=ATTN1,
    shape=Latents(("bc_hw",)),
    text_free=True,
    batched_cfg=True,
    pipelines=("LattePipeline",),
    note="each frame attends by itself; attention along time, over a few tokens, is left alone",
)
KANDINSKY5 = Family(
    name="kandinsky5",
    attention=r"visual_transformer_blocks\.\d+\.self_attention",
    shape=Latents(("bthwc",)),
    text_free=True,
    refuses=_nabla,
    pipelines=(
        "Kandinsky5T2VPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5I2IPipeline",
    ),
)
KANDINSKY6 = Family(
    name="kandinsky6",
    attention=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    shape=Latents(("bthwc",)),
    text_free=True,
    pipelines=("Kandinsky6TI2VAPipeline",),
    note="the sound's attention is left alone",
)
HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    attention=BLOCKS,
    shape=PICTURE,
    text_free=True,
    batched_cfg=True,
    pipelines=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPAGPipeline"),
)
DIT = Family(
    name="dit",
    attention=ATTN1,
    shape=PICTURE,
    text_free=True,
    batched_cfg=True,
    pipelines=("DiTPipeline",),
)
LUMINA_NEXT = Family(
    name="lumina_next",
    attention=r"layers\.\d+\.attn1",
    shape=PICTURE,
    text_free=True,
    text_padding=True,  # it passes a mask of ones
    timestep="",  # 1 - t / 1000
    batched_cfg=True,
    pipelines=("LuminaPipeline",),
)
