# SPDX-License-Identifier: Apache-2.0
"""One tiny model for every row of the table of models; grids and lengths counted by hand.

A second case of a class stands under "Class/what is different". Past 300 lines, as it is one
table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.models.case import PICTURE, TEXT, VIDEO, Case, arguments, ids, mask, per_sample, time

if TYPE_CHECKING:
    from collections.abc import Callable

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
LATENTS = per_sample(4, 3, 8, 12)  # with patches of 1 x 2 x 2: 3 x 4 x 6
PROMPT = per_sample(TEXT, 16, seed=1)
WAN_INPUTS = {
    "hidden_states": LATENTS,
    "timestep": time,
    "encoder_hidden_states": PROMPT,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 6, 6)  # of 16
PAIR = per_sample(2, seed=3)


def listed(draw: Callable[[int], torch.Tensor]) -> Callable[[int], list[torch.Tensor]]:
    """Give the samples as a list."""
    return lambda batch: list(draw(batch))


def repeated(value: Any) -> Callable[[int], list[Any]]:
    """Give the same for every sample."""
    return lambda batch: [value] * batch


def before_picture(draw: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """Put a prompt's mask before that of a picture, which is all there; bool."""
    return lambda batch: torch.nn.functional.pad(draw(batch), (0, 48), value=1).bool()


def front_padded(batch: int) -> torch.Tensor:
    """Make a prompt's mask whose padding stands in front."""
    return mask((4, 7), TEXT)(batch).flip(1)


VIDEO_ONLY = {
    "WanVACETransformer3DModel": Case(
        {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8},
        arguments(**WAN_INPUTS, control_hidden_states=per_sample(8, 3, 8, 12, seed=2)),
        layers=5,
    ),
    "WanAnimateTransformer3DModel": Case(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        arguments(
            **{**WAN_INPUTS, "hidden_states": per_sample(12, 3, 8, 12)},
            pose_hidden_states=per_sample(4, 2, 8, 12, seed=2),
            face_pixel_values=per_sample(3, 8, 16, 16, seed=3),
        ),
    ),
    "ChronoEditTransformer3DModel": Case(WAN, arguments(**WAN_INPUTS)),
    "SkyReelsV2Transformer3DModel": Case(WAN, arguments(**WAN_INPUTS)),
    "AnyFlowTransformer3DModel": Case(
        WAN,
        arguments(
            hidden_states=per_sample(3, 4, 8, 12),
            timestep=lambda batch: torch.full((batch, 3), 500.0),
            r_timestep=lambda batch: torch.full((batch, 3), 250.0),
            encoder_hidden_states=PROMPT,
        ),
        axes="btchw",
    ),
    "LTXVideoTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "num_layers": 2,
        },
        arguments(
            hidden_states=per_sample(72, 4),
            encoder_hidden_states=PROMPT,
            encoder_attention_mask=mask((4, 7), TEXT),
            timestep=time,
            num_frames=3,
            height=4,
            width=6,
        ),
        axes="bnc",
    ),
    "LTX2VideoTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "caption_channels": 16,
            "num_layers": 2,
        },
        arguments(
            hidden_states=per_sample(72, 4),
            audio_hidden_states=per_sample(5, 4, seed=4),
            encoder_hidden_states=PROMPT,
            audio_encoder_hidden_states=PROMPT,
            timestep=time,
            sigma=time,
            num_frames=3,
            height=4,
            width=6,
            audio_num_frames=5,
        ),
        axes="bnc",
    ),
    "CosmosTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # it asks for torchvision
        },
        arguments(**WAN_INPUTS, fps=30),
    ),
    "AllegroTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_width": 12,
            "sample_height": 8,
            "sample_frames": 3,
        },
        arguments(**WAN_INPUTS, encoder_attention_mask=mask((4, 7), TEXT)),
    ),
    "LatteTransformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "patch_size": 2,
            "sample_size": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "attention_bias": True,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 3,
        },
        arguments(**{**WAN_INPUTS, "hidden_states": per_sample(4, 3, 12, 16)}),
        grid=PICTURE,
    ),
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": ROPE,
        },
        arguments(
            hidden_states=per_sample(3, 8, 12, 4),
            encoder_hidden_states=PROMPT,
            timestep=time,
            pooled_projections=per_sample(8, seed=2),
            visual_rope_pos=[torch.arange(size) for size in VIDEO],
            text_rope_pos=torch.arange(TEXT),
        ),
        axes="bthwc",
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": ROPE,
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "model_dim_a": 16,
            "time_dim_a": 16,
            "ff_dim_a": 16,
            "axes_dims_a": (2, 2, 4),
        },
        arguments(
            hidden_states=per_sample(3, 8, 12, 4),
            encoder_hidden_states=PROMPT,
            timestep=time,
            pooled_projections=per_sample(8, seed=2),
            audio_hidden_states=per_sample(5, 4, seed=4),
        ),
        axes="bthwc",
    ),
    "HunyuanDiT2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 32,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 4,
            "text_len_t5": TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        arguments(
            hidden_states=per_sample(4, 12, 16),
            timestep=time,
            encoder_hidden_states=per_sample(4, 16, seed=2),
            text_embedding_mask=mask((3, 4), 4),
            encoder_hidden_states_t5=PROMPT,
            text_embedding_mask_t5=mask((3, 7), TEXT),
        ),
        grid=PICTURE,
        axes="bchw",
    ),
    "DiTTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "norm_num_groups": 4,
            "sample_size": 16,
            "num_embeds_ada_norm": 10,
        },
        arguments(
            hidden_states=per_sample(4, 16, 16),
            timestep=lambda batch: torch.full((batch,), 5),
            class_labels=torch.arange,
        ),
        grid=(1, 8, 8),  # its output is made square
        axes="bchw",
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 16,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        arguments(
            hidden_states=per_sample(4, 12, 16),
            timestep=lambda batch: torch.full((batch,), 0.5),
            encoder_hidden_states=PROMPT,
            encoder_mask=mask((4, 7), TEXT),
            image_rotary_emb=torch.polar(torch.ones(8, 8, 8), torch.rand(8, 8, 8)),
            cross_attention_kwargs={},
        ),
        grid=PICTURE,
        axes="bchw",
    ),
}

