# SPDX-License-Identifier: Apache-2.0
"""The small PixArt model loads, is small, has the promised size and takes sparse attention."""

import random

import torch
from diffusers import PixArtSigmaPipeline

from tests.samples.built import assert_small, same_draw

FAMILY = "pixart"
PROMPT = "a red circle left of a blue square"


def generate(pipeline, **changes):
    settings = {
        "height": 128,
        "width": 128,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline(PROMPT, **(settings | changes)).images


def test_the_folder_is_a_plain_pixart_pipeline(pipeline):
    assert type(pipeline) is PixArtSigmaPipeline
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert_small(folder, weights=3)


def test_the_transformer_has_six_layers_of_four_heads(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_attention_heads) == (6, 4)
    assert (config.attention_head_dim, config.patch_size) == (48, 2)


def test_the_native_size_gives_2304_tokens(pipeline):
    seen = []
    layer = pipeline.transformer.transformer_blocks[0].attn1
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
    generate(pipeline, height=384, width=384, num_inference_steps=1, output_type="latent")
    handle.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(2, 2304)]  # with and without the prompt


def test_resolution_binning_takes_its_one_square_size(pipeline):
    seen = []
    layer = pipeline.transformer.transformer_blocks[0].attn1
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "use_resolution_binning": True}
    image = generate(pipeline, **settings, height=None, width=None)
    handle.remove()
    assert seen[0][1] == 4096  # generated at 512 pixels
    assert image.shape == (1, 3, 256, 256)  # and made smaller


@same_draw
def test_the_shipped_text_encoder_is_the_one_that_training_used(pipeline):
    from picture_text import PictureText

    mine, mask = PictureText(length=300)([PROMPT], masked=True)
    known = int(mask.sum())
    text, shipped_mask, *_ = pipeline.encode_prompt(PROMPT, clean_caption=False)
    assert known == int(shipped_mask.sum()) == len(PROMPT.split()) + 1
    torch.testing.assert_close(text[:, :known], mine[:, :known])


@same_draw
def test_training_computes_what_the_pipeline_computes(pipeline):
    from families.pixart import PixArt

    family = PixArt()
    latents, timestep = torch.randn(1, 8, 32, 32), torch.tensor([600])
    text, mask, *_ = pipeline.encode_prompt(PROMPT, clean_caption=False)
    with torch.no_grad():
        wanted = pipeline.transformer(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        conditioning = family.conditioning([PROMPT], random.Random(0))
        result = family.forward(pipeline.transformer, latents, timestep, conditioning)
    weight = family.objective.weight(timestep).item()
    torch.testing.assert_close(result / weight, wanted, rtol=1e-4, atol=1e-4)


def test_the_weighted_error_is_that_of_a_velocity():
    """v = e - x; with x_t = a x + b e a wrong e gives x = (x_t - b e) / a, so a wrong v."""
    from families.pixart import GREATEST_WEIGHT, PixArt

    objective = PixArt().objective
    latents, noise = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    noised = objective(latents, noise, torch.tensor([0.1, 0.3, 0.5, 0.7]))
    guess = noise + 0.01 * torch.randn_like(noise)
    for one in range(4):
        signal = objective.signal[noised.timestep[one]]
        a, b = signal.sqrt(), (1 - signal).sqrt()
        velocity = guess[one] - (noised.noisy[one] - b * guess[one]) / a
        wrong = (velocity - (noise[one] - latents[one])).square().mean()
        weight = objective.weight(noised.timestep)[one]
        ours = (weight * guess[one] - noised.target[one]).square().mean()
        if weight < GREATEST_WEIGHT:
            torch.testing.assert_close(ours, wrong, rtol=1e-3, atol=0)
        else:
            assert ours < wrong


def test_a_small_generation_is_finite(pipeline):
    image = generate(pipeline)
    assert image.shape == (1, 3, 128, 128)
    assert torch.isfinite(image).all()
