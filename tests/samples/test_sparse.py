# SPDX-License-Identifier: Apache-2.0
"""Every small model takes sparse attention: all blocks kept equal dense, dropped ones show."""

import pytest
import torch
from diffusers import DiffusionPipeline

import dit_sparse
from dit_sparse.cli.source import SampleDefaults, Settings
from tests.samples.built import SAMPLES

CLIP, PICTURE = Settings(64, 64, 9, 2), Settings(128, 128, num_inference_steps=2)
MODELS = {
    "cogvideox-tiny": CLIP,
    "flux-tiny": PICTURE,
    "hunyuan-video-tiny": CLIP,
    "pixart-tiny": PICTURE,
    "wan-tiny": CLIP,
}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    folder = SAMPLES / request.param
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = MODELS[request.param].over(SampleDefaults.read(folder))

    def generate(density=None):
        call = {**settings, "generator": torch.Generator().manual_seed(0)}
        if density is None:
            return pipe("a red circle", output_type="latent", return_dict=False, **call)[0], None
        with dit_sparse.sparse_attention(
            pipe, "pooled", density=density, block_size=64, strict=True
        ) as handle:
            found = pipe("a red circle", output_type="latent", return_dict=False, **call)[0]
            return found, handle.report()

    return generate, torch.as_tensor(generate()[0])


def test_the_table_has_every_model():
    assert {path.parent.name for path in SAMPLES.glob("*/model_index.json")} == {*MODELS}


def test_keeping_every_block_equals_dense(made):
    generate, dense = made
    kept, report = generate(density=1.0)
    assert report.density == 1.0
    assert not report.reasons
    torch.testing.assert_close(torch.as_tensor(kept), dense, rtol=1e-4, atol=1e-4)


def test_dropping_blocks_changes_what_is_made(made):
    generate, dense = made
    sparse, report = generate(density=0.3)
    assert report.density < 1.0
    assert torch.isfinite(torch.as_tensor(sparse)).all()
    assert not torch.allclose(torch.as_tensor(sparse), dense, rtol=1e-3, atol=1e-3)
