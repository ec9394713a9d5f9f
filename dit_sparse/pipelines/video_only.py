# SPDX-License-Identifier: Apache-2.0
"""Rows of models whose main attention holds video or picture tokens alone.

The prompt comes in by cross-attention, by modulation, or not at all. Past 300 lines, as it is one
table.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse.pipelines.examples import (
    PACKED_LATENTS,
    PICTURE_LATENTS,
    PROMPT_MASK,
    VIDEO_LATENTS,
    WAN_PARTS,
    Example,
    Full,
)
from dit_sparse.pipelines.family import Family, Unsized, Usual
from dit_sparse.pipelines.parts import (
    HUNYUAN_DIT_PARTS,
    LTX2_PARTS,
    LTX_SIZE,
    cosmos_padding,
    kandinsky_audio,
    kandinsky_latents,
    kandinsky_positions,
    lumina_rotary,
    skyreels_fps,
)
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
    return f"it masks future frames, {frames} frames at a time (num_frame_per_block)"


def _nabla(config: Any) -> str | None:
    """Refuse Kandinsky 5's own block-sparse checkpoints."""
    if config.attention_type != "nabla":
        return None
    return (
        "it was trained with NABLA and already computes this block-sparse attention "
        '(attention_type "nabla")'
    )


WAN_VACE = Family(
    name="wan_vace",
    attention=r"(vace_)?blocks\.\d+\.attn1",
    shape=VIDEO,
    text_free=True,
    example=Example({**WAN_PARTS, "control_hidden_states": "1 vace_in_channels t h w"}),
    usual=Usual(480, 832, 81),
    pipelines=("WanVACEPipeline",),
)
WAN_ANIMATE = Family(
    name="wan_animate",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    example=Unsized("it follows a driving video in segments, whose length and faces are inputs"),
    usual=Usual(720, 1280, 77, 20),
    pipelines=("WanAnimatePipeline",),
)
CHRONOEDIT = Family(
    name="chronoedit",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    example=Example(WAN_PARTS),
    usual=Usual(480, 832, 81),
    pipelines=("ChronoEditPipeline",),
)
SKYREELS_V2 = Family(
    name="skyreels_v2",
    attention=BLOCKS,
    shape=VIDEO,
    text_free=True,
    refuses=_frame_blocks,
    example=Example({**WAN_PARTS, "fps": skyreels_fps}),
    usual=Usual(544, 960, 97),
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    note="its diffusion-forcing pipelines, with a timestep per frame, were not tested",
)
ANYFLOW = Family(
    name="anyflow",
    attention=BLOCKS,
    shape=Latents(("btchw",)),
    text_free=True,
    batched_cfg=True,
    example=Example(
        {
            **WAN_PARTS,
            "hidden_states": "1 t in_channels h w",
            "timestep": "1 t",
            "r_timestep": "1 t",
        }
    ),
    usual=Usual(480, 832, 81),
    pipelines=("AnyFlowPipeline",),
)
LTX = Family(
    name="ltx",
    attention=ATTN1,
    shape=Arguments(),
    text_free=True,
    example=Example(
        {
            "hidden_states": PACKED_LATENTS,
            "encoder_hidden_states": "1 text caption_channels",
            "timestep": "1",
            "encoder_attention_mask": PROMPT_MASK,
            **LTX_SIZE,
        }
    ),
    text_tokens=128,
    compression=(32, 8),
    usual=Usual(512, 704, 161),
    pipelines=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
    ),
    note="passes with coordinates instead of a size (frame conditions) stay dense",
)
LTX2 = Family(
    name="ltx2",
    attention=ATTN1,
    shape=Arguments(),
    text_free=True,
    example=Example(LTX2_PARTS),
    text_tokens=1024,
    compression=(32, 8),
    usual=Usual(512, 768, 121, 30),
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    ),
    note="spatio-temporal and modality guidance are also sparse; audio attention is not "
    "replaced; passes with a mask or reference tokens stay dense",
)
COSMOS = Family(
    name="cosmos",
    attention=ATTN1,
    shape=VIDEO,
    text_free=True,
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text text_embed_dim",
            "fps": lambda *_: 30,
        }
    ),
    stands_in=cosmos_padding,
    compression=(8, 8),
    usual=Usual(704, 1280, 121, 36),
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
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "encoder_hidden_states": "1 text caption_channels",
            "timestep": "1",
            "encoder_attention_mask": PROMPT_MASK,
        }
    ),
    usual=Usual(720, 1280, 85, 100),  # 88 frames make as many latents,
    pipelines=("AllegroPipeline",),
)
LATTE = Family(
    name="latte",
    attention=ATTN1,
    shape=Latents(("bc_hw",)),
    text_free=True,
    batched_cfg=True,
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text caption_channels",
        }
    ),
    text_tokens=120,
    compression=(8, 1),
    usual=Usual(512, 512, 16),
    pipelines=("LattePipeline",),
    note="each frame is attended separately; temporal attention, over a few tokens, is not "
    "replaced",
)
KANDINSKY5 = Family(
    name="kandinsky5",
    attention=r"visual_transformer_blocks\.\d+\.self_attention",
    shape=Latents(("bthwc",)),
    text_free=True,
    refuses=_nabla,
    example=Example(
        {
            "hidden_states": kandinsky_latents,
            "encoder_hidden_states": "1 text in_text_dim",
            "timestep": "1",
            "pooled_projections": "1 in_text_dim2",
            "visual_rope_pos": kandinsky_positions,
            "text_rope_pos": lambda _, asked: torch.arange(asked.text),
        }
    ),
    usual=Usual(512, 768, 121),
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
    example=Example(
        {
            "hidden_states": kandinsky_latents,
            "encoder_hidden_states": "1 text in_text_dim",
            "timestep": "1",
            "pooled_projections": "1 in_text_dim2",
            "audio_hidden_states": kandinsky_audio,
        }
    ),
    text_tokens=1024,
    usual=Usual(512, 768, 121),
    pipelines=("Kandinsky6TI2VAPipeline",),
    note="audio attention is not replaced",
)
HUNYUAN_DIT = Family(
    name="hunyuan_dit",
    attention=BLOCKS,
    shape=PICTURE,
    text_free=True,
    batched_cfg=True,
    example=Example(HUNYUAN_DIT_PARTS),
    pipelines=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPAGPipeline"),
)
DIT = Family(
    name="dit",
    attention=ATTN1,
    shape=PICTURE,
    text_free=True,
    batched_cfg=True,
    example=Example(
        {"hidden_states": PICTURE_LATENTS, "timestep": "1", "class_labels": Full("1", 0)}
    ),
    text_tokens=0,
    usual=Usual(256, 256),
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
    example=Example(
        {
            "hidden_states": PICTURE_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text cross_attention_dim",
            "encoder_mask": PROMPT_MASK,
            "image_rotary_emb": lumina_rotary,
            "cross_attention_kwargs": lambda *_: {},
        }
    ),
    text_tokens=256,
    usual=Usual(num_steps=30),
    pipelines=("LuminaPipeline",),
)
