# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of two clips at hand, one call each; ``compare`` measures everything at once.

Papers' numbers are seldom comparable: each row carries its definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_sparse.quality.pairs import pairs
from dit_sparse.quality.pixels import Psnr
from dit_sparse.quality.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dit_sparse.quality.pairs import Frame, Meter
    from dit_sparse.quality.scores import Scores


def psnr(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the peak signal-to-noise ratio: mean over frames.

    Args:
        reference: Frames ``[height, width, 3]`` uint8, RGB: a clip's array or any iterator.
        test: As many frames of the same size.
    """
    return _run(Psnr(), reference, test)[0]


def psnr_pooled(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the peak signal-to-noise ratio of all frames' pixels taken together; see ``psnr``."""
    return _run(Psnr(), reference, test)[1]


def ssim(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the structural similarity, in [-1, 1]: mean over frames.

    Equal to ``skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=255)``. Arguments as of ``psnr``;
    frames below 11 pixels on a side have no value.
    """
    return _run(Structure(scales=False), reference, test)[0]


def ms_ssim(reference: Iterable[Frame], test: Iterable[Frame]) -> Scores:
    """Give the multi-scale structural similarity, in [0, 1]; see ``ssim``.

    Frames below 161 pixels on a side have no value.
    """
    return _run(Structure(), reference, test)[1]


def _run(meter: Meter, reference: Iterable[Frame], test: Iterable[Frame]) -> list[Scores]:
    for one, other in pairs(reference, test):
        meter.update(one, other)
    return meter.finish()