TEXT_LAST = {
    "HunyuanVideo15Transformer3DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": ROPE,
            "target_size": 16,
            "task_type": "t2v",
        },
        arguments(
            hidden_states=per_sample(4, 3, 4, 6),
            timestep=time,
            encoder_hidden_states=PROMPT,
            encoder_attention_mask=mask((4, 7), TEXT),
            encoder_hidden_states_2=per_sample(5, 8, seed=2),
            encoder_attention_mask_2=mask((2, 5), 5),
            image_embeds=lambda batch: torch.zeros(batch, 3, 8),
        ),
        text=7 + 5 + 3,
        patch=1,
    ),
    "HunyuanImageTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (8, 8),
        },
        arguments(
            hidden_states=per_sample(4, 6, 8),
            timestep=time,
            encoder_hidden_states=PROMPT,
            encoder_attention_mask=mask((4, 7), TEXT),
            encoder_hidden_states_2=per_sample(5, 8, seed=2),
            encoder_attention_mask_2=mask((2, 5), 5),
        ),
        grid=PICTURE,
        text=7 + 5,
        axes="bchw",
        patch=1,
    ),
    "HunyuanImageTransformer2DModel/refiner": Case(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1, 1),
            "text_embed_dim": 16,
            "rope_axes_dim": ROPE,
        },
        arguments(
            hidden_states=per_sample(4, 3, 4, 6),
            timestep=time,
            encoder_hidden_states=PROMPT,
            encoder_attention_mask=mask((4, 7), TEXT),
        ),
        text=7,
        patch=1,
    ),
    "MochiTransformer3DModel": Case(
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        arguments(**WAN_INPUTS, encoder_attention_mask=mask((4, 7), TEXT)),
        texts=(4, 7),
    ),
    "SD3Transformer2DModel": Case(
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        arguments(
            hidden_states=per_sample(4, 12, 16),
            encoder_hidden_states=PROMPT,
            pooled_projections=per_sample(8, seed=2),
            timestep=time,
        ),
        grid=PICTURE,
        text=7,
        layers=5,
        bare=(1, 3),
        axes="bchw",
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [16, 12],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        arguments(
            hidden_states=per_sample(4, 16, 16),
            timesteps=time,
            encoder_hidden_states_t5=per_sample(5, 16, seed=1),
            encoder_hidden_states_llama3=lambda batch: torch.stack(
                [per_sample(6, 12, seed=layer)(batch) for layer in (2, 3)]
            ),
            pooled_embeds=per_sample(8, seed=4),
        ),
        grid=(1, 8, 8),  # others are padded
        text=5 + 6 + 6,
        axes="bchw",
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 16,
            "rope_axes_dim": ROPE,
        },
        arguments(
            hidden_states=per_sample(4, 6, 8),
            timestep=time,
            text_bth=PROMPT,
            text_lens=lambda batch: torch.tensor([4, 7][:batch]),
        ),
        grid=PICTURE,
        text=7,
        axes="bchw",
        patch=1,
    ),
    "ZImageTransformer2DModel": Case(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": list(ROPE),
            "axes_lens": [256, 32, 32],
        },
        arguments(
            x=listed(per_sample(4, 1, 12, 16)),
            t=lambda batch: torch.full((batch,), 0.5),
            cap_feats=lambda batch: [per_sample(n, 16, seed=n)(1)[0] for n in (7, 40)[:batch]],
        ),
        grid=PICTURE,
        text=16 + 32,  # 48 picture tokens are filled up to 64, 7 prompt tokens to 32
        batch_text=16 + 64,
        axes="xcthw",
        source="x",
        mixed=64,
    ),
    "MotifVideoTransformer3DModel": Case(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "image_embed_dim": 8,
            "rope_axes_dim": ROPE,
        },
        arguments(
            **WAN_INPUTS,
            encoder_attention_mask=mask((4, 7), TEXT),
            image_embeds=per_sample(3, 8, seed=2),
        ),
        text=3 + 7,
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": list(ROPE),
        },
        arguments(
            hidden_states=per_sample(2, 4, 1, 12, 16),
            timestep=time,
            encoder_hidden_states=PROMPT,
        ),
        grid=(2, 6, 8),
        text=7,
        axes="bic_hw",
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "in_channels": 4,
            "out_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": list(ROPE),
        },
        arguments(
            hidden_states=per_sample(96, 4, 1, 2, 2),
            timestep=time,
            encoder_hidden_states=PROMPT,
            encoder_hidden_states_mask=mask((4, 7), TEXT),
            shape_list=repeated([(1, 6, 8), (1, 6, 8)]),
        ),
        grid=(2, 6, 8),
        text=7,
        axes="bn____",
    ),
}

COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
COGVIEW_INPUTS = {
    "hidden_states": per_sample(4, 12, 16),
    "encoder_hidden_states": PROMPT,
    "timestep": time,
    "target_size": PAIR,
    "crop_coords": PAIR,
}
COGVIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "sample_width": 12,
    "sample_height": 8,
}

TEXT_FIRST = {
    "EasyAnimateTransformer3DModel": Case(
        {**COGVIDEO, "patch_size": 2, "mmdit_layers": 1, "text_embed_dim_t5": 8},
        arguments(**WAN_INPUTS, encoder_hidden_states_t5=per_sample(5, 8, seed=2)),
        text=7 + 5,
        first=True,
    ),
    "ConsisIDTransformer3DModel": Case(
        {**COGVIDEO, "sample_frames": 9, "max_text_seq_length": TEXT},
        arguments(**{**WAN_INPUTS, "hidden_states": per_sample(3, 4, 8, 12)}),
        text=7,
        first=True,
        axes="btchw",
    ),
    "CogView3PlusTransformer2DModel": Case(
        {**COGVIEW, "pos_embed_max_size": 16, "sample_size": 16},
        arguments(**COGVIEW_INPUTS, original_size=PAIR),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bchw",
    ),
    "CogView4Transformer2DModel": Case(
        {**COGVIEW, "sample_size": 16},
        arguments(**COGVIEW_INPUTS, original_size=PAIR),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bchw",
    ),
    "GlmImageTransformer2DModel": Case(
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        arguments(
            **COGVIEW_INPUTS,
            prior_token_id=lambda batch: (torch.arange(48) % 16).expand(batch, -1),
            prior_token_drop=lambda batch: torch.zeros(batch, 48, dtype=torch.bool),
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bchw",
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 256,
        },
        arguments(
            hidden_states=per_sample(4, 12, 16), encoder_hidden_states=PROMPT, timestep=time
        ),
        grid=PICTURE,
        text=8 + 7,
        first=True,
        axes="bchw",
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": ROPE,
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 16,
        },
        arguments(
            hidden_states=per_sample(4, 12, 16),
            timestep=lambda batch: torch.full((batch,), 0.5),
            encoder_hidden_states=PROMPT,
            encoder_attention_mask=mask((5, 5), TEXT),
        ),
        grid=PICTURE,
        text=5,
        first=True,
        axes="bchw",
        mixed=48,
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 24,
            "gist_step": 8,
            "gist_min_text_len": 4,
            "gist_max_text_len": 20,
            "axes_dims": ROPE,
            "axes_lens": (64, 32, 32),
        },
        arguments(
            hidden_states=per_sample(4, 12, 16),
            timestep=lambda batch: torch.full((batch,), 0.5),
            encoder_hidden_states=per_sample(2, 10, 16, seed=1),
        ),
        grid=PICTURE,
        text=16,  # 10 lies 6/16 of the way from 4 to 20: 8 + 6, rounded up to a multiple of 8
        first=True,
        axes="bchw",
        mixed=48,
    ),
    "HeliosTransformer3DModel": Case(
        {**WAN, "rope_dim": (4, 4, 4)},
        arguments(
            **WAN_INPUTS,
            indices_hidden_states=lambda batch: torch.arange(7, 10).expand(batch, -1),
            indices_latents_history_short=lambda batch: torch.tensor([[6]]).expand(batch, -1),
            indices_latents_history_mid=lambda batch: torch.tensor([[4, 5]]).expand(batch, -1),
            indices_latents_history_long=lambda batch: torch.arange(4).expand(batch, -1),
            latents_history_short=per_sample(4, 1, 8, 12, seed=2),
            latents_history_mid=per_sample(4, 2, 8, 12, seed=3),
            latents_history_long=per_sample(4, 4, 8, 12, seed=4),
        ),
        text=1 * 4 * 6 + 1 * 2 * 3 + 1 * 1 * 2,  # 12 columns make 1.5 of the coarsest patches
        first=True,
    ),
    "QwenImageTransformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": ROPE,
        },
        arguments(
            hidden_states=per_sample(48, 16),
            encoder_hidden_states=PROMPT,
            encoder_hidden_states_mask=mask((4, 7), TEXT),
            timestep=time,
            img_shapes=repeated([(1, 6, 8)]),
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        arguments(
            hidden_states=per_sample(TEXT + 48, 4),
            timestep=lambda batch: torch.full((batch,), 0.5),
            encoder_hidden_states=per_sample(TEXT + 48, 16, seed=1),
            # Three tokens of padding before the first sample's prompt, none before the second's.
            position_ids=lambda batch: (
                torch.cat([torch.zeros(TEXT, 3), ids(PICTURE, corner=512)])
                .long()
                .expand(batch, -1, -1)
            ),
            segment_ids=lambda batch: before_picture(front_padded)(batch).long() * 2 - 1,
            indicator=lambda batch: torch.nn.functional.pad(
                front_padded(batch) * 3, (0, 48), value=2
            ),
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
        offset=TEXT,
        unread=TEXT,
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            **HEADS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        arguments(
            # The prompt, a keyframe of 24 rows, 5 of sound, then the video.
            hidden_states=per_sample(24 + 72, 16),
            audio_hidden_states=per_sample(5, 4, seed=2),
            encoder_hidden_states=PROMPT,
            timestep=torch.tensor([500.0]),
            timestep_indices=torch.zeros(108, dtype=torch.long),
            token_tags=torch.tensor([0] * 7 + [1] * 24 + [2] * 5 + [1] * 72),
            position_ids=torch.cat(
                [
                    torch.arange(7.0)[:, None].expand(-1, 3),
                    torch.cartesian_prod(
                        torch.tensor([7.0]), torch.arange(4.0), torch.arange(6.0)
                    ),
                    torch.arange(5.0)[:, None].expand(-1, 3),
                    torch.cartesian_prod(
                        torch.arange(7.0, 10.0), torch.arange(4.0), torch.arange(6.0)
                    ),
                ]
            ),
            video_indices=torch.cat([torch.arange(7, 31), torch.arange(36, 108)]),
            audio_indices=torch.arange(31, 36),
            text_indices=torch.arange(7),
        ),
        text=7 + 24 + 5,
        first=True,
        axes="bnc",
        offset=24,
    ),
}

