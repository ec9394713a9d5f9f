# SPDX-License-Identifier: Apache-2.0
"""The shipped Wan model loads, is small, has the promised size, and its data and checker hold."""

from copy import deepcopy

import torch
from diffusers import WanPipeline

from tests.samples.built import assert_small, same_draw

FAMILY = "wan"
CHECKED_CLIPS = 40


def test_the_folder_is_a_plain_wan_pipeline(pipeline):
    assert type(pipeline) is WanPipeline
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.scheduler.config.flow_shift == 3.0


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert_small(folder, weights=3)


def test_the_transformer_has_six_layers_of_four_heads(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_attention_heads) == (6, 4)
    assert config.attention_head_dim == 48


def test_the_native_size_gives_2304_tokens(pipeline):
    seen = []
    attention = pipeline.transformer.blocks[0].attn1
    handle = attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    pipeline(
        "a red circle moving right",
        height=128,
        width=128,
        num_frames=33,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    )
    handle.remove()
    assert [tuple(inputs.shape[:2]) for inputs in seen] == [(1, 2304)]


@same_draw
def test_the_shipped_text_encoder_is_the_one_that_training_used(pipeline):
    from text import make_text_encoder, make_tokenizer

    tokenizer = make_tokenizer()
    encoder = make_text_encoder(tokenizer)
    prompt = "a big red circle moving right over a gray plain background"
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    assert torch.equal(tokens, pipeline.tokenizer(prompt, return_tensors="pt").input_ids)
    wanted = encoder(tokens).last_hidden_state
    torch.testing.assert_close(pipeline.text_encoder(tokens).last_hidden_state, wanted)


def test_every_caption_is_in_the_vocabulary(pipeline):
    from data import caption, sample

    captions = [caption(index, sample(index)) for index in range(200)]
    tokens = pipeline.tokenizer(captions).input_ids
    assert all(
        len(one) == len(text.split()) + 1 for one, text in zip(tokens, captions, strict=True)
    )
    assert "" in captions


@same_draw
def test_collapsed_padding_is_what_the_pipeline_computes(pipeline):
    from text import Prompts
    from transformer import BiasedCrossAttention, collapse_padding

    prompt = "a red circle moving right"
    padded, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    latents, timestep = torch.randn(1, 16, 3, 8, 8), torch.tensor([700.0])
    with torch.no_grad():
        wanted = pipeline.transformer(latents, timestep, padded).sample
        collapsed = deepcopy(pipeline.transformer)
        collapse_padding(collapsed)
        text, BiasedCrossAttention.bias = Prompts()([prompt], padded.shape[1])
        result = collapsed(latents, timestep, text).sample
    assert text.shape[1] < padded.shape[1]
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_a_clip_follows_from_its_index():
    from data import caption, clip

    for index in (0, 7, 123456):
        first, scene = clip(index, 9, 64)
        second, again = clip(index, 9, 64)
        assert scene == again
        assert torch.equal(first, second)
        assert caption(index, scene) == caption(index, again)
    assert clip(0, 9, 64)[1] != clip(1, 9, 64)[1]


def test_held_out_combinations_never_train():
    from data import COLOURS, MOTIONS, SHAPES, is_held_out, sample

    combinations = [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS]
    assert sum(is_held_out(*combination) for combination in combinations) == 9
    assert not any(sample(index).held_out for index in range(500))
    assert all(sample(index, held_out=True).held_out for index in range(50))


def test_patches_go_there_and_back():
    from data import clip
    from latents import from_patches, to_patches

    video, _ = clip(3, 9, 64)
    assert torch.equal(from_patches(to_patches(video)), video)


def test_the_checker_reads_rendered_clips():
    from checker import CHECK_SEED, check
    from data import clip

    right = 0
    for index in range(CHECKED_CLIPS):
        video, scene = clip(index, 17, 64, held_out=None, seed=CHECK_SEED)
        reading = check((video.permute(1, 2, 3, 0) + 1) / 2)
        right += reading.matches(scene.colour, scene.shape, scene.motion)
    assert right >= 0.95 * CHECKED_CLIPS


def test_the_checker_sees_nothing_in_an_empty_clip():
    from checker import check

    reading = check(torch.zeros(9, 64, 64, 3))
    assert (reading.colour, reading.shape, reading.motion) == (None, None, None)


def test_a_small_generation_is_finite(pipeline):
    video = pipeline(
        "a red circle moving right",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert video.shape == (1, 9, 3, 64, 64)
    assert torch.isfinite(video).all()
