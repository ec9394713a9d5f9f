# SPDX-License-Identifier: Apache-2.0
"""The small CogVideoX model loads, is small, has the promised size and generates."""

import random

import torch
from diffusers import CogVideoXPipeline

from tests.samples.built import assert_small, same_draw

FAMILY = "cogvideox"
TEXT_TOKENS = 226
PROMPT = "a red circle moving right"


def generate(pipeline, pixels=64, frames=9, steps=2, **settings):
    return pipeline(
        PROMPT,
        height=pixels,
        width=pixels,
        num_frames=frames,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).frames


def test_the_folder_is_a_plain_pipeline(pipeline):
    assert type(pipeline) is CogVideoXPipeline
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert_small(folder, weights=3)


def test_the_transformer_has_six_layers_of_four_heads(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_attention_heads) == (6, 4)


def test_the_native_size_gives_2304_video_tokens(pipeline):
    seen = []
    layer = pipeline.transformer.transformer_blocks[0]
    handle = layer.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named), with_kwargs=True
    )
    generate(pipeline, 128, 33, 1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    assert [named["hidden_states"].shape[:2] for named in seen] == [(1, 2304)]
    assert [named["encoder_hidden_states"].shape[1] for named in seen] == [TEXT_TOKENS]


@same_draw
def test_the_shipped_text_encoder_is_the_one_that_training_used(pipeline, family):
    wanted, _ = family.make_pipeline(pipeline.transformer, pipeline.vae).encode_prompt(
        PROMPT, do_classifier_free_guidance=False
    )
    found, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    torch.testing.assert_close(found, wanted)


@same_draw
def test_collapsed_padding_is_what_the_pipeline_computes(pipeline, family):
    class Longest(random.Random):
        def choice(self, values):
            return max(values)

    short = family.conditioning([PROMPT], Longest())
    padded, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert padded.shape[1] == TEXT_TOKENS > 4 * short["text"].shape[1]
    latents, timestep = torch.randn(1, 16, 3, 8, 8), torch.tensor([700])
    with torch.no_grad():
        result = family.forward(pipeline.transformer, latents, timestep, short)
        rotary = pipeline._prepare_rotary_positional_embeddings(64, 64, 3, torch.device("cpu"))
        wanted = pipeline.transformer(
            latents.transpose(1, 2), padded, timestep, image_rotary_emb=rotary
        ).sample.transpose(1, 2)
        unbiased = {**short, "bias": torch.zeros_like(short["bias"])}
        wrong = family.forward(pipeline.transformer, latents, timestep, unbiased)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wrong, wanted, rtol=1e-2, atol=1e-2)


def test_a_small_generation_is_finite(pipeline):
    video = generate(pipeline, output_type="pt")
    assert video.shape == (1, 9, 3, 64, 64)
    assert torch.isfinite(video).all()


def test_every_step_of_training_has_a_noise_level_of_the_sampler(pipeline, family):
    table = pipeline.scheduler.alphas_cumprod
    latents, noise = torch.randn(50, 4), torch.randn(50, 4)
    noised = family.objective(latents, noise, torch.rand(50))
    signal = table[noised.timestep].float()[:, None]
    wanted = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    torch.testing.assert_close(noised.noisy, wanted)
    # what the scheduler makes of a right prediction is the clean latent
    restored = signal.sqrt() * noised.noisy - (1 - signal).sqrt() * noised.target
    torch.testing.assert_close(restored, latents, rtol=1e-4, atol=1e-4)
    assert (noised.timestep < len(table)).all()
