# SPDX-License-Identifier: Apache-2.0
"""MS-SSIM against pytorch-msssim and against scikit-image, scale by scale."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage import data
from skimage.metrics import structural_similarity

from dit_sparse.quality import ms_ssim, ssim
from dit_sparse.quality.structure import SCALES

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def noisy(frame, sigma, seed=0):
    random = np.random.default_rng(seed)
    return (frame + random.normal(0, sigma, frame.shape)).clip(0, 255).round().astype(np.uint8)


def oracle(one, other):
    """MS-SSIM from scikit-image's maps; the contrast term is SSIM of frames of equal means."""
    found = []
    for channel in range(3):
        x, y = one[..., channel].astype(float), other[..., channel].astype(float)
        product = 1.0
        for scale, exponent in enumerate(EXPONENTS):
            options = {
                "data_range": 255,
                "gaussian_weights": True,
                "sigma": 1.5,
                "use_sample_covariance": False,
                "full": True,
            }
            _, whole = structural_similarity(x, y, **options)
            inner = whole[5:-5, 5:-5]
            if scale < 4:

                def blur(image):
                    return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

                light = (2 * blur(x) * blur(y) + 6.5025) / (blur(x) ** 2 + blur(y) ** 2 + 6.5025)
                inner = inner / light
            product *= max(0, inner.mean()) ** exponent
            x, y = (uniform_filter(f, 2, origin=-1, mode="nearest")[::2, ::2] for f in (x, y))
        found.append(product)
    return np.mean(found)


@settings(max_examples=5)
@given(
    height=st.integers(161, 200),
    width=st.integers(161, 200),
    sigma=st.floats(1, 60),
    seed=st.integers(0, 99),
)
def test_ms_ssim_equals_scikit_image_scale_by_scale(height, width, sigma, seed):
    one = data.astronaut()[100 : 100 + height, 50 : 50 + width]
    other = noisy(one, sigma, seed)
    assert ms_ssim([one], [other]).value == pytest.approx(oracle(one, other), abs=1e-9)


@pytest.mark.parametrize("sigma", [2, 20, 90])
def test_both_equal_pytorch_msssim(sigma):
    package = pytest.importorskip("pytorch_msssim")
    one = data.astronaut()[:336, :176]  # multiples of 16: it pads odd sides with zeros
    other = noisy(one, sigma)
    batch = [torch.tensor(f.transpose(2, 0, 1)[None].astype(np.float64)) for f in (one, other)]
    for ours, theirs in ((ms_ssim, package.ms_ssim), (ssim, package.ssim)):
        wanted = float(theirs(*batch, data_range=255, size_average=True))
        assert ours([one], [other]).value == pytest.approx(
            wanted, abs=5e-6
        )  # its window is float32


def test_exponents_sum_to_one_and_small_frames_have_none():
    assert sum(SCALES) == pytest.approx(1, abs=1e-3)
    frame = np.zeros((1, 160, 300, 3), np.uint8)
    assert ms_ssim(frame, frame + 1).reason == (
        "frames of 300 x 160 are smaller than the window of 161 pixels"
    )


def test_opposite_structure_counts_as_zero_not_as_a_complex_number():
    one = noisy(np.full((170, 170, 3), 128, np.uint8), 60)
    assert ms_ssim([one], [255 - one]).value == 0
    assert ssim([one], [255 - one]).value < -0.5


def test_strips_do_not_show():
    # 64 rows are one product: sizes around it must agree with the plain definition.
    frame = data.astronaut()
    for rows in (74, 75, 138, 139):
        one = frame[:rows, :90]
        other = noisy(one, 15)
        wanted = structural_similarity(
            one,
            other,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            data_range=255,
        )
        assert ssim([one], [other]).value == pytest.approx(wanted, abs=1e-12)
