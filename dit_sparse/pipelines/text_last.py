# SPDX-License-Identifier: Apache-2.0
"""Rows of models whose main attention holds video or picture tokens, then text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.pipelines.examples import (
    PICTURE_LATENTS,
    PROMPT_MASK,
    VIDEO_LATENTS,
    Example,
)
from dit_sparse.pipelines.family import Family, Unsized, Usual, empty
from dit_sparse.pipelines.parts import HUNYUAN_IMAGE_PARTS, HUNYUAN_VIDEO_15_PARTS, z_image_latents
from dit_sparse.pipelines.readers import ENCODER, Latents, Listed

if TYPE_CHECKING:
    from dit_sparse.pipelines.family import Shape

JOINT = r"transformer_blocks\.\d+\.attn"
JOINT_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
Z_IMAGE_MULTIPLE = 32  # diffusers pads picture and prompt of Z-Image to this many tokens


def hidream(config: Any, inputs: dict[str, Any]) -> Shape | None:
    """Read `hidden_states` [b, c, h, w].

    The text is T5's and the last Llama layer's, and in every block one more Llama layer's.
    Diffusers fills a picture that is not square up to the largest size with tokens that everybody
    sees (their keys are 0): they stand behind the picture, so they count as text.
    """
    latents = inputs["hidden_states"]
    if latents.ndim != 4:  # packed by the caller, for pictures of several sizes
        return None
    patch = config.patch_size
    height, width = latents.shape[2] // patch, latents.shape[3] // patch
    llama = inputs["encoder_hidden_states_llama3"][0].shape[-2]
    text = inputs["encoder_hidden_states_t5"].shape[1] + 2 * llama
    if latents.shape[2] != latents.shape[3]:
        most_rows, most_columns = config.max_resolution
        text += most_rows * most_columns // patch**2 - height * width
    return 1, height, width, text


def z_image(config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG001
    """Read `x` [c, t, h, w], one for each sample.

    What pads picture and prompt to a multiple of 32 is a learned token that everybody sees. The
    padding of the picture stands between it and the prompt, so it counts as text.
    """
    pictures, prompts = inputs["x"], inputs["cap_feats"]
    if isinstance(pictures[0], list) or len({each.shape for each in pictures}) != 1:
        return None
    _, frames, height, width = pictures[0].shape
    patch = inputs.get("patch_size") or 2
    size = (frames // (inputs.get("f_patch_size") or 1), height // patch, width // patch)
    text = max(len(prompt) + -len(prompt) % Z_IMAGE_MULTIPLE for prompt in prompts)
    return *size, text + -(size[0] * size[1] * size[2]) % Z_IMAGE_MULTIPLE


HUNYUAN_VIDEO_15 = Family(
    name="hunyuan_video_1.5",
    attention=JOINT,
    shape=Latents(
        ("bcthw",),
        text=("image_embeds", "encoder_hidden_states_2", *ENCODER),
        patch_t="patch_size_t",
    ),
    text_padding=True,
    example=Example(HUNYUAN_VIDEO_15_PARTS),
    text_tokens=1000,
    compression=(16, 4),
    usual=Usual(480, 848, 121),
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
)
HUNYUAN_IMAGE = Family(
    name="hunyuan_image",
    attention=JOINT_AND_SINGLE,
    shape=Latents(("bchw", "bcthw"), text=(*ENCODER, "encoder_hidden_states_2")),
    text_padding=True,
    text_varies=True,  # without a second text embedder the second text is not used
    example=Example(HUNYUAN_IMAGE_PARTS),
    text_tokens=1000,
    compression=(32, 1),
    usual=Usual(2048, 2048),
    pipelines=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
)
MOCHI = Family(
    name="mochi",
    attention=r"transformer_blocks\.\d+\.attn1",
    shape=Latents(("bcthw",), text=ENCODER),
    text_varies=True,
    per_sample=True,
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "encoder_hidden_states": "1 text text_embed_dim",
            "timestep": "1",
            "encoder_attention_mask": PROMPT_MASK,
        }
    ),
    text_tokens=256,
    compression=(8, 6),
    usual=Usual(480, 848, 19, 64),
    pipelines=("MochiPipeline",),
)
SD3 = Family(
    name="sd3",
    attention=r"transformer_blocks\.\d+\.attn2?",
    shape=Latents(("bchw",), text=ENCODER),
    text_varies=True,  # attn2 (SD 3.5 medium) holds the picture alone
    batched_cfg=True,
    example=Example(
        {
            "hidden_states": PICTURE_LATENTS,
            "encoder_hidden_states": "1 text joint_attention_dim",
            "pooled_projections": "1 pooled_projection_dim",
            "timestep": "1",
        }
    ),
    text_tokens=77 + 256,  # CLIP and T5,
    usual=Usual(num_steps=28),
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
)
HIDREAM = Family(
    name="hidream",
    attention=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
    shape=hidream,
    timestep="timesteps",
    batched_cfg=True,
    example=Unsized("the experts that compute a token depend on its content"),
    pipelines=("HiDreamImagePipeline",),
)
ERNIE_IMAGE = Family(
    name="ernie_image",
    attention=r"layers\.\d+\.self_attention",
    shape=Latents(("bchw",), text=("text_bth",)),
    text_padding=True,
    batched_cfg=True,
    example=Unsized("its prompt has a variable length, without padding or a limit"),
    pipelines=("ErnieImagePipeline",),
)
Z_IMAGE = Family(
    name="z_image",
    attention=r"layers\.\d+\.attention",
    shape=z_image,
    text_padding=True,
    timestep="",  # (1000 - t) / 1000, and called t
    batched_cfg=True,
    example=Example(
        {
            "x": z_image_latents,
            "t": "1",
            "cap_feats": lambda config, asked: [empty(asked.text, config.cap_feat_dim)],
        }
    ),
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
    ),
    note="passes with reference images (ZImageOmniPipeline) stay dense",
)
MOTIF_VIDEO = Family(
    name="motif_video",
    attention=JOINT_AND_SINGLE,
    shape=Latents(("bcthw",), text=("image_embeds", *ENCODER), patch_t="patch_size_t"),
    text_padding=True,
    example=Example(
        {
            "hidden_states": VIDEO_LATENTS,
            "timestep": "1",
            "encoder_hidden_states": "1 text text_embed_dim",
            "encoder_attention_mask": PROMPT_MASK,
        }
    ),
    usual=Usual(736, 1280, 121),
    pipelines=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
    note="decoder layers, which receive the video twice, stay dense",
)
JOYIMAGE_EDIT = Family(
    name="joyimage_edit",
    attention=r"double_blocks\.\d+\.attn",
    shape=Latents(("bcthw", "bncthw"), text=ENCODER),
    example=Unsized("its prompt contains the edited image, which has its own size"),
    usual=Usual(num_steps=40),
    pipelines=("JoyImageEditPipeline",),
)
JOYIMAGE_EDIT_PLUS = Family(
    name="joyimage_edit_plus",
    attention=r"double_blocks\.\d+\.attn",
    shape=Listed("shape_list"),
    text_padding=True,
    batched_cfg=True,
    example=Unsized("its prompt contains the edited images, which have their own sizes"),
    usual=Usual(num_steps=30),
    pipelines=("JoyImageEditPlusPipeline",),
    note="images of different sizes in one pass stay dense",
)
