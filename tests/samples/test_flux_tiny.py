# SPDX-License-Identifier: Apache-2.0
"""The small FLUX model loads, is small, has the promised size and takes sparse attention."""

import random

import pytest
import torch
from diffusers import FluxPipeline

from tests.samples.built import assert_small, same_draw

FAMILY = "flux"
PROMPT = "a red circle left of a blue square"


def generate(pipeline, **changes):
    settings = {
        "height": 128,
        "width": 128,
        "num_inference_steps": 2,
        "true_cfg_scale": 4.0,
        "negative_prompt": "",
        "max_sequence_length": 64,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline(PROMPT, **(settings | changes)).images


def test_the_folder_is_a_plain_flux_pipeline(pipeline):
    assert type(pipeline) is FluxPipeline
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.scheduler.config.use_dynamic_shifting


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert_small(folder, weights=4)


def test_the_transformer_has_two_dual_and_four_single_layers(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_single_layers) == (2, 4)
    assert (config.num_attention_heads, config.attention_head_dim) == (4, 48)


def test_the_native_size_gives_2304_image_tokens_and_512_of_text(pipeline):
    seen = []
    layer = pipeline.transformer.single_transformer_blocks[0].attn
    handle = layer.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["hidden_states"].shape),
        with_kwargs=True,
    )
    generate(
        pipeline,
        height=384,
        width=384,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        max_sequence_length=512,
        output_type="latent",
    )
    handle.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(1, 2304 + 512)]


@same_draw
def test_the_shipped_text_encoders_are_the_ones_that_training_used(pipeline):
    from picture_text import PictureText

    text = PictureText()
    words, pooled, _ = pipeline.encode_prompt(PROMPT)
    mine, mask = text([PROMPT], masked=False)
    known = int(mask.sum())
    assert known == len(PROMPT.split()) + 1
    torch.testing.assert_close(words[:, : mine.shape[1]], mine)
    torch.testing.assert_close(pooled, text.pooled([PROMPT]))


def test_a_word_knows_its_neighbours():
    from picture_text import PictureText

    text = PictureText()
    one, two = (
        text([prompt], masked=False)[0][0]
        for prompt in ("a red circle and a blue square", "a blue circle and a red square")
    )
    assert not torch.allclose(one[2], two[2], atol=0.1)  # circle
    assert not torch.allclose(one[6], two[6], atol=0.1)  # square


@same_draw
@pytest.mark.parametrize("padded_to", [64, 512])
def test_collapsed_padding_is_what_the_pipeline_computes(pipeline, padded_to, monkeypatch):
    from families import flux
    from families.flux import Flux, unpack

    monkeypatch.setattr(flux, "PADDED_LENGTHS", (padded_to,))
    family = Flux()
    latents, level = torch.randn(1, 8, 32, 32), torch.tensor([0.7])
    text, pooled, text_ids = pipeline.encode_prompt(PROMPT, max_sequence_length=padded_to)
    assert text.shape[1] == padded_to
    conditioning = family.conditioning([PROMPT], random.Random(0)) | {"side": 16}
    assert conditioning["text"].shape[1] < padded_to
    with torch.no_grad():
        wanted = pipeline.transformer(
            pipeline._pack_latents(latents, 1, 8, 32, 32),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=level,
            img_ids=pipeline._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32),
            txt_ids=text_ids,
        ).sample
        result = family.forward(pipeline.transformer, latents, level * 1000, conditioning)
    torch.testing.assert_close(result, unpack(wanted, 16, 16), rtol=1e-4, atol=1e-4)


def test_packing_is_the_pipelines(pipeline):
    from families.flux import pack, unpack

    latents = torch.randn(2, 8, 12, 8)
    packed = pipeline._pack_latents(latents, 2, 8, 12, 8)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 4), latents)


def test_guidance_by_a_second_prompt_changes_the_picture(pipeline):
    guided, plain = generate(pipeline), generate(pipeline, true_cfg_scale=1.0)
    assert guided.shape == plain.shape == (1, 3, 128, 128)
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, plain, atol=0.02)