FLUX = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": ROPE,
}
FLUX_INPUTS = {
    "hidden_states": per_sample(48, 4),
    "encoder_hidden_states": PROMPT,
    "timestep": lambda batch: torch.full((batch,), 0.5),
    "img_ids": ids(PICTURE),
    "txt_ids": torch.zeros(TEXT, 3),
}

PACKED = {
    "ChromaTransformer2DModel": Case(
        {
            **FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        arguments(**FLUX_INPUTS, attention_mask=before_picture(mask((4, 7), TEXT))),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "Flux2Transformer2DModel": Case(
        {
            **FLUX,
            "timestep_guidance_channels": 16,
            "mlp_ratio": 2.0,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        arguments(
            **{**FLUX_INPUTS, "img_ids": ids(PICTURE, 4), "txt_ids": torch.zeros(TEXT, 4)},
            guidance=lambda batch: torch.full((batch,), 4.0),
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "Flux3Transformer2DModel": Case(
        {
            **FLUX,
            "cond_in_channels": 4,
            "timestep_channels": 16,
            "mlp_ratio": 2.0,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        arguments(**{**FLUX_INPUTS, "img_ids": ids(PICTURE, 4), "txt_ids": torch.zeros(TEXT, 4)}),
        grid=PICTURE,
        text=7,
        first=True,
        bare=(0,),
        axes="bnc",
    ),
    "BriaTransformer2DModel": Case(
        {**FLUX, "axes_dims_rope": list(ROPE)},
        arguments(**FLUX_INPUTS),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "BriaFiboTransformer2DModel": Case(
        {**FLUX, "axes_dims_rope": list(ROPE), "text_encoder_dim": 8},
        arguments(
            **FLUX_INPUTS,
            text_encoder_layers=lambda b: [per_sample(TEXT, 8, seed=i)(b) for i in (2, 3)],
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "LongCatImageTransformer2DModel": Case(
        {**FLUX, "axes_dims_rope": list(ROPE), "pooled_projection_dim": 16},
        arguments(**{**FLUX_INPUTS, "img_ids": ids(PICTURE, corner=512)}),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "OvisImageTransformer2DModel": Case(
        {**FLUX, "out_channels": 4},
        arguments(**FLUX_INPUTS),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
    "Krea2Transformer2DModel": Case(
        {
            **HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": ROPE,
        },
        arguments(
            hidden_states=per_sample(48, 4),
            encoder_hidden_states=per_sample(TEXT, 2, 16, seed=1),
            timestep=lambda batch: torch.full((batch,), 0.5),
            position_ids=torch.cat([torch.zeros(TEXT, 3), ids(PICTURE)]),
            encoder_attention_mask=lambda batch: mask((4, 7), TEXT)(batch).bool(),
        ),
        grid=PICTURE,
        text=7,
        first=True,
        axes="bnc",
    ),
}

CASES: dict[str, Case] = {**VIDEO_ONLY, **TEXT_LAST, **TEXT_FIRST, **PACKED}
