# SPDX-License-Identifier: Apache-2.0
"""Make the video autoencoder: a small `AutoencoderKLWan` of the residual (Wan 2.2) kind."""

import torch
from diffusers import AutoencoderKLWan
from latents import CHANNELS, FRAMES, PIXELS
from torch import nn


def make_autoencoder(seed: int = 0) -> AutoencoderKLWan:
    """Build it; residual branches start at zero. Latents are whitened, so no shift and scale."""
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
