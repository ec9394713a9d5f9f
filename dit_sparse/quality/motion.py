# SPDX-License-Identifier: Apache-2.0
"""What each clip is like by itself, set against the other: motion, flicker, sharpness, colour.

These tell apart what one PSNR cannot: noise, flicker, a colour cast, blur, a frozen picture.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dit_sparse.quality.pairs import Frame

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RATIO_CAP = 100.0  # where the dense clip has none of it, a ratio would be infinite

SHARPNESS = (
    "variance of the 4-neighbour Laplacian of luma (BT.601), valid positions: sum over the sparse "
    "frames / sum over the dense ones; 1 is best, below it is blur, above it noise or ringing"
)
MOTION = (
    "mean absolute difference of neighbouring frames, RGB: sparse / dense; 1 is best, below it "
    "the picture freezes"
)
COLOUR = "largest over R, G, B of |mean(sparse - dense)|, levels of 255, over all frames"
FLICKER = (
    "VBench temporal_flickering (Huang et al. 2024), the official formula: (255 - mean over "
    "transitions of the mean absolute RGB difference) / 255; sparse less dense. It rewards "
    "stillness: read it beside sharpness_ratio and motion_ratio; VBench means it for clips that "
    "its static filter keeps"
)


class Sharpness(Meter):
    """Sharpness of the sparse clip over that of the dense one."""

    def __init__(self) -> None:
        self._dense: list[float] = []
        self._sparse: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Add a frame of each."""
        self._dense.append(laplacian_variance(dense))
        self._sparse.append(laplacian_variance(sparse))

    def finish(self) -> list[Scores]:
        """Give the row, or say that nothing was to be seen."""
        return [_ratios("sharpness_ratio", SHARPNESS, self._dense, self._sparse)]


class Transitions(Meter):
    """Motion and flicker, both of the mean absolute difference of neighbouring frames."""

    def __init__(self) -> None:
        self._before: tuple[Frame, Frame] | None = None
        self._dense: list[float] = []
        self._sparse: list[float] = []

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Compare with the frame before."""
        if self._before is not None:
            self._dense.append(mean_absolute(dense, self._before[0]))
            self._sparse.append(mean_absolute(sparse, self._before[1]))
        self._before = (dense, sparse)

    def finish(self) -> list[Scores]:
        """Give both rows."""
        dense, sparse = ((255 - fmean(d)) / 255 for d in (self._dense, self._sparse))
        both = zip(self._dense, self._sparse, strict=True)
        flicker = Scores(
            "vbench.temporal_flickering",
            FLICKER,
            "",
            sparse - dense,
            tuple((d - s) / 255 for d, s in both),
            better="zero",
            dense=dense,
            sparse=sparse,
            first=1,
        )
        return [_ratios("motion_ratio", MOTION, self._dense, self._sparse, first=1), flicker]


class Colour(Meter):
    """How far the mean colour moved."""

    def __init__(self) -> None:
        self._shifts: list[NDArray[np.float64]] = []  # [3] each

    def update(self, dense: Frame, sparse: Frame) -> None:
        """Add a frame."""
        count = dense.shape[0] * dense.shape[1]
        sums = [f.sum((0, 1), dtype=np.int64) for f in (sparse, dense)]
        self._shifts.append((sums[0] - sums[1]) / count)

    def finish(self) -> list[Scores]:
        """Give the row."""
        value = float(np.abs(np.mean(self._shifts, 0)).max())
        per_frame = tuple(float(np.abs(shift).max()) for shift in self._shifts)
        return [Scores("colour_shift", COLOUR, "levels", value, per_frame, better="zero")]


def laplacian_variance(frame: Frame) -> float:
    """Give the variance of luma's Laplacian, 0 where a side is below 3 pixels."""
    luma = frame @ np.array(LUMA, dtype=np.float32)  # [height, width]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    inner = around - 4 * luma[1:-1, 1:-1]
    return float(inner.var(dtype=np.float64)) if inner.size else 0.0


def mean_absolute(one: Frame, other: Frame) -> float:
    """Average the absolute difference of two frames; the sum is exact."""
    gap = np.maximum(one, other) - np.minimum(one, other)
    return int(gap.sum(dtype=np.int64)) / gap.size


def _ratios(
    name: str, definition: str, dense: list[float], sparse: list[float], first: int = 0
) -> Scores:
    if sum(dense) < 1e-6:  # rounding of float32 luma leaves less than that per frame
        what = "moves" if name.startswith("motion") else "has edges"
        reason = f"nothing {what} in the dense clip"
        return Scores(name, definition, "", None, reason=reason, better="one")
    per_frame = tuple(_ratio(d, s) for d, s in zip(dense, sparse, strict=True))
    value = min(RATIO_CAP, sum(sparse) / sum(dense))
    return Scores(name, definition, "", value, per_frame, better="one", first=first)


def _ratio(dense: float, sparse: float) -> float:
    if dense < 1e-6:
        return 1.0 if sparse < 1e-6 else RATIO_CAP
    return min(RATIO_CAP, sparse / dense)
