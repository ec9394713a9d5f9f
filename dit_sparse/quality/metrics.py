# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of one clip against another, frame by frame.

Frames are read as they come and never all held, so iterators of any length will do. All
arithmetic is float64. Papers' numbers are seldom comparable: each score carries its definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]  # [height, width, 3]

PSNR_CAP = 100.0  # dB; identical frames would be infinite, which JSON and a mean cannot hold
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

PSNR = (
    "10 log10(255^2 / MSE) of each RGB frame in float64, mean over frames; each frame capped at "
    "100 dB"
)
PSNR_POOLED = "10 log10(255^2 / mean of all frames' MSE) on RGB, capped at 100 dB"
SSIM = (
    "Wang et al. 2004: Gaussian window 11, sigma 1.5, valid positions only, population "
    "covariance, K1 0.01, K2 0.03, range 255; mean over positions and RGB, then over frames"
)


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric of a pair of clips; higher is better.

    Args:
        name: "psnr", "psnr_pooled" or "ssim".
        definition: The formula, in words.
        unit: "dB", or empty.
        value: The headline; None where the metric does not apply.
        per_frame: One number per frame; empty where the metric has none.
        identical_frames: Frames in which no pixel differs.
        reason: Why there is no value.
    """

    name: str
    definition: str
    unit: str
    value: float | None
    per_frame: tuple[float, ...] = ()
    identical_frames: int = 0
    reason: str | None = None

    @property
    def worst(self) -> float | None:
        """The lowest frame's number."""
        return min(self.per_frame, default=None)

    @property
    def worst_frame(self) -> int | None:
        """Index of the lowest frame, 0-based; the first of equals."""
        return self.per_frame.index(min(self.per_frame)) if self.per_frame else None

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for strict JSON: no NaN, no infinity."""
        return {
            "value": self.value,
            "unit": self.unit,
            "median": median(self.per_frame) if self.per_frame else None,
            "worst": self.worst,
            "worst_frame": self.worst_frame,
            "identical_frames": self.identical_frames,
            "status": "ok" if self.reason is None else f"n/a: {self.reason}",
            "definition": self.definition,
            "per_frame": list(self.per_frame),
        }


def psnr(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the peak signal-to-noise ratio: mean over frames.

    Args:
        reference: Frames ``[height, width, 3]`` uint8, RGB: a clip's array or any iterator.
        test: As many frames of the same size.
    """
    errors = [_mse(one, other) for one, other in _pairs(reference, test)]
    per_frame = tuple(map(_decibel, errors))
    return Scores("psnr", PSNR, "dB", fmean(per_frame), per_frame, errors.count(0.0))


def psnr_pooled(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the peak signal-to-noise ratio of all frames' pixels taken together; see ``psnr``."""
    errors = [_mse(one, other) for one, other in _pairs(reference, test)]
    value = _decibel(fmean(errors))
    return Scores("psnr_pooled", PSNR_POOLED, "dB", value, (), errors.count(0.0))


def ssim(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the structural similarity, in [-1, 1]: mean over frames.

    Equal to ``skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=255)``. Arguments as of ``psnr``;
    frames below 11 pixels on a side have no value.
    """
    per_frame, identical = [], 0
    for one, other in _pairs(reference, test):
        if min(one.shape[:2]) < WINDOW:
            height, width = one.shape[:2]
            reason = f"frames of {width} x {height} are smaller than the window of {WINDOW} pixels"
            return Scores("ssim", SSIM, "", None, reason=reason)
        same = np.array_equal(one, other)
        identical += same
        per_frame.append(1.0 if same else _ssim_frame(one, other))
    return Scores("ssim", SSIM, "", fmean(per_frame), tuple(per_frame), identical)


def _pairs(reference: Iterable[Frame], test: Iterable[Frame]) -> Iterator[tuple[Frame, Frame]]:
    """Walk both clips side by side; say which frame does not fit."""
    missing = object()
    left, right = iter(reference), iter(test)
    for number in _count():
        one: Any = next(left, missing)
        other: Any = next(right, missing)
        if one is missing and other is missing:
            if number == 0:
                raise ValueError("no frames to compare: both clips are empty")
            return
        if one is missing or other is missing:
            short, long = ("reference", "test") if one is missing else ("test", "reference")
            raise ValueError(f"the {short} has {number} frames, the {long} has more")
        for name, frame in (("reference", one), ("test", other)):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(
                    f"frame {number} of the {name} must be uint8 [height, width, 3], got "
                    f"{frame.dtype} {tuple(frame.shape)}"
                )
        if one.shape != other.shape or 0 in one.shape:
            raise ValueError(
                f"frame {number} is {one.shape[1]} x {one.shape[0]} in the reference, "
                f"{other.shape[1]} x {other.shape[0]} in the test; frames are never rescaled"
            )
        yield one, other


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _mse(one: Frame, other: Frame) -> float:
    difference = np.subtract(one, other, dtype=np.int32)
    return float(np.square(difference).sum(dtype=np.int64)) / difference.size


def _decibel(mse: float) -> float:
    return PSNR_CAP if mse == 0 else min(PSNR_CAP, 10 * math.log10(255**2 / mse))


def _ssim_frame(one: Frame, other: Frame) -> float:
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    below = (mean_x * mean_x + mean_y * mean_y + C1) * (variance_x + variance_y + C2)
    return float((above / below).mean())


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ``[height, width, 3]`` under the window, one axis after the other."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length = image.shape[axis] - WINDOW + 1
        image = sum(
            weight * (image[i : i + length] if axis == 0 else image[:, i : i + length])
            for i, weight in enumerate(weights)
        )
    return image
