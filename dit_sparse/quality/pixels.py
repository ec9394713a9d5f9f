# SPDX-License-Identifier: Apache-2.0
"""Signal-to-noise ratios of one clip against another: by frame, pooled, and of the motion.

All sums are exact integers, all other arithmetic is float64: a subtraction in uint8 wraps, which
has made published tools report 30 dB for 23.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dit_sparse.quality.pairs import Frame

PSNR_CAP = 100.0  # dB; identical frames would be infinite, which JSON and a mean cannot hold
PSNR = (
    "10 log10(255^2 / MSE) of each RGB frame in float64, mean over frames; each frame capped at "
    "100 dB"
)
PSNR_POOLED = "10 log10(255^2 / mean of all frames' MSE) on RGB, capped at 100 dB"
PSNR_TEMPORAL = (
    "PSNR of the change from frame to frame, D[t+1] - D[t] against S[t+1] - S[t], RGB, peak 255, "
    "mean over transitions, each capped at 100 dB: a constant offset does not lower it, flicker "
    "does"
)


class Psnr(Meter):
    """PSNR: mean over frames, and of all frames' pixels taken together."""

    def __init__(self) -> None:
        self._errors: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Add a frame's error."""
        self._errors.append(mse(dense, sparse))

    def finish(self) -> list[Scores]:
        """Give both rows."""
        per_frame = tuple(map(decibel, self._errors))
        same = self._errors.count(0.0)
        pooled = decibel(fmean(self._errors))
        return [
            Scores("psnr", PSNR, "dB", fmean(per_frame), per_frame, same),
            Scores("psnr_pooled", PSNR_POOLED, "dB", pooled, (), same),
        ]


class TemporalPsnr(Meter):
    """PSNR of the frame-to-frame changes."""

    def __init__(self) -> None:
        self._before: NDArray[np.int16] | None = None
        self._errors: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Compare the change since the last frame."""
        gap = np.subtract(dense, sparse, dtype=np.int16)
        if self._before is not None:  # (D' - S') - (D - S) = (D' - D) - (S' - S)
            self._errors.append(_mean_square(gap - self._before))
        self._before = gap

    def finish(self) -> list[Scores]:
        """Give the row."""
        per_frame = tuple(map(decibel, self._errors))
        name = "psnr_temporal"
        return [Scores(name, PSNR_TEMPORAL, "dB", fmean(per_frame), per_frame, first=1)]


def mse(one: Frame, other: Frame) -> float:
    """Average the squared difference; the sum is exact."""
    return _mean_square(np.subtract(one, other, dtype=np.int16))


def decibel(error: float) -> float:
    """Turn a mean squared error of 8-bit levels into dB, capped."""
    return PSNR_CAP if error == 0 else min(PSNR_CAP, 10 * math.log10(255**2 / error))


def _mean_square(gap: NDArray[np.int16]) -> float:
    flat = gap.reshape(-1).astype(np.float64)
    return float(flat @ flat) / gap.size  # whole numbers far below 2^53: exact in any order
