# SPDX-License-Identifier: Apache-2.0
"""LPIPS: how far the features of a trained image network lie apart.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv:1801.03924, weights v0.1. Written in plain torch, so that torchvision is not needed.
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

SMALLEST = {"alex": 31, "vgg": 16}  # pixels on a side: below, a pooling layer has no output
PIXELS = 1_200_000  # frames of so many pixels together go through the network at once
CHANNELS = 16  # of a feature, compared at once
LPIPS = (
    "LPIPS v0.1 (Zhang et al. 2018), network {net}, RGB in [-1, 1], mean over positions and the "
    "five layers' sum, then mean over frames"
)
# What the network's input is moved and scaled by, for RGB in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_VGG_POOL_BEFORE = {2, 4, 7, 10}  # convolutions that follow a pooling
_VGG_TAPS = {1, 3, 6, 9, 12}


class Lpips(Meter):
    """LPIPS, mean over frames.

    Args:
        weights: Of the network.
        device: Where it runs.
        name: The row's.
        low: The least value of the network's input: -1 as LPIPS means it; 0 as some published
            tables have it.
        definition: The row's; None: LPIPS' own.
    """

    costly = True

    def __init__(
        self,
        weights: Weights,
        device: torch.device | str = "cpu",
        name: str | None = None,
        low: float = -1.0,
        definition: str | None = None,
    ) -> None:
        self.name = name or f"lpips_{weights.net}"
        self._definition = definition or LPIPS.format(net=weights.net)
        self._source, self._low = weights.source, low
        self._distance = Distance(weights).to(device).eval().requires_grad_(requires_grad=False)
        self._device = torch.device(device)
        self._waiting: list[tuple[Frame, Frame]] = []
        self._values: list[float] = []
        self._at_once: int | None = None

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Collect a pair; run the network when there are enough."""
        if self._at_once is None:
            self._at_once = max(1, PIXELS // (dense.shape[0] * dense.shape[1]))
        self._waiting.append((dense, sparse))
        if len(self._waiting) >= self._at_once:
            self._flush()

    def finish(self) -> list[Scores]:
        """Give the row."""
        self._flush()
        return [
            Scores(
                self.name,
                self._definition,
                "",
                fmean(self._values),
                tuple(self._values),
                better="lower",
                source=self._source,
            )
        ]

    @torch.inference_mode()
    def _flush(self) -> None:
        while self._waiting:
            now = self._waiting[: self._at_once]
            try:
                one, other = (self._input([pair[i] for pair in now]) for i in (0, 1))
                self._values += self._distance(one, other).tolist()
            except torch.OutOfMemoryError:
                if len(now) == 1:
                    raise
                self._at_once = len(now) // 2
                continue
            del self._waiting[: len(now)]

    def _input(self, frames: list[Frame]) -> Tensor:
        stacked = torch.from_numpy(np.stack(frames)).to(self._device)
        return stacked.permute(0, 3, 1, 2).float() / 255 * (1 - self._low) + self._low


class Distance(torch.nn.Module):
    """The weighted squared distance of normalised features, one number a pair."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._net = weights.net
        for i, (weight, bias) in enumerate(weights.convolutions):
            self.register_buffer(f"weight_{i}", weight)
            self.register_buffer(f"bias_{i}", bias)
        for i, tap in enumerate(weights.linear):
            self.register_buffer(f"tap_{i}", tap)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))
        self._count = len(weights.convolutions)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Compare ``[batch, 3, height, width]`` pairs; gives ``[batch]``."""
        both = (torch.cat((one, other)) - self.get_buffer("shift")) / self.get_buffer("scale")
        total = torch.zeros(len(one), device=one.device)
        for i, feature in enumerate(self._features(both)):  # [2 batch, channels, rows, columns]
            length = torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10
            sides = [part.split(CHANNELS, 1) for part in feature.chunk(2)]
            taps = self.get_buffer(f"tap_{i}").split(CHANNELS)
            norms = length.chunk(2)
            for left, right, tap in zip(*sides, taps, strict=True):  # few at a time: less memory
                gap = left / norms[0] - right / norms[1]
                total = total + gap.square_().mean((2, 3)) @ tap
        return total

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        for i in range(self._count):
            weight, bias = self.get_buffer(f"weight_{i}"), self.get_buffer(f"bias_{i}")
            if self._net == "alex":
                if i in {1, 2}:
                    x = F.max_pool2d(x, 3, 2)
                stride, padding = (4, 2) if i == 0 else (1, weight.shape[-1] // 2)
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
                yield x
            else:
                if i in _VGG_POOL_BEFORE:
                    x = F.max_pool2d(x, 2, 2)
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
                if i in _VGG_TAPS:
                    yield x
