# SPDX-License-Identifier: Apache-2.0
"""Forward arguments without data that take more than a shape in words, by model.

Where a pipeline's own arithmetic stands behind a size (sound as long as the video, the second
text of HunyuanVideo 1.5), it is that of the installed Diffusers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines.examples import (
    PACKED_LATENTS,
    PICTURE_LATENTS,
    PROMPT_MASK,
    VIDEO_LATENTS,
    Asked,
    Full,
)
from dit_sparse.pipelines.family import empty

if TYPE_CHECKING:
    from dit_sparse.pipelines.examples import Part


def skyreels_fps(config: Any, _: Asked) -> list[int] | None:
    """Say which of the two frame rates it is, to checkpoints that are told."""
    return [0] if config.inject_sample_info else None


def kandinsky_latents(config: Any, asked: Asked) -> torch.Tensor:
    """Make latents; beside them stand those of a picture, and a mask, where it takes one."""
    channels = config.in_visual_dim
    return empty(
        1, asked.t, asked.h, asked.w, 2 * channels + 1 if config.visual_cond else channels
    )


def kandinsky_positions(config: Any, asked: Asked) -> list[torch.Tensor]:
    """Make the positions along each axis, in tokens."""
    sizes = zip((asked.t, asked.h, asked.w), config.patch_size, strict=True)
    return [torch.arange(size // patch) for size, patch in sizes]


def kandinsky_audio(config: Any, asked: Asked) -> torch.Tensor | None:
    """Make as much sound as the video is long: 24 frames a second, 44100 / 1024 latents."""
    if config.model_dim_a is None:
        return None
    seconds = ((asked.t - 1) * 4 + 1) / 24
    return empty(1, math.ceil(seconds * 44_100 / 1024), config.in_audio_dim)


def ltx2_audio_tokens(config: Any, asked: Asked) -> int:
    """Count latents of as much sound as the video is long, at 24 frames a second."""
    seconds = ((asked.t - 1) * config.vae_scale_factors[0] + 1) / 24
    a_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    tokens: int = round(seconds * a_second)
    return tokens


def lumina_rotary(config: Any, _: Asked) -> torch.Tensor:
    """Make complex rotations of the largest picture, as the pipeline does."""
    width = config.hidden_size // config.num_attention_heads // 2
    return empty(384, 384, width, dtype=torch.complex64)


def hunyuan_dit_rotary(config: Any, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Make cosine and sine of each token."""
    tokens = (asked.h // config.patch_size) * (asked.w // config.patch_size)
    rotary = empty(tokens, config.attention_head_dim)
    return rotary, rotary


def cosmos_padding(config: Any) -> dict[str, Any]:
    """Count the mask of padding as one more channel: scaling it would take torchvision."""
    if not config.concat_padding_mask:
        return {}
    return {"in_channels": config.in_channels + 1, "concat_padding_mask": False}


def consisid_faces(config: Any, _: Asked) -> list[torch.Tensor] | None:
    """Make a face's features, of five layers of its encoder, for checkpoints that take a face."""
    return [empty(1, 577, config.LFE_vit_dim)] * 5 if config.is_train_face else None


def bria_fibo2_prompt(config: Any, asked: Asked) -> torch.Tensor:
    """Make features of the prompt: for the first layer, and for each that injects more."""
    return empty(1, len(config.injection_layer_ids) + 1, asked.text, config.cap_feat_dim)


def z_image_latents(config: Any, asked: Asked) -> list[torch.Tensor]:
    """Make one picture, in a list of samples."""
    return [empty(config.in_channels, asked.t, asked.h, asked.w)]


def hunyuan_image_latents(config: Any, asked: Asked) -> torch.Tensor:
    """Make a picture of the first stage."""
    if len(config.patch_size) != 2:
        raise UnsupportedError(
            f"patch_size {config.patch_size}: this is HunyuanImage's refiner, which refines an "
            "existing image; only the base model, with a patch size of two numbers, can be "
            "counted"
        )
    return empty(1, config.in_channels, asked.h, asked.w)


def bria_fibo_layers(config: Any, asked: Asked) -> list[torch.Tensor]:
    """Make the text encoder's features for each layer."""
    layers = config.num_layers + config.num_single_layers
    return [empty(1, asked.text, config.text_encoder_dim)] * layers


LTX_SIZE: dict[str, Part] = {
    "num_frames": lambda _, asked: asked.t,
    "height": lambda _, asked: asked.h,
    "width": lambda _, asked: asked.w,
}
LTX2_PARTS: dict[str, Part] = {
    "hidden_states": PACKED_LATENTS,
    "audio_hidden_states": lambda config, asked: empty(
        1, ltx2_audio_tokens(config, asked), config.audio_in_channels
    ),
    "encoder_hidden_states": lambda config, asked: empty(
        1,
        asked.text,
        config.caption_channels if config.use_prompt_embeddings else config.cross_attention_dim,
    ),
    "audio_encoder_hidden_states": lambda config, asked: empty(
        1,
        asked.text,
        config.caption_channels
        if config.use_prompt_embeddings
        else config.audio_cross_attention_dim,
    ),
    "timestep": "1",
    "sigma": "1",
    "audio_num_frames": ltx2_audio_tokens,
    **LTX_SIZE,
}
HUNYUAN_DIT_PARTS: dict[str, Part] = {
    "hidden_states": PICTURE_LATENTS,
    "timestep": "1",
    "encoder_hidden_states": "1 text_len cross_attention_dim",
    "text_embedding_mask": Full("1 text_len"),
    "encoder_hidden_states_t5": "1 text_len_t5 cross_attention_dim_t5",
    "text_embedding_mask_t5": Full("1 text_len_t5"),
    "image_meta_size": "1 6 ?use_style_cond_and_image_meta_size",
    "style": Full("1 ?use_style_cond_and_image_meta_size", 0),
    "image_rotary_emb": hunyuan_dit_rotary,
}
# Three texts: the prompt, words in quotation marks (ByT5), a picture (zeros where there is none:
# masked, but in the sequence).
HUNYUAN_VIDEO_15_PARTS: dict[str, Part] = {
    "hidden_states": VIDEO_LATENTS,
    "timestep": "1",
    "encoder_hidden_states": "1 text text_embed_dim",
    "encoder_attention_mask": PROMPT_MASK,
    "encoder_hidden_states_2": "1 256 text_embed_2_dim",
    "encoder_attention_mask_2": Full("1 256"),
    "image_embeds": Full("1 729 image_embed_dim", 0.0),
    "timestep_r": "1 ?use_meanflow",
}
HUNYUAN_IMAGE_PARTS: dict[str, Part] = {
    "hidden_states": hunyuan_image_latents,
    "timestep": "1",
    "encoder_hidden_states": "1 text text_embed_dim",
    "encoder_attention_mask": PROMPT_MASK,
    "encoder_hidden_states_2": "1 128 text_embed_2_dim ?text_embed_2_dim",
    "encoder_attention_mask_2": Full("1 128 ?text_embed_2_dim"),
    "guidance": "1 ?guidance_embeds",
    "timestep_r": "1 ?use_meanflow",
}
