# SPDX-License-Identifier: Apache-2.0
"""What the picture families share: rendered pictures, their latent space and one autoencoder."""

import math
import random
from pathlib import Path

import torch
from captions import caption
from diffusers import AutoencoderKL
from picture_latents import CHANNELS, PictureSpace
from render import picture
from scenes import World
from torch import Tensor, nn

from families.base import Family, Space

PIECES_SEED = 200
WIDTHS = (24, 48, 64)  # channels of the autoencoder's three levels, finest first


class PictureFamily(Family):
    """A family that draws pictures ``[3, H, W]`` on latents 4x smaller, in tokens of 8 pixels."""

    def space(self, path: Path) -> Space:
        """Read or fit the principal components of 4x4 patches."""
        return PictureSpace.load(path)

    def example(self, index: int, frames: int, pixels: int) -> tuple[Tensor, str]:
        """Render picture ``index``; ``frames`` must be 1."""
        if frames != 1:
            message = f"pictures have 1 frame, got {frames}; write the bucket as 1xPIXELSxBATCH"
            raise ValueError(message)
        image, world = picture(index, pixels)
        return image, caption(index, world)

    def pieces(self, step: int) -> Tensor:
        """Cut squares around outlines: 4 of 96 pixels, or 1 of 256: ``[batch, 3, side, side]``."""
        rng = random.Random(f"picture pieces {step}")
        batch, side = (4, 96) if rng.random() < 0.8 else (1, 256)
        pieces = []
        for number in range(batch):
            pixels = 384 if side == 256 else rng.choice((128, 256, 384))
            image, world = picture(step * 8 + number, pixels, held_out=None, seed=PIECES_SEED)
            top, left = (8 * (start // 8) for start in _corner(world, pixels, side, rng))
            pieces.append(image[:, top : top + side, left : left + side])
        return torch.stack(pieces)

    def make_autoencoder(self, seed: int = 0) -> AutoencoderKL:
        """Build a small one; residual branches start at zero. Latents need no shift and scale."""
        torch.manual_seed(seed)
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(WIDTHS),
            up_block_types=["UpDecoderBlock2D"] * len(WIDTHS),
            block_out_channels=list(WIDTHS),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=8,
            sample_size=384,
            scaling_factor=1.0,
            shift_factor=0.0,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        for name, param in model.named_parameters():
            if ".conv2." in name:
                nn.init.zeros_(param)
        return model


def _corner(world: World, pixels: int, side: int, rng: random.Random) -> tuple[int, int]:
    """Choose top and left of a square whose middle lies near some object's outline."""
    thing, angle = rng.choice(world.things), rng.uniform(0, 2 * math.pi)
    x = thing.centre[0] + thing.radius * math.cos(angle)
    y = thing.centre[1] + thing.radius * math.sin(angle)
    middle = [(1 + value) / 2 * pixels + rng.uniform(-0.3, 0.3) * side for value in (y, x)]
    top, left = (min(max(round(value - side / 2), 0), pixels - side) for value in middle)
    return top, left
