# SPDX-License-Identifier: Apache-2.0
"""Rows of models whose main attention holds text, then video or picture tokens.

"Text" is all that stands before the video and is always computed: a prompt, registers, history
frames of a coarser grid, sound. Past 300 lines, as it is one table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.pipelines.examples import (
    COGVIEW_PARTS,
    PACKED_LATENTS,
    PICTURE_LATENTS,
    PROMPT_MASK,
    VIDEO_LATENTS,
    Asked,
    Example,
    Full,
    Positions,
)
from dit_sparse.pipelines.family import Family, Unsized, Usual, empty
from dit_sparse.pipelines.parts import bria_fibo2_prompt, consisid_faces
from dit_sparse.pipelines.readers import ENCODER, Latents, Listed

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape

ATTN1 = r"transformer_blocks\.\d+\.attn1"
LAYERS = r"layers\.\d+\.attn"
PICTURE = Latents(("bchw",), text=ENCODER)
# Helios packs older history into coarser tokens: how many patches to one, along each axis.
HISTORY = {
    "latents_history_short": (1, 1),
    "latents_history_mid": (2, 2),
    "latents_history_long": (4, 4),
}
IDEOGRAM_PICTURE = 2  # what diffusers writes into the indicator


def helios(config: Any, inputs: dict[str, Any]) -> Shape:
    """Read `hidden_states` [b, c, t, h, w], and the frames of history that stand before it."""
    patch_t, patch_h, patch_w = config.patch_size
    _, _, frames, height, width = inputs["hidden_states"].shape
    before = 0
    for name, (coarse_t, coarse) in HISTORY.items():
        history = inputs.get(name)
        if history is not None and inputs.get(f"indices_{name}") is not None:
            _, _, h_frames, h_height, h_width = history.shape
            before += (
                -(-h_frames // (patch_t * coarse_t))
                * -(-h_height // (patch_h * coarse))
                * -(-h_width // (patch_w * coarse))
            )
    return frames // patch_t, height // patch_h, width // patch_w, before


def bria_fibo2(config: Any, inputs: dict[str, Any]) -> Shape | None:
    """Read `hidden_states` [b, c, h, w].

    A prompt becomes at most so many tokens as the config says; with prompts of several lengths
    they stand behind the picture and are masked: that pass stays dense, as do reference pictures.
    """
    if inputs.get("context_latents"):
        return None
    _, _, height, width = inputs["hidden_states"].shape
    patch = config.patch_size
    return 1, height // patch, width // patch, config.max_num_gist_tokens


def ideogram4(config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG001
    """Read `position_ids` [b, tokens, 3] of the tokens that `indicator` calls the picture's.

    Padding, prompt and picture stand in one sequence, padding in front.
    """
    picture = inputs["indicator"] == IDEOGRAM_PICTURE
    tokens = int(picture[0].sum())
    if not tokens or not bool(picture[:, -tokens:].all()) or bool(picture[:, :-tokens].any()):
        return None
    position = inputs["position_ids"][0]
    extent = position[-1] - position[-tokens]
    return 1, int(extent[1]) + 1, int(extent[2]) + 1, picture.shape[1] - tokens


def minimax_h3(config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG001
    """Read `position_ids` [tokens, 3] (time, row, column) of the last run of `video_indices`.

    One sequence holds prompt, keyframes, sound and video, placed by indices; the video that is
    generated stands last, and all before it counts as text.
    """
    video = inputs["video_indices"]
    tokens = inputs["position_ids"].shape[0]
    if int(video[-1]) != tokens - 1:
        return None
    gaps = (video.diff() != 1).nonzero()
    start = int(video[int(gaps[-1]) + 1]) if len(gaps) else int(video[0])
    position = inputs["position_ids"][start:]
    frame = int((position[:, 0] == position[0, 0]).sum())
    width = int((position[:frame, 1] == position[0, 1]).sum())
    if (tokens - start) % frame or frame % width:
        return None
    return (tokens - start) // frame, frame // width, width, start


def ideogram4_example(config: Any, t: int, h: int, w: int, text: int) -> dict[str, Any]:
    """Make forward arguments; positions and the indicator with data."""
    asked = Asked(t, h, w, text, pack=2)
    tokens = text + asked.tokens
    indicator = torch.full((1, tokens), 3)
    indicator[:, text:] = IDEOGRAM_PICTURE
    return {
        "hidden_states": empty(1, tokens, config.in_channels),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, tokens, config.llm_features_dim),
        "position_ids": Positions(joint=True)(config, asked).long()[None],
        "segment_ids": torch.ones(1, tokens, dtype=torch.long),
        "indicator": indicator,
    }


EASYANIMATE = Family(
    name="easyanimate",
    attention=ATTN1,
    shape=Latents(("bcthw",), text=(*ENCODER, "encoder_hidden_states_t5")),
    text_first=True,
    batched_cfg=True,
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text text_embed_dim",
            "encoder_hidden_states_t5": "1 text text_embed_dim_t5 ?text_embed_dim_t5",
        }
    ),
    text_tokens=256,
    usual=Usual(512, 512, 49),
    pipelines=(
        "EasyAnimatePipeline",
        "EasyAnimateInpaintPipeline",
        "EasyAnimateControlPipeline",
    ),
)
CONSISID = Family(
    name="consisid",
    attention=ATTN1,
    shape=Latents(("btchw",), text=ENCODER),
    text_first=True,
    batched_cfg=True,
    example=Example(
        {
            "hidden_states": "1 t in_channels h w",
            "encoder_hidden_states": "1 text text_embed_dim",
            "timestep": "1",
            "id_cond": "1 LFE_id_dim ?is_train_face",
            "id_vit_hidden": consisid_faces,
        }
    ),
    text_tokens=226,
    usual=Usual(480, 720, 49),
    pipelines=("ConsisIDPipeline",),
)
COGVIEW3_PLUS = Family(
    name="cogview3_plus",
    attention=ATTN1,
    shape=PICTURE,
    text_first=True,
    batched_cfg=True,
    example=Example(COGVIEW_PARTS),
    text_tokens=224,
    pipelines=("CogView3PlusPipeline",),
)
COGVIEW4 = Family(
    name="cogview4",
    attention=ATTN1,
    shape=PICTURE,
    text_first=True,
    example=Example(COGVIEW_PARTS),
    text_tokens=1024,
    pipelines=("CogView4Pipeline", "CogView4ControlPipeline"),
)
GLM_IMAGE = Family(
    name="glm_image",
    attention=ATTN1,
    shape=PICTURE,
    text_first=True,
    example=Unsized("only quoted words of the prompt precede its image"),
    pipelines=("GlmImagePipeline",),
    note="edits with cached keys of reference images stay dense",
)
AURAFLOW = Family(
    name="auraflow",
    attention=r"(joint|single)_transformer_blocks\.\d+\.attn",
    shape=Latents(("bchw",), text=ENCODER, registers=8),
    text_first=True,
    batched_cfg=True,
    example=Example(
        {
            "hidden_states": PICTURE_LATENTS,
            "encoder_hidden_states": "1 text joint_attention_dim",
            "timestep": "1",
        }
    ),
    text_tokens=256,
    pipelines=("AuraFlowPipeline",),
)
LUMINA2 = Family(
    name="lumina2",
    attention=LAYERS,
    shape=PICTURE,
    text_first=True,
    text_padding=True,
    text_varies=True,  # padding is cut out
    timestep="",  # 1 - t / 1000
    example=Example(
        {
            "hidden_states": PICTURE_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text cap_feat_dim",
            "encoder_attention_mask": PROMPT_MASK,
        }
    ),
    text_tokens=256,
    usual=Usual(num_steps=30),
    pipelines=("Lumina2Pipeline",),
    note="a batch of prompts with different lengths stays dense, because its images start at "
    "different positions",
)
BRIA_FIBO2 = Family(
    name="bria_fibo2",
    attention=r"layers\.\d+\.attention",
    shape=bria_fibo2,
    text_first=True,
    text_varies=True,
    example=Example(
        {
            "hidden_states": PICTURE_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": bria_fibo2_prompt,
        }
    ),
    text_tokens=2048,
    usual=Usual(num_steps=30),
    pipelines=("BriaFibo2Pipeline",),
    note="reference images and batches of prompts with different lengths stay dense",
)
HELIOS = Family(
    name="helios",
    attention=r"blocks\.\d+\.attn1",
    shape=helios,
    text_first=True,
    example=Unsized("it generates a video in chunks, each after a history of a different length"),
    usual=Usual(384, 640, 132),
    pipelines=("HeliosPipeline", "HeliosPyramidPipeline"),
)
QWEN_IMAGE = Family(
    name="qwen_image",
    attention=r"transformer_blocks\.\d+\.attn",
    shape=Listed("img_shapes"),
    text_first=True,
    text_padding=True,
    example=Example(
        {
            "hidden_states": PACKED_LATENTS,
            "encoder_hidden_states": "1 text joint_attention_dim",
            "timestep": "1",
            "img_shapes": lambda _, asked: [[(1, asked.rows, asked.columns)]],
            "guidance": "1 ?guidance_embeds",
            "additional_t_cond": Full("1 ?use_additional_t_cond", 0),
        },
        pack=2,
    ),
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageLayeredPipeline",
    ),
    note="reference images of another size than the output stay dense",
)
IDEOGRAM4 = Family(
    name="ideogram4",
    attention=r"layers\.\d+\.attention",
    shape=ideogram4,
    text_first=True,
    text_padding=True,
    timestep="",  # 1 - t / 1000
    shape_inputs=("indicator", "position_ids"),
    example=ideogram4_example,
    text_tokens=2048,
    usual=Usual(2048, 2048, num_steps=48),
    pipelines=("Ideogram4Pipeline",),
    note="its pipeline's second transformer, for the unconditional image, is not replaced; "
    "enable it separately, with scheduler=",
)
MINIMAX_H3 = Family(
    name="minimax_h3",
    attention=r"transformer_blocks\.\d+\.attn",
    shape=minimax_h3,
    text_first=True,
    shape_inputs=("position_ids", "video_indices"),
    example=Unsized("a variable number of keyframes and audio tokens precedes its video"),
    usual=Usual(512, 768, 121),
    note="tested through its modular pipeline; the prompt refiner is not replaced",
)
