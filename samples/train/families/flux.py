# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: text and image in one attention, dual- then single-stream layers, flow matching."""

import random
from types import MappingProxyType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from objectives import Flow
from picture_latents import CHANNELS
from picture_text import CAPTION_TOKENS, POOLED, WIDTH, PictureText
from torch import Tensor, nn

from families.pictures import PictureFamily

HEADS, HEAD_DIM, DUAL_LAYERS, SINGLE_LAYERS = 4, 48, 2, 4
NATIVE = 48  # tokens per side of a picture of 384 pixels
SMALL = 32  # up to so many tokens per side, a picture is a larger one seen from farther away
PADDED_LENGTHS = (64, 256, 512, 512)  # FluxPipeline pads to 512 where it is told nothing


class Flux(PictureFamily):
    """What ``samples/flux-tiny`` is made with."""

    sample_defaults = MappingProxyType(
        {
            "height": 384,
            "width": 384,
            "num_inference_steps": 20,
            "negative_prompt": "",
            "call": {"true_cfg_scale": 4.0},
        }
    )
    objective = Flow()
    layer_lists = ("transformer_blocks", "single_transformer_blocks")
    adam_names = ("x_embedder", "context_embedder", "norm", "time_text_embed")

    def __init__(self) -> None:
        """Make the text side."""
        self.text = PictureText()

    def make_transformer(self, seed: int = 0) -> FluxTransformer2DModel:
        """Build it so that every layer starts as the identity and the output starts at zero."""
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=DUAL_LAYERS,
            num_single_layers=SINGLE_LAYERS,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=POOLED,
            axes_dims_rope=(8, 20, 20),
        )
        zeros = [model.proj_out.weight, model.proj_out.bias, *model.norm_out.linear.parameters()]
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                zeros.append(norm.linear.weight)
                _open_gates(norm.linear.bias, (2, 5))
            zeros += [block.attn.to_out[0].weight, block.attn.to_add_out.weight]
            zeros += [block.ff.net[2].weight, block.ff_context.net[2].weight]
        for block in model.single_transformer_blocks:
            zeros += [block.norm.linear.weight, block.proj_out.weight]
            _open_gates(block.norm.linear.bias, (2,))
        for param in zeros:
            nn.init.zeros_(param)
        return model

    @torch.no_grad()
    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:
        """Encode captions for one of the padded lengths; the last token stands for the rest."""
        text, _ = self.text(captions, masked=False)
        bias = torch.zeros(len(captions), 1, 1, CAPTION_TOKENS)
        bias[..., -1] = torch.tensor(float(rng.choice(PADDED_LENGTHS) - CAPTION_TOKENS + 1)).log()
        side = NATIVE if rng.random() < 0.8 else 64  # seen from farther away: 384 or 512 pixels
        return {"text": text, "pooled": self.text.pooled(captions), "bias": bias, "side": side}

    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict the velocity."""
        height, width = noisy.shape[-2:]
        tokens = height // 2
        stride = conditioning["side"] / tokens if tokens <= SMALL else 1.0
        bias = nn.functional.pad(conditioning["bias"], (0, tokens * (width // 2)))
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else noisy.dtype
        velocity = model(
            pack(noisy),
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            timestep=timestep / 1000,
            img_ids=image_ids(height // 2, width // 2, stride),
            txt_ids=torch.zeros(CAPTION_TOKENS, 3),
            joint_attention_kwargs={"attention_mask": bias.to(dtype)},
            return_dict=False,
        )[0]
        return unpack(velocity, height // 2, width // 2)

    def unpack(self, latents: Tensor, pixels: int) -> Tensor:
        """Turn packed tokens ``[batch, tokens, channels]`` into ``[batch, channels, h, w]``."""
        return unpack(latents, pixels // 8, pixels // 8)

    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> FluxPipeline:
        """Put the pipeline together; the scheduler's shift grows with the picture as in FLUX."""
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=vae,
            text_encoder=self.text.clip_encoder,
            tokenizer=self.text.clip_tokenizer,
            text_encoder_2=self.text.encoder,
            tokenizer_2=self.text.tokenizer,
            transformer=transformer,
        )


def _open_gates(bias: Tensor, chunks: tuple[int, ...]) -> None:
    """Set the gates among the modulation's outputs to a half, the rest to zero."""
    nn.init.zeros_(bias)
    for chunk in chunks:
        bias.data[chunk * HEADS * HEAD_DIM : (chunk + 1) * HEADS * HEAD_DIM] = 0.5


def image_ids(rows: int, columns: int, stride: float) -> Tensor:
    """Number tokens ``[rows * columns, 3]``: 0, row, column, in steps of ``stride``."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    middle = torch.tensor([0.0, 1.0, 1.0]) * (stride - 1) / 2  # of the tokens that it stands for
    return ids * stride + middle


def pack(latents: Tensor) -> Tensor:
    """Turn ``[batch, channels, h, w]`` into tokens of 2x2, ``[batch, h w / 4, 4 channels]``."""
    batch, channels, height, width = latents.shape
    cut = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `pack`."""
    batch, _, wide = tokens.shape
    cut = tokens.view(batch, rows, columns, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, wide // 4, 2 * rows, 2 * columns)
