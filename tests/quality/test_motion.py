# SPDX-License-Identifier: Apache-2.0
"""What one PSNR cannot tell apart: temporal PSNR, motion, flicker, sharpness, colour."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from dit_sparse.quality import compare
from tests.quality.conftest import moving

NAMES = (
    "psnr",
    "psnr_temporal",
    "sharpness_ratio",
    "motion_ratio",
    "colour_shift",
    "vbench.temporal_flickering",
)


def rows(dense, sparse):
    return compare(dense, sparse, metrics=NAMES).rows


def wide(frames, height=40, width=48, seed=0):
    """Smooth moving pictures far from black and white, so that nothing is clipped."""
    random = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(random.normal(0, 1, (frames, height, width, 3)), (1, 3, 3, 0))
    return (128 + 300 * field).clip(40, 215).round().astype(np.uint8)


@given(
    frames=st.integers(2, 5),
    height=st.integers(3, 20),
    width=st.integers(3, 20),
    seed=st.integers(0, 99),
)
def test_all_equal_their_formulas_in_plain_floats(frames, height, width, seed):
    random = np.random.default_rng(seed)
    one, other = random.integers(0, 256, (2, frames, height, width, 3), dtype=np.uint8)
    found = rows(one, other)
    d, s = one.astype(float), other.astype(float)
    error = (np.diff(d, axis=0) - np.diff(s, axis=0)) ** 2
    wanted = [10 * math.log10(255**2 / each.mean()) for each in error]
    assert found["psnr_temporal"].per_frame == pytest.approx(wanted, rel=1e-12)
    change_d, change_s = (np.abs(np.diff(f, axis=0)).mean((1, 2, 3)) for f in (d, s))
    assert found["motion_ratio"].value == pytest.approx(change_s.sum() / change_d.sum())
    flicker = found["vbench.temporal_flickering"]
    assert flicker.dense == pytest.approx((255 - change_d.mean()) / 255, rel=1e-12)
    assert flicker.sparse == pytest.approx((255 - change_s.mean()) / 255, rel=1e-12)
    assert flicker.value == pytest.approx(flicker.sparse - flicker.dense)
    assert flicker.per_frame == pytest.approx((change_d - change_s) / 255)
    shift = np.abs((s - d).mean((0, 1, 2))).max()
    assert found["colour_shift"].value == pytest.approx(shift, rel=1e-9, abs=1e-9)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    sharp = []
    for clip in (d, s):
        luma = clip @ np.array([0.299, 0.587, 0.114])
        edges = [ndimage.convolve(f, kernel)[1:-1, 1:-1].var() for f in luma]
        sharp.append(sum(edges))
    if sharp[0] > 1:
        assert found["sharpness_ratio"].value == pytest.approx(sharp[1] / sharp[0], rel=1e-4)


def test_noise_flicker_and_an_offset_of_one_psnr_are_told_apart():
    clip = wide(12)
    random = np.random.default_rng(3)
    changed = {
        "noise": clip + random.normal(0, 6, clip.shape),
        "flicker": clip + 6 * (-1) ** np.arange(12)[:, None, None, None],
        "offset": clip.astype(float) + 6,
    }
    found = {
        name: rows(clip, other.clip(0, 255).round().astype(np.uint8))
        for name, other in changed.items()
    }
    psnr = [each["psnr"].value for each in found.values()]
    assert max(psnr) - min(psnr) < 0.2  # one number says they are alike
    temporal = {name: each["psnr_temporal"].value for name, each in found.items()}
    assert temporal["offset"] == 100
    assert temporal["flicker"] < temporal["noise"] - 2
    sharp = {name: each["sharpness_ratio"].value for name, each in found.items()}
    assert sharp["noise"] > 3
    assert sharp["flicker"] == pytest.approx(1, abs=0.01)
    colour = {name: each["colour_shift"].value for name, each in found.items()}
    assert colour["offset"] == pytest.approx(6)
    assert max(colour["noise"], colour["flicker"]) < 0.5


def test_a_frozen_clip_flickers_less_and_its_motion_is_gone():
    clip = wide(8)
    frozen = np.repeat(clip[::4], 4, 0)
    found = rows(clip, frozen)
    assert found["vbench.temporal_flickering"].value > 0  # which by itself would look like a gain
    assert found["motion_ratio"].value < 0.5
    assert found["motion_ratio"].worst == 0
    assert found["motion_ratio"].worst_frame == 1  # nothing moved from frame 0 to frame 1


def test_blur_lowers_sharpness():
    clip = moving(3)
    blurred = ndimage.gaussian_filter(clip.astype(float), (0, 1.5, 1.5, 0))
    assert rows(clip, blurred.round().astype(np.uint8))["sharpness_ratio"].value < 0.2


def test_still_and_flat_clips_have_no_ratio():
    flat = np.full((3, 8, 8, 3), 90, np.uint8)
    found = rows(flat, flat)
    assert found["motion_ratio"].reason == "nothing moves in the dense clip"
    assert found["sharpness_ratio"].reason == "nothing has edges in the dense clip"


def test_one_frame_has_no_motion():
    frame = wide(1)
    found = rows(frame, frame)
    for name in ("psnr_temporal", "motion_ratio", "vbench.temporal_flickering"):
        assert (
            found[name].as_dict()["status"]
            == "n/a: requires at least 2 frames, but the clips have 1"
        )
    assert found["psnr"].value == 100
