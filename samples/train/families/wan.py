# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1: cross-attention to text that is padded with zeros, flow matching."""

import random
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from latents import CHANNELS, FRAMES, PIXELS
from objectives import Flow
from text import PIPELINE_TOKENS, TEXT_DIM, Prompts
from torch import Tensor, nn
from transformer import BiasedCrossAttention, collapse_padding

from families.video import VideoFamily

HEADS, HEAD_DIM, LAYERS = 4, 48, 6


class Wan(VideoFamily):
    """What ``samples/wan-tiny`` was made with."""

    objective = Flow()
    sample_defaults = MappingProxyType(
        {
            "height": 128,
            "width": 128,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "fps": 12,
        }
    )
    padded_lengths: tuple[int, ...] = (64, PIPELINE_TOKENS)  # drawn from, one a step
    ffn_dim = 2 * HEADS * HEAD_DIM
    layer_lists = ("blocks",)
    adam_names = ("patch_embedding", "proj_out", "time_proj", "scale_shift", "time_embedder")

    def __init__(self) -> None:
        """Make the text side."""
        self.prompts = Prompts()

    def make_transformer(self, seed: int = 0) -> WanTransformer3DModel:
        """Build it so that every layer starts as the identity and the output starts at zero."""
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=self.ffn_dim,
            num_layers=LAYERS,
            cross_attn_norm=True,
            rope_max_seq_len=128,
        )
        zeros = [model.proj_out.weight, model.proj_out.bias]
        zeros += [*model.condition_embedder.time_proj.parameters()]
        for block in model.blocks:
            zeros += [block.attn1.to_out[0].weight, block.attn2.to_out[0].weight]
            zeros += [block.ffn.net[2].weight]
            shifts_and_scales, gates = [0, 1, 3, 4], [2, 5]
            block.scale_shift_table.data[:, shifts_and_scales] *= 0.1
            block.scale_shift_table.data[:, gates] = 0.5
        for param in zeros:
            nn.init.zeros_(param)
        return model

    def prepare(self, model: nn.Module) -> None:
        """Let every layer's cross-attention read the short form of the padded text."""
        collapse_padding(model)

    def make_autoencoder(self, seed: int = 0) -> AutoencoderKLWan:
        """Build a small one of the residual (Wan 2.2) kind; residual branches start at zero."""
        torch.manual_seed(seed)
        model = AutoencoderKLWan(
            base_dim=24,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            is_residual=True,
            scale_factor_spatial=PIXELS,
            scale_factor_temporal=FRAMES,
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        )
        for name, param in model.named_parameters():
            if ".conv2." in name or ".proj." in name:
                nn.init.zeros_(param)
        return model

    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:
        """Encode captions for one of the padded lengths."""
        text, bias = self.prompts(captions, rng.choice(self.padded_lengths))
        return {"text": text, "bias": bias}

    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict the velocity."""
        BiasedCrossAttention.bias = conditioning["bias"]
        return model(noisy, timestep, conditioning["text"]).sample

    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> WanPipeline:
        """Put the pipeline together."""
        return WanPipeline(
            tokenizer=self.prompts.tokenizer,
            text_encoder=self.prompts.encoder,
            vae=vae,
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                num_train_timesteps=1000,
                flow_shift=3.0,
            ),
            transformer=transformer,
        )
