# SPDX-License-Identifier: Apache-2.0
"""Define the latent space: whitened principal components of causal 4x8x8 patches.

A fixed linear map stands where a learned VAE latent space usually does. The transformer can then
train before the VAE exists, and the VAE only has to learn this map (encoder) and its inverse.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from data import clip
from safetensors.torch import load_file
from torch import Tensor

CHANNELS = 16
FRAMES = 4  # video frames per latent frame; the first latent frame holds one video frame
PIXELS = 8  # video pixels per latent pixel, both ways
FIT_CLIPS = 160
FIT_SEED = 100


def to_patches(video: Tensor) -> Tensor:
    """Cut ``[3, 4 k + 1, H, W]`` into ``[k + 1, H / 8, W / 8, 768]``; frame 0 is repeated."""
    video = torch.cat([video[:, :1].expand(-1, FRAMES - 1, -1, -1), video], dim=1)
    channels, frames, height, width = video.shape
    cut = video.reshape(
        channels, frames // FRAMES, FRAMES, height // PIXELS, PIXELS, width // PIXELS, PIXELS
    )
    return cut.permute(1, 3, 5, 0, 2, 4, 6).flatten(3)


def from_patches(patches: Tensor) -> Tensor:
    """Undo `to_patches`; the repeats of the first frame are dropped."""
    frames, height, width, _ = patches.shape
    cut = patches.view(frames, height, width, 3, FRAMES, PIXELS, PIXELS)
    video = cut.permute(3, 0, 4, 1, 5, 2, 6).reshape(
        3, frames * FRAMES, height * PIXELS, width * PIXELS
    )
    return video[:, FRAMES - 1 :]


@dataclass(frozen=True)
class LatentSpace:
    """The linear map; latents have mean 0 and standard deviation 1 per channel over the data."""

    mean: Tensor  # [768]
    components: Tensor  # [768, CHANNELS], orthonormal columns
    scale: Tensor  # [CHANNELS], standard deviation along each component

    @classmethod
    def fit(cls) -> "LatentSpace":
        """Fit on `FIT_CLIPS` rendered clips of 17 frames at 64 and at 128 pixels."""
        rows = []
        for index in range(FIT_CLIPS):
            video, _ = clip(index, 17, 128 if index % 4 == 0 else 64, seed=FIT_SEED)
            rows.append(to_patches(video).flatten(0, 2))
        data = torch.cat(rows)  # [patches, 768]
        mean = data.mean(dim=0)
        variances, vectors = torch.linalg.eigh((data - mean).T @ (data - mean) / len(data))
        order = variances.argsort(descending=True)[:CHANNELS]
        return cls(mean, vectors[:, order].clone(), variances[order].sqrt())

    @classmethod
    def load(cls, path: Path) -> "LatentSpace":
        """Read the map from ``path``, or fit it and write it there where the file is missing."""
        if path.suffix == ".safetensors":
            return cls(**load_file(path))
        if not path.exists():
            space = cls.fit()
            torch.save(vars(space), path)
        return cls(**torch.load(path))

    def encode(self, video: Tensor) -> Tensor:
        """Map a video ``[3, T, H, W]`` in [-1, 1] to latents ``[CHANNELS, t, h, w]``."""
        latents = (to_patches(video) - self.mean) @ (self.components / self.scale)
        return latents.permute(3, 0, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents ``[CHANNELS, t, h, w]`` to the nearest video ``[3, T, H, W]``, clamped."""
        patches = latents.permute(1, 2, 3, 0) @ (self.components * self.scale).T + self.mean
        return from_patches(patches).clamp(-1, 1)
