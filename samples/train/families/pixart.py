# SPDX-License-Identifier: Apache-2.0
"""PixArt-Sigma: image tokens attend to each other and across to masked text; predicts noise."""

import random
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from objectives import Diffusion, Noised
from picture_latents import CHANNELS
from picture_text import WIDTH, PictureText
from torch import Tensor, nn

from families.pictures import PictureFamily

HEADS, HEAD_DIM, LAYERS, PATCH = 4, 48, 6, 2
SAMPLE_SIZE = 64  # the pipeline's resolution binning knows 32, 64, 128 and 256
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
GREATEST_WEIGHT = 6.0
EMBEDDING_GAIN = 2.0


class WeightedNoise(Diffusion):
    """Predict the noise; the error counts as flow matching's would, up to `GREATEST_WEIGHT`.

    An error in the noise is (1 + sqrt((1 - a) / a)) times as large an error in flow matching's
    velocity. Unweighted, the high levels, where a picture's layout is decided, hardly count.
    """

    def __call__(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Noised:
        """Noise ``latents``; the target is the noise times the level's weight."""
        noised = super().__call__(latents, noise, sigma)
        weight = self.weight(noised.timestep).view(-1, 1, 1, 1)
        return Noised(noised.noisy, noised.timestep, noised.target * weight)

    def weight(self, timestep: Tensor) -> Tensor:
        """Give the factor of prediction and target ``[batch]`` at each timestep."""
        signal = self.signal[timestep]
        return (1 + ((1 - signal) / signal).sqrt()).clamp(max=GREATEST_WEIGHT)


class PixArt(PictureFamily):
    """What ``samples/pixart-tiny`` is made with."""

    sample_defaults = MappingProxyType(
        {
            "height": 384,
            "width": 384,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "call": {"use_resolution_binning": False, "clean_caption": False},
        }
    )
    objective: WeightedNoise
    adam_names = ("pos_embed", "proj_out", "scale_shift", "adaln_single")

    def __init__(self) -> None:
        """Make the text side and the noise levels."""
        self.text = PictureText(length=300)
        signal = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod
        self.objective = WeightedNoise(signal, "epsilon")

    def make_transformer(self, seed: int = 0) -> PixArtTransformer2DModel:
        """Build it so that every layer starts as the identity and the output as the input."""
        torch.manual_seed(seed)
        width = HEADS * HEAD_DIM
        model = PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=LAYERS,
            cross_attention_dim=width,
            sample_size=SAMPLE_SIZE,
            patch_size=PATCH,
            caption_channels=WIDTH,
            interpolation_scale=1,
        )
        zeros = [*model.adaln_single.linear.parameters(), model.proj_out.bias]
        for block in model.transformer_blocks:
            zeros += [block.attn1.to_out[0].weight, block.attn2.to_out[0].weight]
            zeros += [block.ff.net[2].weight]
            shifts_and_scales, gates = [0, 1, 3, 4], [2, 5]
            block.scale_shift_table.data[shifts_and_scales] *= 0.1
            block.scale_shift_table.data[gates] = 0.5
        for param in zeros:
            nn.init.zeros_(param)
        nn.init.zeros_(model.scale_shift_table)
        # noise is most of the input at high levels: let it through from the start
        embedding = model.pos_embed.proj  # [width, channels, patch, patch]
        nn.init.orthogonal_(embedding.weight)
        across = embedding.weight.data.permute(2, 3, 1, 0).reshape(-1, width)  # as the output's
        model.proj_out.weight.data.copy_(across / EMBEDDING_GAIN)
        embedding.weight.data *= EMBEDDING_GAIN
        return model

    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:  # noqa: ARG002
        """Encode captions; paddings are masked, so their number does not matter."""
        text, mask = self.text(captions, masked=True)
        return {"text": text, "mask": mask}

    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict the noise, times the level's weight."""
        noise: Tensor = model(
            noisy,
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning["mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return noise.float() * self.objective.weight(timestep).view(-1, 1, 1, 1)

    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> PixArtSigmaPipeline:
        """Put the pipeline together."""
        return PixArtSigmaPipeline(
            tokenizer=self.text.tokenizer,
            text_encoder=self.text.encoder,
            vae=vae,
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(**BETAS),
        )
