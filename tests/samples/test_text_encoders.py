# SPDX-License-Identifier: Apache-2.0
"""Every version of transformers that pyproject.toml allows loads the samples' text encoders."""

import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.samples.built import SAMPLES

ENCODERS = sorted(path.parent for path in SAMPLES.glob("*-tiny/text_encoder*/config.json"))


@pytest.mark.parametrize("folder", ENCODERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_weight_is_missing(folder):
    """transformers draws random ones for those that it does not find, and goes on."""
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    load = getattr(transformers, name).from_pretrained
    _, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    if name == "CLIPTextModel":  # before 5.6 it knows these names alone
        assert all(
            key.startswith("text_model.") for key in load_file(folder / "model.safetensors")
        )


def test_a_pipeline_is_built_with_names_that_older_versions_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SAMPLES / "train"), *sys.path])
    from build_pipeline import restore_names

    folder = SAMPLES / "flux-tiny" / "text_encoder"
    shipped = load_file(folder / "model.safetensors")
    transformers.CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path)
    for _ in range(2):
        restore_names(tmp_path / "model.safetensors")
        again = load_file(tmp_path / "model.safetensors")
        assert again.keys() == shipped.keys()
        assert all(torch.equal(again[key], shipped[key]) for key in shipped)
