# SPDX-License-Identifier: Apache-2.0
"""CogVideoX: joint attention over unmasked padding and video, v-prediction."""

import random
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from latents import CHANNELS, FRAMES
from objectives import Diffusion
from text import CAPTION_TOKENS, TEXT_DIM, caption_words, make_t5, make_tokenizer, padding_bias
from torch import Tensor, nn

from families.video import VideoFamily

HEADS, HEAD_DIM, LAYERS = 4, 48, 6
TIME_DIM = 96
NATIVE_GRID, NATIVE_FRAMES = 16, 33  # latent pixels each way, video frames
PADDED_LENGTHS = (64, 226)  # CogVideoXPipeline pads to 226 by default


def make_scheduler() -> CogVideoXDDIMScheduler:
    """Make the scheduler with the settings published for CogVideoX-2b."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


@cache
def rotary(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Give the rotary tables that the pipeline computes for a latents grid."""
    region = get_resize_crop_region_for_grid((height, width), NATIVE_GRID, NATIVE_GRID)
    return get_3d_rotary_pos_embed(HEAD_DIM, region, (height, width), frames)


class CogVideoX(VideoFamily):
    """What ``samples/cogvideox-tiny`` was made with."""

    objective = Diffusion(make_scheduler().alphas_cumprod, "v")
    sample_defaults = MappingProxyType(
        {
            "height": 128,
            "width": 128,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "fps": 12,
        }
    )
    adam_names = ("patch_embed", "proj_out", "norm1.linear", "norm2.linear", "time_embedding")
    piece_sizes = ((1, 9), (1, 17))  # this decoder gives 8 frames for two latent frames alone

    def __init__(self) -> None:
        """Make the text side."""
        self.tokenizer = make_tokenizer(caption_words(), max(PADDED_LENGTHS))
        self.encoder = make_t5(self.tokenizer)

    def make_transformer(self, seed: int = 0) -> CogVideoXTransformer3DModel:
        """Build it so that every layer starts as the identity and the output starts at zero."""
        torch.manual_seed(seed)
        model = CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            time_embed_dim=TIME_DIM,
            text_embed_dim=TEXT_DIM,
            num_layers=LAYERS,
            sample_width=NATIVE_GRID,
            sample_height=NATIVE_GRID,
            sample_frames=NATIVE_FRAMES,
            patch_size=1,
            temporal_compression_ratio=FRAMES,
            max_text_seq_length=max(PADDED_LENGTHS),
            use_rotary_positional_embeddings=True,
        )
        zeros = [*model.proj_out.parameters(), *model.norm_out.linear.parameters()]
        for layer in model.transformer_blocks:
            zeros += [layer.attn1.to_out[0].weight, layer.ff.net[2].weight]
            for norm in (layer.norm1, layer.norm2):
                zeros.append(norm.linear.weight)
                # shift, scale and gate of the video, then of the text
                gates = torch.tensor([0, 0, 0.5, 0, 0, 0.5]).repeat_interleave(HEADS * HEAD_DIM)
                norm.linear.bias.data.copy_(gates)
        for param in zeros:
            nn.init.zeros_(param)
        return model

    def make_autoencoder(self, seed: int = 0) -> AutoencoderKLCogVideoX:
        """Build it; residual branches start at zero. Latents are whitened, so no scaling."""
        torch.manual_seed(seed)
        model = AutoencoderKLCogVideoX(
            block_out_channels=(16, 24, 32, 48),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=4,
            sample_height=NATIVE_GRID * 8,
            sample_width=NATIVE_GRID * 8,
            scaling_factor=1.0,
        )
        for name, param in model.named_parameters():
            if ".conv2." in name:
                nn.init.zeros_(param)
        return model

    @torch.no_grad()
    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:
        """Encode captions at one of the padded lengths; all but a few equal paddings are cut.

        The pipeline gives the encoder no mask: padding takes part there, and in the transformer.
        Its vectors are equal (``make_t5``) and stay so, as the transformer's text has no
        positions.
        """
        length = rng.choice(PADDED_LENGTHS)
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=length, return_tensors="pt"
        )
        text = self.encoder(tokens.input_ids).last_hidden_state[:, :CAPTION_TOKENS]
        bias = padding_bias(tokens.attention_mask[:, :CAPTION_TOKENS], length)
        return {"text": text, "bias": bias}

    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict v."""
        video = noisy.transpose(1, 2)  # [batch, frames, channels, height, width]
        frames, _, height, width = video.shape[1:]
        bias = torch.zeros(len(noisy), 1, frames * height * width)
        bias = torch.cat([conditioning["bias"][:, None], bias], dim=2)  # [batch, 1, tokens]
        predicted = model(
            video,
            conditioning["text"],
            timestep,
            image_rotary_emb=rotary(frames, height, width),
            attention_kwargs={"attention_mask": bias},
        ).sample
        return predicted.transpose(1, 2)

    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> CogVideoXPipeline:
        """Put the pipeline together."""
        return CogVideoXPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.encoder,
            vae=vae,
            transformer=transformer,
            scheduler=make_scheduler(),
        )

    def unpack(self, latents: Tensor, pixels: int) -> Tensor:  # noqa: ARG002
        """Put channels before frames."""
        return latents.transpose(1, 2)
