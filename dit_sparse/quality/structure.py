# SPDX-License-Identifier: Apache-2.0
"""SSIM and MS-SSIM: how far local structure of two frames agrees.

Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", and
Wang et al. 2003, "Multiscale structural similarity for image quality assessment".

The window is separable. Each pass over an axis is a product with a banded matrix, in strips that
fit a processor's cache: several times faster than eleven shifted sums, and the memory is one
strip's, not one frame's.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dit_sparse.quality.pairs import Frame

    Plane = NDArray[np.float64]  # [height, width]

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
STRIP = 64  # outputs of one matrix product
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table in section 3.2
MS_SIDE = (WINDOW - 1) * 2 ** (len(SCALES) - 1) + 1  # 161: the window fits the smallest scale

SSIM = (
    "Wang et al. 2004: Gaussian window 11, sigma 1.5, valid positions only, population "
    "covariance, K1 0.01, K2 0.03, range 255; mean over positions and RGB, then over frames"
)
MS_SSIM = (
    "Wang et al. 2003: five scales (2 x 2 means, an odd last row or column counts twice) of the "
    "SSIM window, negative terms 0, exponents .0448 .2856 .3001 .2363 .1333; mean over RGB, then "
    "over frames"
)


class Structure(Meter):
    """SSIM, and MS-SSIM where it is wanted, mean over frames.

    Frames below 11 (161) pixels on a side have none.
    """

    costly = True

    def __init__(self, *, scales: bool = True) -> None:
        self._scales = scales
        self._ssim: list[float] = []
        self._ms_ssim: list[float] = []
        self._same = 0
        self._size = (0, 0)

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Measure a frame."""
        height, width = self._size = dense.shape[:2]
        side = min(height, width)
        if side < WINDOW:
            return
        many = self._scales and side >= MS_SIDE
        if np.array_equal(dense, sparse):
            self._same += 1
            full, product = 1.0, 1.0
        else:
            planes = [_plane(dense[..., c], sparse[..., c], scales=many) for c in range(3)]
            full, product = (fmean(values) for values in zip(*planes, strict=True))
        self._ssim.append(full)
        if many:
            self._ms_ssim.append(product)

    def finish(self) -> list[Scores]:
        """Give the rows, those that were wanted."""
        rows = [self._row("ssim", SSIM, self._ssim, WINDOW, self._same)]
        if self._scales:
            rows.append(self._row("ms_ssim", MS_SSIM, self._ms_ssim, MS_SIDE, self._same))
        return rows

    def _row(self, name: str, text: str, values: list[float], side: int, same: int) -> Scores:
        if not values:
            height, width = self._size
            reason = f"frames of {width} x {height} are smaller than the window of {side} pixels"
            return Scores(name, text, "", None, reason=reason)
        return Scores(name, text, "", fmean(values), tuple(values), same)


def _plane(
    one: NDArray[np.uint8], other: NDArray[np.uint8], *, scales: bool
) -> tuple[float, float]:
    """Give a channel's SSIM and MS-SSIM (1 where it is not wanted)."""
    x, y = one.astype(float), other.astype(float)
    full, contrast = _terms(x, y)
    first = full
    product = 1.0
    for scale, exponent in enumerate(SCALES if scales else ()):
        if scale:
            x, y = _halve(x), _halve(y)
            full, contrast = _terms(x, y)
        last = scale == len(SCALES) - 1
        product *= max(0.0, full if last else contrast) ** exponent
    return first, product


def _halve(plane: Plane) -> Plane:
    """Average 2 x 2; an odd last row or column counts twice, as in the authors' own code."""
    height, width = plane.shape
    even = np.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge")
    halved: Plane = even.reshape((height + 1) // 2, 2, (width + 1) // 2, 2).mean((1, 3))
    return halved


def _terms(x: Plane, y: Plane) -> tuple[float, float]:
    """Give the means over positions of SSIM and of its contrast-structure term."""
    height, width = x.shape
    rows = height - WINDOW + 1
    full = contrast = 0.0
    for top in range(0, rows, STRIP):
        below = min(top + STRIP, rows) + WINDOW - 1
        a, b = x[top:below], y[top:below]
        mean_a, mean_b, square_a, square_b, cross = _blur(np.stack((a, b, a * a, b * b, a * b)))
        means = mean_a * mean_b
        squares = mean_a * mean_a + mean_b * mean_b
        structure = (2 * (cross - means) + C2) / (square_a + square_b - squares + C2)
        contrast += float(structure.sum())
        full += float((structure * (2 * means + C1) / (squares + C1)).sum())
    positions = rows * (width - WINDOW + 1)
    return full / positions, contrast / positions


def _blur(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ``[maps, rows, width]`` under the window; valid positions only."""
    down = np.matmul(_band(maps.shape[1] - WINDOW + 1), maps)  # [maps, rows - 10, width]
    count, rows, width = down.shape
    flat = down.reshape(count * rows, width)
    out = np.empty((count * rows, width - WINDOW + 1))
    for left in range(0, out.shape[1], STRIP):
        right = min(left + STRIP, out.shape[1])
        out[:, left:right] = flat[:, left : right + WINDOW - 1] @ _band(right - left).T
    return out.reshape(count, rows, -1)


@cache
def _band(outputs: int) -> NDArray[np.float64]:
    """Make the matrix that averages ``outputs + 10`` neighbours into ``outputs`` positions."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    band = np.zeros((outputs, outputs + WINDOW - 1))
    for i in range(outputs):
        band[i, i : i + WINDOW] = weights / weights.sum()
    return band
