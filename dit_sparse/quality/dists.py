# SPDX-License-Identifier: Apache-2.0
"""DISTS: texture and structure of VGG16 features, forgiving where texture is only resampled.

Ding et al. 2020, "Image Quality Assessment: Unifying Structure and Texture Similarity",
arXiv:2004.07728.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own short name)

from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dit_sparse.quality.pairs import Frame
    from dit_sparse.quality.weights import Weights

DISTS = (
    "DISTS (Ding et al. 2020): 1 - weighted sum over the RGB input and five VGG16 layers (squares "
    "averaged instead of maxima) of texture and structure similarity, mean over frames"
)
CHANNELS = (3, 64, 128, 256, 512, 512)
SMALLEST = 16  # pixels on a side
_EPSILON = 1e-6
_POOL_BEFORE = {2, 4, 7, 10}  # convolutions that follow a pooling
_TAPS = {1, 3, 6, 9, 12}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dists(Meter):
    """DISTS, mean over frames.

    Args:
        weights: Of VGG16.
        alpha: Weights of texture ``[1475]``, fp32.
        beta: Weights of structure, likewise.
        source: Where alpha and beta come from.
        device: Where it runs.
    """

    costly = True

    def __init__(
        self, weights: Weights, alpha: Tensor, beta: Tensor, source: str, device: str = "cpu"
    ) -> None:
        self._device = device
        self._layers = [(w.to(device), b.to(device)) for w, b in weights.convolutions]
        total = alpha.double().sum() + beta.double().sum()
        self._alpha, self._beta = (
            (part.double() / total).cpu().split(CHANNELS) for part in (alpha, beta)
        )
        self._source = f"{weights.source}; {source}"
        self._values: list[float] = []

    @torch.inference_mode()
    def update(self, dense: Frame, sparse: Frame) -> None:
        """Measure a frame."""
        pair = torch.from_numpy(np.stack((dense, sparse))).to(self._device)
        similar = 0.0
        stages = self._features(pair.permute(0, 3, 1, 2).float() / 255)
        for feature, alpha, beta in zip(stages, self._alpha, self._beta, strict=True):
            x, y = feature[0].flatten(1), feature[1].flatten(1)  # [channels, positions]
            mean_x, mean_y = x.mean(1), y.mean(1)
            texture = (2 * mean_x * mean_y + _EPSILON) / (mean_x**2 + mean_y**2 + _EPSILON)
            # Centred first: mean(x y) - mean(x) mean(y) cancels, and a clip differs from itself.
            x, y = x - mean_x[:, None], y - mean_y[:, None]
            spread = (x * x).mean(1) + (y * y).mean(1)
            structure = (2 * (x * y).mean(1) + _EPSILON) / (spread + _EPSILON)
            similar += float(alpha @ texture.cpu().double() + beta @ structure.cpu().double())
        self._values.append(1 - similar)

    def finish(self) -> list[Scores]:
        """Give the row."""
        values = tuple(self._values)
        return [
            Scores("dists", DISTS, "", fmean(values), values, better="lower", source=self._source)
        ]

    def _features(self, pixels: Tensor) -> Iterator[Tensor]:
        yield pixels
        mean, std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (_MEAN, _STD))
        x = (pixels - mean) / std
        for i, (weight, bias) in enumerate(self._layers):
            if i in _POOL_BEFORE:
                x = pool(x)
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            if i in _TAPS:
                yield x


def pool(x: Tensor) -> Tensor:
    """Halve by the root of the mean square under a 3 x 3 Hann window, zeros beyond the border."""
    side = torch.tensor([0.5, 1.0, 0.5], device=x.device)
    window = side[:, None] * side / 4
    channels = x.shape[1]
    kernel = window.expand(channels, 1, 3, 3)
    return (F.conv2d(x * x, kernel, stride=2, padding=1, groups=channels) + 1e-12).sqrt()
