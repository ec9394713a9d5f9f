# SPDX-License-Identifier: Apache-2.0
"""Real pipelines around the tiny models of ``builders.py``: no text encoder, no VAE.

Those whose pipeline class is built from nothing but a transformer and a scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from tests.models.builders import CASES
from tests.models.case import TEXT, make
from tests.tiny import newer, normal

if TYPE_CHECKING:
    from collections.abc import Callable

ONE, OTHER = normal(1, TEXT, 16), normal(1, TEXT, 16, seed=2)
SHORT, WHOLE = (torch.arange(TEXT) < 4).long()[None], torch.ones(1, TEXT).long()
EMBEDS = {"prompt_embeds": ONE, "negative_prompt_embeds": OTHER}
MASKS = {"prompt_attention_mask": SHORT, "negative_prompt_attention_mask": WHOLE}
VIDEO_SIZE = {"height": 64, "width": 96}
PICTURE_SIZE = {"height": 96, "width": 128}


@dataclass(frozen=True)
class Pipe:
    """One pipeline of a class.

    Args:
        name: Of the pipeline's class.
        case: Of ``builders.CASES``.
        args: Of one call.
        branches: What the report must name, once in each step.
        absent: Parts that are not there.
        scheduler: Class of its scheduler.
        options: Of the scheduler.
        parts: What makes the parts that are there, beside those and the transformer.
        changes: To the case's config.
        text: Text tokens; None: as the case says.
    """

    name: str
    case: str
    args: dict[str, Any]
    branches: tuple[str, ...] = ("both",)
    absent: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    text: int | None = None


TWO, GUIDED = ("cond", "uncond"), ("pred_cond", "pred_uncond")
THREE_FRAMES = {**VIDEO_SIZE, "num_frames": 9}
SECOND = ("text_encoder_2", "tokenizer_2")
BASE = ("vae", "text_encoder", "tokenizer")


def guider() -> Any:
    """Make a guider, which names its branches itself."""
    return diffusers.ClassifierFreeGuidance(guidance_scale=4.0)


def hunyuan_vae() -> Any:
    """Make a VAE of 16 x 16 pixels and 4 frames."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    ).eval()


def ltx2_vae() -> Any:
    """Make a VAE of 32 x 32 pixels and 8 frames, as far as a pipeline asks it."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()


def ltx2_sound() -> Any:
    """Make a sound's VAE: 2 channels of 8 mel bins, 4 to one."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    ).eval()


