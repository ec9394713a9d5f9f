# SPDX-License-Identifier: Apache-2.0
"""Consistency of subject and background: the formula, and models from local folders."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.quality import QualityInputError, compare
from dit_sparse.quality.consistency import Chain, clip_frame, dino_frame, load_extractor
from tests.quality.conftest import moving, noisy


@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 999))
def test_the_formula_in_plain_loops(frames, channels, seed):
    features = np.random.default_rng(seed).normal(0, 1, (frames, channels))
    chain = Chain()
    for feature in features:
        chain.add(torch.from_numpy(feature))

    def cosine(a, b):
        return sum(a * b) / (sum(a * a) ** 0.5 * sum(b * b) ** 0.5)

    wanted = [
        (max(0, cosine(features[t], features[t - 1])) + max(0, cosine(features[t], features[0])))
        / 2
        for t in range(1, frames)
    ]
    assert chain.values == pytest.approx(wanted, abs=1e-12)


def test_a_still_clip_has_consistency_one_and_never_more():
    """The product of two rounded unit vectors passes 1 in every fourth draw or so."""
    for seed in range(40):
        feature = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, 37))
        chain = Chain()
        for scale in (1, 3, 0.7, -1):
            chain.add(feature * scale)
        assert max(chain.values) <= 1
        assert chain.values == pytest.approx([1, 1, 0], abs=1e-15)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    common = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    dino = transformers.ViTModel(transformers.ViTConfig(**common))
    with torch.no_grad():  # a table that differs from place to place, as a trained one does
        dino.embeddings.position_embeddings.normal_()
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**common, projection_dim=8)
    )
    made = {}
    for name, model in (("dino", dino), ("clip", clip)):
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def test_both_rows(folders):
    one, other = moving(4, 40, 70), noisy(moving(4, 40, 70), 40)
    found = compare(one, other, metrics=["psnr"], features=folders)
    assert list(found.rows) == ["psnr"]  # rows that were named are those that come
    rows = compare(
        one, other, metrics=["consistency.dino", "consistency.clip"], features=folders
    ).rows
    for name in ("dino", "clip"):
        row = rows[f"consistency.{name}"]
        assert 0 < row.dense <= 1
        assert row.value == pytest.approx(row.sparse - row.dense)
        assert row.value != 0
        assert len(row.per_frame) == 3
        assert str(folders[name]) in row.source
        extract = load_extractor(name, folders[name])
        chain = Chain()
        for frame in one:
            chain.add(extract(torch.from_numpy(frame).permute(2, 0, 1)[None].float()))
        assert row.dense == pytest.approx(np.mean(chain.values))


def test_dino_at_224_is_the_plain_model_and_stretches_elsewhere(folders):
    model = transformers.ViTModel.from_pretrained(folders["dino"]).eval()
    extract = load_extractor("dino", folders["dino"])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    square = torch.rand(1, 3, 224, 224) * 255
    with torch.no_grad():
        wanted = model((square / 255 - mean) / std).last_hidden_state[0, 0]
        torch.testing.assert_close(extract(square), wanted)
        wide = torch.rand(1, 3, 224, 388) * 255
        plain = model((wide / 255 - mean) / std, interpolate_pos_encoding=True)
    gap = (extract(wide) - plain.last_hidden_state[0, 0]).abs().max()
    assert 1e-5 < gap < 0.5  # DINO's own factor differs a little from Transformers' size


def test_frames_are_prepared_as_the_official_evaluator_does():
    pixels = torch.rand(1, 3, 448, 777) * 255
    assert dino_frame(pixels).shape == (1, 3, 224, 388)
    assert clip_frame(pixels).shape == (1, 3, 224, 224)
    assert clip_frame(pixels).min() >= 0
    ramp = torch.arange(400.0).view(1, 1, 1, 400).expand(1, 3, 200, 400)
    middle = clip_frame(ramp.clamp(0, 255) * 0 + ramp / 400 * 255)
    assert middle.mean() == pytest.approx(127.2, abs=1)  # the centre is kept


def test_folders_that_are_no_models(folders, tmp_path):
    with pytest.raises(QualityInputError, match="cannot be loaded as ViTModel"):
        compare(moving(), moving(), metrics=["consistency.dino"], features={"dino": tmp_path})
    row = compare(moving(), moving(), metrics=["consistency.clip"]).rows["consistency.clip"]
    assert row.status == "skipped"
    assert "--features clip=FOLDER" in row.reason
