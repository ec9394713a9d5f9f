# SPDX-License-Identifier: Apache-2.0
"""What stands in the transformer's place while prompts and clips are encoded."""

import pytest
import torch

from dit_sparse.distill.source import without_weights
from tests.distill import setup


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "flux", "pixart_sigma"])
def test_what_is_recorded_needs_no_weights(tmp_path, name):
    """Prompts and grid are those that the whole model would have been told."""
    pipe, args = setup.pipeline(name)
    whole = setup.conditions(pipe, args, tmp_path / "whole")
    model = pipe.transformer
    pipe.transformer = without_weights(model, torch.device("cpu"))
    assert sum(p.numel() for p in pipe.transformer.parameters()) == 0
    assert (pipe.transformer.dtype, pipe.transformer.device) == (model.dtype, model.device)
    bare = setup.conditions(pipe, args, tmp_path / "bare")
    assert torch.equal(bare.grid.told, whole.grid.told)
    assert bare.first.latents == whole.first.latents
    assert bare.first.shared.keys() == whole.first.shared.keys()
    for index in range(len(whole.files)):
        one, other = whole.load([index]), bare.load([index])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
