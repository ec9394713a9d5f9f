# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against scikit-image, against plain loops, and against numbers made by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_sparse.quality import psnr, psnr_pooled, ssim


def clip(frames=3, height=13, width=17, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def noisy(frames, sigma, seed=1):
    random = np.random.default_rng(seed)
    changed = frames + random.normal(0, sigma, frames.shape)
    return changed.clip(0, 255).round().astype(np.uint8)


def skimage_ssim(one, other):
    return structural_similarity(
        one,
        other,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        data_range=255,
    )


def plain_ssim(one, other):
    """Wang's formula, window by window, no separable filter and no broadcasting over positions."""
    offsets = range(-5, 6)
    kernel = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in offsets] for i in offsets])
    kernel /= kernel.sum()
    found = []
    for channel in range(3):
        for top in range(one.shape[0] - 10):
            for left in range(one.shape[1] - 10):
                x, y = (
                    f[top : top + 11, left : left + 11, channel].astype(float)
                    for f in (one, other)
                )
                mx, my = (kernel * x).sum(), (kernel * y).sum()
                vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
                cov = (kernel * (x - mx) * (y - my)).sum()
                top_part = (2 * mx * my + 6.5025) * (2 * cov + 58.5225)
                found.append(top_part / ((mx**2 + my**2 + 6.5025) * (vx + vy + 58.5225)))
    return np.mean(found)


@given(
    height=st.integers(11, 30),
    width=st.integers(11, 30),
    sigma=st.floats(0.3, 80),
    seed=st.integers(0, 99),
)
def test_both_equal_skimage(height, width, sigma, seed):
    one = clip(2, height, width, seed)
    other = noisy(one, sigma, seed)
    if (one == other).all((1, 2, 3)).any():
        return
    found = psnr(one, other), ssim(one, other)
    wanted_psnr = [peak_signal_noise_ratio(a, b) for a, b in zip(one, other, strict=True)]
    wanted_ssim = [skimage_ssim(a, b) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(found[0].per_frame, wanted_psnr, rtol=1e-12)
    np.testing.assert_allclose(found[1].per_frame, wanted_ssim, rtol=0, atol=1e-12)
    assert found[0].value == pytest.approx(np.mean(wanted_psnr))
    assert found[1].value == pytest.approx(np.mean(wanted_ssim))


def test_ssim_of_a_photograph_equals_skimage_and_plain_loops():
    one = data.astronaut()[100:120, 200:224]
    other = noisy(one, 12)
    assert ssim([one], [other]).value == pytest.approx(skimage_ssim(one, other), abs=1e-12)
    assert ssim([one], [other]).value == pytest.approx(plain_ssim(one, other), abs=1e-9)


def test_numbers_by_hand():
    black = np.zeros((2, 11, 11, 3), dtype=np.uint8)
    grey = black.copy()
    grey[0] += 51  # a fifth of 255: 10 log10(25) = 13.979 dB
    grey[1] += 255  # the whole range: 0 dB
    found = psnr(black, grey)
    assert found.per_frame == pytest.approx((20 * math.log10(5), 0.0))
    assert found.value == pytest.approx(10 * math.log10(5))
    assert (found.worst, found.worst_frame) == (pytest.approx(0.0), 1)
    pooled = 10 * math.log10(2 / (1 / 25 + 1))
    assert psnr_pooled(black, grey).value == pytest.approx(pooled)
    # Constant frames: only the luminance term is left, C1 / (mean^2 + C1).
    assert ssim(black, grey).per_frame == pytest.approx((6.5025 / (51**2 + 6.5025), 1e-4 / 1.0001))


def test_one_wrong_bit_is_seen_and_large_frames_stay_under_the_cap():
    one = np.full((1, 400, 400, 3), 255, dtype=np.uint8)
    other = one.copy()
    other[0, 3, 5, 1] = 254  # a uint8 subtraction the other way round would wrap to 255
    for pair in ((one, other), (other, one)):
        assert psnr(*pair).value == pytest.approx(10 * math.log10(255**2 * 480_000), abs=5)
        assert psnr(*pair).value == 100  # 104.9 dB, capped
        assert psnr(*pair).identical_frames == 0


def test_identical_frames_are_counted_and_capped():
    one = clip()
    other = one.copy()
    other[1] = noisy(one[1], 20)
    found = psnr(one, other)
    assert (found.per_frame[0], found.per_frame[2]) == (100, 100)
    assert (found.identical_frames, found.worst_frame) == (2, 1)
    same = ssim(one, one)
    assert (same.value, same.identical_frames) == (1.0, 3)
    assert psnr_pooled(one, one).value == 100


def test_iterators_are_enough():
    one, other = clip(), noisy(clip(), 9)
    assert psnr(iter(one), iter(other)) == psnr(one, other)


@pytest.mark.parametrize(
    ("reference", "test", "words"),
    [
        (clip(3), clip(2), "the test has 2 frames, the reference has more"),
        (clip(1), clip(4), "the reference has 1 frames, the test has more"),
        (clip(0), clip(0), "both clips are empty"),
        (clip(), clip(width=16), "17 x 13 in the reference, 16 x 13 in the test"),
        (clip() / 255, clip(), "frame 0 of the reference must be uint8"),
        (clip(), clip()[..., :1], "frame 0 of the test must be uint8 [height, width, 3]"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, psnr_pooled, ssim])
def test_clips_that_do_not_fit_are_refused(metric, reference, test, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("]", r"\]")):
        metric(reference, test)


def test_frames_below_the_window_have_no_ssim():
    found = ssim(clip(height=10), clip(height=10, seed=4))
    assert (found.value, found.worst, found.worst_frame) == (None, None, None)
    assert found.as_dict()["status"] == (
        "n/a: frames of 17 x 10 are smaller than the window of 11 pixels"
    )


def test_as_dict_has_the_definition_and_the_worst_frame():
    found = psnr(clip(), noisy(clip(), 9)).as_dict()
    assert found["worst"] == min(found["per_frame"])
    assert found["median"] == sorted(found["per_frame"])[1]
    assert "255^2" in found["definition"]
    assert (found["status"], found["unit"]) == ("ok", "dB")
