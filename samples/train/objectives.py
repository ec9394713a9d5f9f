# SPDX-License-Identifier: Apache-2.0
"""What a transformer learns to predict: noise a latent at a level, and give the target.

All objectives draw their levels on one scale, sigma in (0, 1), noise over noise plus signal, so
``--sigma-mean`` means the same for all of them.
"""

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

SIGMA_DEVIATION = 1.2
LAST_SHARE = 0.06  # of the clips that a diffusion objective noises fully


class Noised(NamedTuple):
    """A batch at its noise levels."""

    noisy: Tensor  # shaped like the latents
    timestep: Tensor  # [batch], what the transformer is told
    target: Tensor  # shaped like the latents


class Objective(Protocol):
    """Noises latents; ``sigma [batch]`` is the level on the common scale."""

    def __call__(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Noised:
        """Noise ``latents [batch, ...]``."""


def stratified_sigmas(
    batch: int, rng: random.Random, mean: float, deviation: float = SIGMA_DEVIATION
) -> Tensor:
    """Draw noise levels, sigmoid(normal), one per equal-mass stratum, in random order."""
    shift = rng.random()
    quantiles = [(i + shift) / batch for i in range(batch)]
    rng.shuffle(quantiles)
    normal = torch.special.ndtri(torch.tensor(quantiles).clamp(1e-3, 1 - 1e-3))
    return torch.sigmoid(mean + deviation * normal)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """View ``[batch]`` so that it multiplies ``[batch, ...]``."""
    return values.view(-1, *[1] * (like.ndim - 1))


class Flow:
    """Flow matching: (1 - sigma) x + sigma e, target e - x, timestep 1000 sigma."""

    def __call__(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Noised:
        """Noise ``latents``."""
        level = _column(sigma, latents)
        return Noised((1 - level) * latents + level * noise, sigma * 1000, noise - latents)


@dataclass(frozen=True)
class Diffusion:
    """Variance preserving: sqrt(a) x + sqrt(1 - a) e, with ``a`` from a scheduler's table.

    The timestep is the one whose signal-to-noise ratio is nearest to ((1 - sigma) / sigma)^2; a
    share of the clips takes the last one, where a sampler starts.
    """

    signal: Tensor  # [timesteps], a: the scheduler's alphas_cumprod
    prediction: Literal["v", "epsilon"]

    def __call__(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Noised:
        """Noise ``latents``; random numbers come from torch's generator."""
        wanted = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)  # a / (1 - a) = signal / noise
        timestep = (self.signal[None] - wanted[:, None]).abs().argmin(dim=1)
        last = torch.rand(len(sigma)) < LAST_SHARE
        timestep = torch.where(last, len(self.signal) - 1, timestep)
        a = _column(self.signal[timestep].to(latents), latents)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = (
            noise if self.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        )
        return Noised(noisy, timestep, target)
