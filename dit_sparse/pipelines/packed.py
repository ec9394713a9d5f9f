# SPDX-License-Identifier: Apache-2.0
"""Rows of FLUX's relatives: text, then one picture, packed; only positions know its two sides.

Where reference pictures follow, rows times columns is not the token count: that call is dense.
"""

from __future__ import annotations

from dit_sparse.pipelines.examples import FLUX_PARTS, PACKED_LATENTS, Example, Positions
from dit_sparse.pipelines.family import Family, Unsized, Usual
from dit_sparse.pipelines.parts import bria_fibo_layers
from dit_sparse.pipelines.readers import Ids

JOINT_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
IMG_IDS = Ids("img_ids")
REFERENCES = "passes with reference images stay dense"


CHROMA = Family(
    name="chroma",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    text_padding=True,
    shape_inputs=("img_ids",),
    example=Example(FLUX_PARTS, pack=2),
    usual=Usual(num_steps=35),
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    note="its pipelines pass a mask of ones and zeros that diffusers adds to the scores, and "
    "such calls stay dense; calls with a bool mask or no mask are supported",
)
FLUX2 = Family(
    name="flux2",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    shape_inputs=("img_ids",),
    example=Example(
        {
            **FLUX_PARTS,
            "img_ids": Positions(4),
            "txt_ids": "text 4",
            "guidance": "1 ?guidance_embeds",
        },
        pack=2,
    ),
    pipelines=(
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
    ),
    note=f"{REFERENCES}, with or without KV cache",
)
FLUX3 = Family(
    name="flux3",
    attention=r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
    shape=IMG_IDS,
    text_first=True,
    text_varies=True,  # the mode blocks hold the picture alone
    shape_inputs=("img_ids",),
    example=Unsized("its prompt has a variable length of up to 8192 tokens"),
    note=f"tested through its modular pipeline; {REFERENCES} in the single-stream layers",
)
BRIA = Family(
    name="bria",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    batched_cfg=True,
    shape_inputs=("img_ids",),
    example=Example(
        {
            **FLUX_PARTS,
            "pooled_projections": "1 pooled_projection_dim ?pooled_projection_dim",
            "guidance": "1 ?guidance_embeds",
        },
        pack=2,
    ),
    text_tokens=128,
    usual=Usual(num_steps=30),
    pipelines=("BriaPipeline",),
)
BRIA_FIBO = Family(
    name="bria_fibo",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    text_padding=True,
    batched_cfg=True,
    shape_inputs=("img_ids",),
    example=Example({**FLUX_PARTS, "text_encoder_layers": bria_fibo_layers}),
    text_tokens=3000,
    compression=(16, 1),
    usual=Usual(num_steps=30),
    pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
    note=REFERENCES,
)
LONGCAT_IMAGE = Family(
    name="longcat_image",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    shape_inputs=("img_ids",),
    example=Example(FLUX_PARTS, pack=2),
    pipelines=("LongCatImagePipeline", "LongCatImageEditPipeline"),
    note=REFERENCES,
)
OVIS_IMAGE = Family(
    name="ovis_image",
    attention=JOINT_AND_SINGLE,
    shape=IMG_IDS,
    text_first=True,
    shape_inputs=("img_ids",),
    example=Example(FLUX_PARTS, pack=2),
    text_tokens=256,
    pipelines=("OvisImagePipeline",),
)
KREA2 = Family(
    name="krea2",
    attention=r"transformer_blocks\.\d+\.attn",
    shape=Ids("position_ids", joint=True),
    text_first=True,
    text_padding=True,
    shape_inputs=("position_ids",),
    example=Example(
        {
            "hidden_states": PACKED_LATENTS,
            "encoder_hidden_states": "1 text num_text_layers text_hidden_dim",
            "timestep": "1",
            "position_ids": Positions(joint=True),
        },
        pack=2,
    ),
    usual=Usual(num_steps=28),
    pipelines=("Krea2Pipeline",),
)
