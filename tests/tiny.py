# SPDX-License-Identifier: Apache-2.0
"""Real Diffusers pipelines of every family at tiny size: random weights, no text encoder.

Each maker returns the pipeline and the arguments of one call. Random weights prove shapes and
equality, never quality. Call ``run(pipe, args)``, which seeds anew each time.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

STEPS = 4


def newer(name: str) -> Any:
    """Give a class of diffusers; skip the test where this version does not have it."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw a standard normal tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, args: dict[str, Any], seed: int = 0, **changes: Any) -> torch.Tensor:
    """Generate latents from ``seed``."""
    call = {"num_inference_steps": STEPS, "output_type": "latent", **args, **changes}
    batch = call.pop("seeds", None)
    call["generator"] = (
        torch.Generator().manual_seed(seed)
        if batch is None
        else [torch.Generator().manual_seed(each) for each in batch]
    )
    with torch.no_grad():
        output = pipe(**call)
    latents = output.frames if hasattr(output, "frames") else getattr(output, "images", output)
    return latents if isinstance(latents, torch.Tensor) else torch.as_tensor(latents)


def _axes(head_dim: int) -> tuple[int, int, int]:
    """Split a head's width over frames, rows and columns for RoPE, all even."""
    side = (head_dim // 3) // 2 * 2
    return head_dim - 2 * side, side, side


def _wan_parts(layers: int, *, image: bool) -> tuple[Any, Any]:
    torch.manual_seed(1)
    added = {"image_dim": 4, "added_kv_proj_dim": 24} if image else {}
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if image else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=64,
        **added,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return transformer.eval(), vae.eval()


def wan(layers: int = 2, *, two_stages: bool = False) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 T2V; with ``two_stages`` Wan 2.2's pair of transformers."""
    transformer, vae = _wan_parts(layers, image=False)
    second = _wan_parts(layers, image=False)[0] if two_stages else None
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        transformer_2=second,
        boundary_ratio=0.875 if two_stages else None,
    )
    return pipe, {
        "prompt_embeds": normal(1, 512, 32),
        "negative_prompt_embeds": torch.zeros(1, 512, 32),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_scale": 5.0,
    }


def wan_i2v() -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 I2V: the first frame given; image tokens come in by cross-attention."""
    import transformers
    from PIL import Image

    transformer, vae = _wan_parts(2, image=True)
    vision = transformers.CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=2,
    )
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        transformer=transformer,
    )
    _, args = wan()
    return pipe, {**args, "image": Image.new("RGB", (96, 64), (200, 40, 90))}


def hunyuan_video(valid: int = 11, *, guided: bool = False) -> tuple[Any, dict[str, Any]]:
    """HunyuanVideo: dual- and single-stream layers, text behind the video, padding masked."""
    torch.manual_seed(2)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=_axes(12),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    text = 16
    args = {
        "prompt_embeds": normal(1, text, 16),
        "pooled_prompt_embeds": normal(1, 8),
        "prompt_attention_mask": (torch.arange(text) < valid).long()[None],
        "height": 48,
        "width": 80,
        "num_frames": 9,
    }
    if guided:
        args |= {
            "true_cfg_scale": 3.0,
            "negative_prompt_embeds": normal(1, text, 16, seed=5),
            "negative_pooled_prompt_embeds": normal(1, 8, seed=5),
            "negative_prompt_attention_mask": (torch.arange(text) < 3).long()[None],
        }
    return pipe, args


def cogvideox(*, v15: bool = False) -> tuple[Any, dict[str, Any]]:
    """CogVideoX 1.0 (no RoPE) or 1.5 (RoPE, two frames in a token): text first, one CFG batch."""
    torch.manual_seed(3)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        patch_size_t=2 if v15 else None,
        patch_bias=not v15,
        max_text_seq_length=13,
        use_rotary_positional_embeddings=v15,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDPMScheduler() if v15 else diffusers.CogVideoXDDIMScheduler()
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    return pipe, {
        "prompt_embeds": normal(1, 13, 32),
        "negative_prompt_embeds": torch.zeros(1, 13, 32),
        "height": 64,
        "width": 96,
        "num_frames": 17 if v15 else 9,  # three latent frames of tokens either way
        "guidance_scale": 6.0,
    }


def flux() -> tuple[Any, dict[str, Any]]:
    """FLUX.1: text first, then the picture; dual- and single-stream layers."""
    torch.manual_seed(4)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=_axes(16),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    return pipe, {
        "prompt_embeds": normal(1, 17, 32),
        "pooled_prompt_embeds": normal(1, 32),
        "height": 20,
        "width": 28,
    }


def pixart(*, sigma: bool = True, ddim: bool = False) -> tuple[Any, dict[str, Any]]:
    """PixArt alpha or sigma: image tokens only, one CFG batch."""
    torch.manual_seed(5)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        use_additional_conditions=False,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    pipe = kind(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.DDIMScheduler() if ddim else diffusers.DPMSolverMultistepScheduler(),
    )
    mask = (torch.arange(14) < 9).long()[None]
    return pipe, {
        "prompt_embeds": normal(1, 14, 32),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": torch.zeros(1, 14, 32),
        "negative_prompt_attention_mask": mask,
        "height": 112,
        "width": 144,
        "use_resolution_binning": False,
    }


PIPELINES = {
    "wan": wan,
    "wan_2.2": lambda: wan(two_stages=True),
    "wan_i2v": wan_i2v,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_guided": lambda: hunyuan_video(guided=True),
    "cogvideox": cogvideox,
    "cogvideox_1.5": lambda: cogvideox(v15=True),
    "flux": flux,
    "pixart_sigma": pixart,
    "pixart_alpha": lambda: pixart(sigma=False),
    "pixart_ddim": lambda: pixart(ddim=True),
}


def stretch(pipe: Any, by: float = 4.0) -> Any:
    """Enlarge query projections so that attention is peaked and choices of blocks matter."""
    for stage in ("transformer", "transformer_2"):
        model = getattr(pipe, stage, None)
        for name, parameter in model.named_parameters() if model is not None else ():
            if "to_q.weight" in name:
                parameter.data.mul_(by)
    return pipe
