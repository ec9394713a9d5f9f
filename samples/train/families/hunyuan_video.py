# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo: two-stream then one-stream layers, masked padding, flow matching."""

import random
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from latents import CHANNELS
from objectives import Flow
from text import CAPTION_TOKENS, CLIP_TOKENS, TEXT_DIM, caption_words, make_clip
from text_llama import CROP_START, TEMPLATE, make_llama, make_llama_tokenizer
from torch import Tensor, nn

from families.video import VideoFamily

HEADS, HEAD_DIM = 4, 48
DUAL_LAYERS, SINGLE_LAYERS = 3, 3
GUIDANCE = 6.0  # HunyuanVideoPipeline's default, embedded: the only value that trains


@torch.no_grad()
def pass_through(param: Tensor) -> None:
    """Let a causal convolution copy channels, newest frame and centre, and train no further."""
    param.zero_()
    if param.ndim > 1:
        same = torch.arange(min(param.shape[:2]))
        param[same, same, -1, param.shape[3] // 2, param.shape[4] // 2] = 1
    param.requires_grad_(requires_grad=False)


class HunyuanVideo(VideoFamily):
    """What ``samples/hunyuan-video-tiny`` was made with."""

    objective = Flow()
    sample_defaults = MappingProxyType(
        {
            "height": 128,
            "width": 128,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": GUIDANCE,
            "negative_prompt": "",
            "fps": 12,
            "call": {"true_cfg_scale": 4.0},
        }
    )
    piece_sizes = ((1, 9), (1, 17))
    layer_lists = ("transformer_blocks", "single_transformer_blocks")
    adam_names = (
        "x_embedder",
        "norm1.linear",
        "norm1_context.linear",
        ".norm.linear",
        "norm_out",
        "time_text_embed",
    )

    def __init__(self) -> None:
        """Make the text side."""
        words = caption_words()
        self.tokenizer = make_llama_tokenizer(words)
        self.encoder = make_llama(self.tokenizer)
        self.clip_tokenizer, self.clip_encoder = make_clip(words)

    def make_transformer(self, seed: int = 0) -> HunyuanVideoTransformer3DModel:
        """Build it so that every layer starts as the identity and the output starts at zero."""
        torch.manual_seed(seed)
        model = HunyuanVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=DUAL_LAYERS,
            num_single_layers=SINGLE_LAYERS,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            rope_axes_dim=(16, 16, 16),
            rope_theta=10_000.0,
        )
        zeros = [*model.proj_out.parameters(), *model.norm_out.linear.parameters()]
        norms = []
        for layer in model.transformer_blocks:
            zeros += [layer.attn.to_out[0].weight, layer.attn.to_add_out.weight]
            zeros += [layer.ff.net[2].weight, layer.ff_context.net[2].weight]
            norms += [layer.norm1.linear, layer.norm1_context.linear]
        for layer in model.single_transformer_blocks:
            zeros.append(layer.proj_out.weight)
            norms.append(layer.norm.linear)
        for linear in norms:  # shift, scale and gate, once or twice
            zeros.append(linear.weight)
            gates = torch.tensor([0, 0, 0.5]).repeat_interleave(HEADS * HEAD_DIM)
            linear.bias.data.copy_(gates.repeat(len(linear.bias) // len(gates)))
        for param in zeros:
            nn.init.zeros_(param)
        return model

    def make_autoencoder(self, seed: int = 0) -> AutoencoderKLHunyuanVideo:
        """Build it; residual branches start at zero. Latents are whitened, so no scaling.

        Nothing in the decoder leads around its upsampling convolutions, and in training they soon
        blur: they are fixed to copy the latents to the last layers, and the rest corrects.
        """
        torch.manual_seed(seed)
        model = AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS,
            block_out_channels=(16, 16, 32, 48),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=1.0,
        )
        for name, param in model.named_parameters():
            if ".conv2." in name or ".to_out." in name:
                nn.init.zeros_(param)
            handing_on = (".post_quant_conv.", ".conv_in.", ".upsamplers.", ".conv_shortcut.")
            if not name.startswith("encoder.") and any(part in f".{name}" for part in handing_on):
                pass_through(param)
        return model

    @torch.no_grad()
    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:  # noqa: ARG002
        """Encode captions as the pipeline does; only padding, which is masked, is shorter."""
        tokens = self.tokenizer(
            [TEMPLATE.format(caption) for caption in captions],
            padding="max_length",
            max_length=CROP_START + CAPTION_TOKENS,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        states = self.encoder(tokens.input_ids, mask, output_hidden_states=True).hidden_states
        pooled = self.clip_tokenizer(
            captions, padding="max_length", max_length=CLIP_TOKENS, return_tensors="pt"
        )
        return {
            "encoder_hidden_states": states[-3][:, CROP_START:],
            "encoder_attention_mask": mask[:, CROP_START:],
            "pooled_projections": self.clip_encoder(pooled.input_ids).pooler_output,
            "guidance": torch.full((len(captions),), 1000 * GUIDANCE),
        }

    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict the velocity."""
        return model(noisy, timestep, **conditioning).sample

    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> HunyuanVideoPipeline:
        """Put the pipeline together."""
        return HunyuanVideoPipeline(
            text_encoder=self.encoder,
            tokenizer=self.tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=self.clip_encoder,
            tokenizer_2=self.clip_tokenizer,
        )
