# SPDX-License-Identifier: Apache-2.0
"""What the video families share: rendered clips, their latent space and the pieces of them."""

import random
from pathlib import Path

import torch
from data import caption, clip
from latents import LatentSpace
from torch import Tensor

from families.base import Family, Space

PIECES_SEED = 200
CROP = 64  # pixels; clips of 128 pixels are cut to this


class VideoFamily(Family):
    """A family that draws clips ``[3, frames, H, W]`` on latents 4x shorter and 8x smaller."""

    # Batch and frames, for 3 : 2 of the steps. torch 2.13 on a CPU with AMX gives NaN for some
    # bfloat16 3-D convolutions' weight gradients (24 and 32 channels at 64 pixels): a family
    # that changes these or its channels should watch its first steps.
    piece_sizes: tuple[tuple[int, int], ...] = ((2, 9), (4, 5))

    def space(self, path: Path) -> Space:
        """Read or fit the principal components of causal 4x8x8 patches."""
        return LatentSpace.load(path)

    def example(self, index: int, frames: int, pixels: int) -> tuple[Tensor, str]:
        """Render clip ``index``."""
        video, scene = clip(index, frames, pixels)
        return video, caption(index, scene)

    def pieces(self, step: int) -> Tensor:
        """Cut short pieces out of clips: ``[batch, 3, frames, CROP, CROP]``."""
        rng = random.Random(f"vae {step}")
        batch, frames = self.piece_sizes[0 if rng.random() < 0.6 else 1]
        videos = []
        for number in range(batch):
            pixels = rng.choice((64, 128))
            length = rng.choice((17, 33))
            video, _ = clip(step * 8 + number, length, pixels, held_out=None, seed=PIECES_SEED)
            start = rng.randrange(length - frames + 1)
            top, left = (rng.randrange(0, pixels - CROP + 1, 8) for _ in range(2))
            videos.append(video[:, start : start + frames, top : top + CROP, left : left + CROP])
        return torch.stack(videos)
