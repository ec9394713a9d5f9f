# SPDX-License-Identifier: Apache-2.0
"""DISTS with drawn weights against loops over channels in float64."""

import numpy as np
import pytest
import torch

from dit_sparse.quality import QualityInputError, compare, weights
from tests.quality.conftest import moving, noisy
from tests.quality.test_perceptual import NUMBERS, drawn

CHANNELS = [3, 64, 128, 256, 512, 512]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    vgg, state = drawn("vgg", folder)
    generator = torch.Generator().manual_seed(5)
    numbers = {name: torch.rand(1, 1475, 1, 1, generator=generator) for name in ("alpha", "beta")}
    torch.save(numbers, folder / "dists.pt")
    return {"vgg": vgg, "dists": folder / "dists.pt"}, state, numbers


def hann_pool(x):
    """Pool one channel of a frame, position by position."""
    padded = np.pad(x**2, 1)
    window = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    rows, columns = (x.shape[0] + 1) // 2, (x.shape[1] + 1) // 2
    return np.array([
        [(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * window).sum() ** 0.5
         for j in range(columns)]
        for i in range(rows)
    ])  # fmt: skip


@torch.no_grad()
def oracle(state, numbers, one, other):
    stages = []
    for frame in (one, other):
        pixels = torch.from_numpy(frame.transpose(2, 0, 1).astype(np.float64)) / 255
        kept = [pixels.numpy()]
        mean = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).double().view(3, 1, 1)
        x = ((pixels - mean) / std)[None]
        for i, number in enumerate(NUMBERS["vgg"]):
            weight = state[f"features.{number}.weight"].double()
            bias = state[f"features.{number}.bias"].double()
            x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
            if i in {1, 3, 6, 9, 12}:
                kept.append(x[0].numpy())
            if i in {1, 3, 6, 9}:
                x = torch.from_numpy(np.stack([hann_pool(c) for c in x[0].numpy()]))[None]
        stages.append(kept)
    alpha, beta = (numbers[name].double().flatten().numpy() for name in ("alpha", "beta"))
    total, similar, at = alpha.sum() + beta.sum(), 0.0, 0
    for left, right in zip(*stages, strict=True):
        for x, y in zip(left, right, strict=True):
            texture = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
            shared = ((x - x.mean()) * (y - y.mean())).mean()
            structure = (2 * shared + 1e-6) / (x.var() + y.var() + 1e-6)
            similar += (alpha[at] * texture + beta[at] * structure) / total
            at += 1
    assert at == sum(CHANNELS)
    return 1 - similar


def test_dists_equals_loops_over_channels(files):
    paths, state, numbers = files
    one, other = moving(1, 16, 19), noisy(moving(1, 16, 19), 25)
    row = compare(one, other, metrics=["dists"], weights=paths).rows["dists"]
    wanted = [oracle(state, numbers, a, b) for a, b in zip(one, other, strict=True)]
    assert row.per_frame == pytest.approx(wanted, abs=2e-5)
    assert min(wanted) > 0.005
    same = compare(one, one, metrics=["dists"], weights=paths).rows["dists"]
    assert same.value == pytest.approx(0, abs=1e-6)


def test_missing_and_wrong_numbers(files, monkeypatch, tmp_path):
    vgg = {"vgg": files[0]["vgg"]}
    real = weights._package_file
    names = {"torchmetrics", "DISTS_pytorch"}
    monkeypatch.setattr(
        weights, "_package_file", lambda name, path: None if name in names else real(name, path)
    )
    row = compare(moving(), moving(), metrics=["dists"], weights=vgg).rows["dists"]
    assert row.status == "skipped"
    assert "pip install --no-deps torchmetrics" in row.reason
    torch.save({"alpha": torch.ones(9), "beta": torch.ones(9)}, tmp_path / "x.pt")
    with pytest.raises(QualityInputError, match="have 9 and 9 numbers, expected 1475 each"):
        weights.find_dists(tmp_path / "x.pt")
    torch.save({"alpha": torch.ones(9)}, tmp_path / "y.pt")
    with pytest.raises(QualityInputError, match="contains no alpha and beta"):
        weights.find_dists(tmp_path / "y.pt")
