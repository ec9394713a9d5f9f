# SPDX-License-Identifier: Apache-2.0
"""Other repositories' variants, under their own names: only for a table beside theirs.

``svg.*`` is what Sparse VideoGen's ``svg/utils/metric.py`` computes: another SSIM (a plain
average window over zero padding) and LPIPS of inputs in [0, 1], where the network wants [-1, 1].
On one pair these read .759 for .699 and .362 for .424.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.pixels import PSNR_CAP, mse
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dit_sparse.quality.pairs import Frame

SIDE = 11
SVG_PSNR = "as Sparse VideoGen: 10 log10(1 / MSE) of each frame in [0, 1], mean over frames"
SVG_SSIM = (
    "as Sparse VideoGen: SSIM with a plain 11 x 11 average, zeros beyond the border (counted), "
    "inputs in [0, 1], mean over all positions, RGB and frames; reads higher than SSIM"
)
SVG_LPIPS = (
    "as Sparse VideoGen: LPIPS with VGG16 of inputs left in [0, 1], where LPIPS means [-1, 1]; "
    "reads lower than LPIPS"
)


class SvgPsnr(Meter):
    """Sparse VideoGen's PSNR."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Measure a frame."""
        error = mse(dense, sparse) / 255**2
        self._values.append(PSNR_CAP if error == 0 else -10 * float(np.log10(error)))

    def finish(self) -> list[Scores]:
        """Give the row."""
        values = tuple(self._values)
        return [Scores("svg.psnr", SVG_PSNR, "dB", fmean(values), values)]


class SvgSsim(Meter):
    """Sparse VideoGen's SSIM."""

    costly = True

    def __init__(self) -> None:
        self._values: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Measure a frame."""
        planes = ((dense[..., c] / 255, sparse[..., c] / 255) for c in range(3))
        self._values.append(fmean(_box_ssim(x, y) for x, y in planes))

    def finish(self) -> list[Scores]:
        """Give the row."""
        values = tuple(self._values)
        return [Scores("svg.ssim", SVG_SSIM, "", fmean(values), values)]


def _box_ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    mean_x, mean_y = _average(x), _average(y)
    variance_x = _average(x * x) - mean_x**2
    variance_y = _average(y * y) - mean_y**2
    covariance = _average(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    below = (mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2)
    return float((above / below).mean())


def _average(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ``[height, width]`` under the window, zeros beyond the border."""
    half = SIDE // 2
    padded = np.pad(plane, ((half + 1, half), (half + 1, half)))
    sums = padded.cumsum(0).cumsum(1)
    tall = sums[SIDE:] - sums[:-SIDE]
    box: NDArray[np.float64] = tall[:, SIDE:] - tall[:, :-SIDE]
    return box / SIDE**2