def ltx2_connectors() -> Any:
    """Make what turns three layers of a text encoder into prompts for video and sound."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    sides = {
        f"{side}_connector_{key}": value
        for side in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    torch.manual_seed(0)
    return LTX2TextConnectors(caption_channels=16, text_proj_in_factor=3, **sides).eval()


PIPES = [
    Pipe(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {**EMBEDS, **MASKS, "height": 128, "width": 192, "num_frames": 17},
    ),
    Pipe(
        "LTX2Pipeline",
        "LTX2VideoTransformer3DModel",
        {
            "prompt_embeds": normal(1, TEXT, 16, 3),
            "negative_prompt_embeds": normal(1, TEXT, 16, 3, seed=2),
            **MASKS,
            "height": 128,
            "width": 192,
            "num_frames": 17,
            "spatio_temporal_guidance_blocks": [1],
            "stg_scale": 1.0,
            "modality_scale": 3.0,
        },
        branches=("both", "uncond_stg", "uncond_modality"),
        absent=("text_encoder", "tokenizer", "vocoder"),
        parts={"vae": ltx2_vae, "audio_vae": ltx2_sound, "connectors": ltx2_connectors},
    ),
    Pipe(
        "MochiPipeline",
        "MochiTransformer3DModel",
        {**EMBEDS, **MASKS, **VIDEO_SIZE, "num_frames": 13},
        branches=("both, sample 0", "both, sample 1"),
    ),
    Pipe(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            **EMBEDS,
            **PICTURE_SIZE,
            "pooled_prompt_embeds": normal(1, 8),
            "negative_pooled_prompt_embeds": normal(1, 8, seed=2),
        },
        absent=(*BASE, *SECOND, "text_encoder_3", "tokenizer_3"),
    ),
    Pipe(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            **EMBEDS,
            **PICTURE_SIZE,
            "prompt_embeds_mask": SHORT,
            "negative_prompt_embeds_mask": WHOLE,
            "true_cfg_scale": 4.0,
        },
        branches=TWO,
    ),
    Pipe(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            **PICTURE_SIZE,
            "prompt_embeds": [ONE[0]],
            "negative_prompt_embeds": [OTHER[0, :5]],
            "guidance_scale": 4.0,
        },
    ),
    Pipe(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        {**EMBEDS, **PICTURE_SIZE},
        branches=TWO,
    ),
    Pipe(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        {**EMBEDS, **PICTURE_SIZE},
        scheduler="CogVideoXDDIMScheduler",
    ),
    Pipe(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**PICTURE_SIZE, "prompt_embeds": ONE},
        branches=("cond",),
    ),
    Pipe(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {**EMBEDS, **MASKS, **PICTURE_SIZE},
        branches=TWO,
        text=TEXT,
    ),
    Pipe(
        "LuminaPipeline",
        "LuminaNextDiT2DModel",
        {**EMBEDS, **MASKS, **PICTURE_SIZE},
    ),
    Pipe(
        "Kandinsky5T2VPipeline",
        "Kandinsky5Transformer3DModel",
        {
            **THREE_FRAMES,
            "prompt_embeds_qwen": ONE,
            "prompt_embeds_clip": normal(1, 8),
            "prompt_cu_seqlens": torch.tensor([0, TEXT]),
            "negative_prompt_embeds_qwen": OTHER,
            "negative_prompt_embeds_clip": normal(1, 8, seed=2),
            "negative_prompt_cu_seqlens": torch.tensor([0, TEXT]),
        },
        branches=TWO,
        absent=(*BASE, *SECOND),
    ),
    Pipe(
        "SkyReelsV2Pipeline",
        "SkyReelsV2Transformer3DModel",
        {
            **THREE_FRAMES,
            "prompt_embeds": normal(1, 512, 16),
            "negative_prompt_embeds": normal(1, 512, 16, seed=2),
        },
        branches=TWO,
        scheduler="UniPCMultistepScheduler",
        options={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    Pipe(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        {**EMBEDS, **MASKS, **PICTURE_SIZE},
    ),
    Pipe(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {
            **EMBEDS,
            **PICTURE_SIZE,
            "prompt_attention_mask": SHORT.bool(),
            "negative_prompt_attention_mask": WHOLE.bool(),
        },
        branches=TWO,
        absent=(*BASE, "image_encoder", "feature_extractor"),
    ),
    Pipe(
        "OvisImagePipeline",
        "OvisImageTransformer2DModel",
        {**EMBEDS, **PICTURE_SIZE, "negative_prompt": None},
        branches=TWO,
    ),
    Pipe(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {
            **PICTURE_SIZE,
            "prompt_embeds": normal(1, TEXT, 2, 16),
            "prompt_embeds_mask": SHORT.bool(),
            "negative_prompt_embeds": normal(1, TEXT, 2, 16, seed=2),
            "negative_prompt_embeds_mask": WHOLE.bool(),
        },
        branches=TWO,
    ),
    Pipe(
        "HunyuanDiTPipeline",
        "HunyuanDiT2DModel",
        {
            **PICTURE_SIZE,
            "prompt_embeds": normal(1, 4, 16),
            "negative_prompt_embeds": normal(1, 4, 16, seed=2),
            "prompt_attention_mask": torch.ones(1, 4).long(),
            "negative_prompt_attention_mask": torch.ones(1, 4).long(),
            "prompt_embeds_2": ONE,
            "negative_prompt_embeds_2": OTHER,
            "prompt_attention_mask_2": SHORT,
            "negative_prompt_attention_mask_2": WHOLE,
            "use_resolution_binning": False,
        },
        absent=(*BASE, *SECOND, "safety_checker", "feature_extractor"),
        scheduler="DDPMScheduler",
        parts={"requires_safety_checker": bool},
    ),
    Pipe(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        {**EMBEDS, **THREE_FRAMES, "guidance_scale": 3.0},
        scheduler="FlowMapEulerDiscreteScheduler",
    ),
    Pipe(
        "HunyuanImagePipeline",
        "HunyuanImageTransformer2DModel",
        {
            "height": 192,
            "width": 256,
            "prompt_embeds": ONE,
            "prompt_embeds_mask": SHORT,
            "negative_prompt_embeds": OTHER,
            "negative_prompt_embeds_mask": WHOLE,
            "prompt_embeds_2": normal(1, 5, 8),
            "prompt_embeds_mask_2": torch.ones(1, 5).long(),
            "negative_prompt_embeds_2": normal(1, 5, 8, seed=2),
            "negative_prompt_embeds_mask_2": torch.ones(1, 5).long(),
        },
        branches=GUIDED,
        absent=(*BASE, *SECOND),
        parts={"guider": guider, "ocr_guider": guider},
    ),
    Pipe(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        {
            **THREE_FRAMES,
            "prompt_embeds": ONE,
            "prompt_embeds_mask": SHORT,
            "negative_prompt_embeds": OTHER,
            "negative_prompt_embeds_mask": WHOLE,
            "prompt_embeds_2": normal(1, 5, 8),
            "prompt_embeds_mask_2": torch.ones(1, 5).long(),
            "negative_prompt_embeds_2": normal(1, 5, 8, seed=2),
            "negative_prompt_embeds_mask_2": torch.ones(1, 5).long(),
        },
        branches=GUIDED,
        absent=("text_encoder", "tokenizer", *SECOND),
        parts={"guider": guider, "vae": hunyuan_vae},
        changes={"in_channels": 9},  # latents, a first frame's, and a mask
        text=TEXT + 5 + 729,
    ),
    Pipe(
        "ErnieImagePipeline",
        "ErnieImageTransformer2DModel",
        {
            **PICTURE_SIZE,
            "prompt_embeds": [ONE[0]],
            "negative_prompt_embeds": [OTHER[0]],
            "use_pe": False,
        },
        absent=(*BASE, "pe", "pe_tokenizer"),
    ),
]


def build(pipe: Pipe) -> Any:
    """Make the pipeline; skip the test where this version of diffusers does not have it."""
    cls = newer(pipe.name)
    case = CASES[pipe.case]
    transformer = make(pipe.case, replace(case, config={**case.config, **pipe.changes}))
    parts: dict[str, Any] = dict.fromkeys(pipe.absent)
    parts |= {name: part() for name, part in pipe.parts.items()}
    scheduler = getattr(diffusers, pipe.scheduler)(**pipe.options)
    made = cls(transformer=transformer, scheduler=scheduler, **parts)
    made.set_progress_bar_config(disable=True)
    return made
