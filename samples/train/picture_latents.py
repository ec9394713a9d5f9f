# SPDX-License-Identifier: Apache-2.0
"""Define the pictures' latent space: principal components of 4x4 patches, evened out by half.

``latents.py`` does the same for clips. FLUX and PixArt share this space and one autoencoder. The
first three components are a patch's colour, the others an edge that runs through it. Edges follow
from the colours around them, so they get less weight than whitening would give: a channel's
deviation falls with the square root of the component's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from families.base import Space
from render import picture
from torch import Tensor

CHANNELS = 8
PIXELS = 4  # pixels per latent pixel, both ways
GREATEST_DEVIATION = 1.6  # of the first channel
FIT_PICTURES = 300
FIT_SEED = 100


def to_patches(image: Tensor) -> Tensor:
    """Cut ``[3, H, W]`` into ``[H / 4, W / 4, 48]``."""
    channels, height, width = image.shape
    cut = image.reshape(channels, height // PIXELS, PIXELS, width // PIXELS, PIXELS)
    return cut.permute(1, 3, 0, 2, 4).flatten(2)


def from_patches(patches: Tensor) -> Tensor:
    """Undo `to_patches`."""
    height, width, _ = patches.shape
    cut = patches.view(height, width, 3, PIXELS, PIXELS).permute(2, 0, 3, 1, 4)
    return cut.reshape(3, height * PIXELS, width * PIXELS)


@dataclass(frozen=True)
class PictureSpace(Space):
    """The linear map; over the data latents have mean 0 and, together, a variance near 1."""

    mean: Tensor  # [48]
    components: Tensor  # [48, CHANNELS], orthonormal columns
    scale: Tensor  # [CHANNELS], what each component is divided by

    @classmethod
    def fit(cls, channels: int = CHANNELS) -> "PictureSpace":
        """Fit on `FIT_PICTURES` rendered pictures of 128 and of 384 pixels."""
        sizes = [384 if index % 4 == 0 else 128 for index in range(FIT_PICTURES)]
        rows = [
            to_patches(picture(index, pixels, held_out=None, seed=FIT_SEED)[0]).flatten(0, 1)
            for index, pixels in enumerate(sizes)
        ]
        data = torch.cat(rows)  # [patches, 48]
        mean = data.mean(dim=0)
        variances, vectors = torch.linalg.eigh((data - mean).T @ (data - mean) / len(data))
        order = variances.argsort(descending=True)[:channels]
        deviation = variances[order].sqrt()
        scale = (deviation * deviation[0]).sqrt() / GREATEST_DEVIATION
        return cls(mean, vectors[:, order].clone(), scale)

    @classmethod
    def load(cls, path: Path) -> "PictureSpace":
        """Read the map from ``path``, or fit it and write it there where the file is missing."""
        if not path.exists():
            space = cls.fit()
            torch.save(vars(space), path)
        return cls(**torch.load(path))

    def encode(self, image: Tensor) -> Tensor:
        """Map a picture ``[3, H, W]`` in [-1, 1] to latents ``[CHANNELS, h, w]``."""
        latents = (to_patches(image) - self.mean) @ (self.components / self.scale)
        return latents.permute(2, 0, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents ``[CHANNELS, h, w]`` to the nearest picture ``[3, H, W]``, clamped."""
        patches = latents.permute(1, 2, 0) @ (self.components * self.scale).T + self.mean
        return from_patches(patches).clamp(-1, 1)
