# SPDX-License-Identifier: Apache-2.0
"""The small HunyuanVideo model loads, is small, has the promised size and generates."""

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from tests.samples.built import SAMPLES, assert_small, same_draw

FAMILY = "hunyuan-video"
TEXT_TOKENS = 256
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
    assert type(pipeline) is HunyuanVideoPipeline
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert pipeline.transformer.config.guidance_embeds


def test_the_folder_is_small_and_holds_no_pickle(folder):
    assert_small(folder, weights=4)


def test_the_transformer_has_six_layers_of_four_heads(pipeline):
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_single_layers) == (3, 3)
    assert config.num_attention_heads == 4


def test_the_native_size_gives_2304_video_tokens(pipeline):
    seen = []
    model = pipeline.transformer
    handles = [
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[:2]))
        for layer in (model.transformer_blocks[0], model.single_transformer_blocks[0])
    ]
    generate(pipeline, 128, 33, 1, output_type="latent")
    for handle in handles:
        handle.remove()
    sizes = [(video.shape[:2], text.shape[1]) for video, text in seen]
    assert sizes == [((1, 2304), TEXT_TOKENS)] * 2


@pytest.mark.parametrize(
    "prompt", [PROMPT, "", "a small blue square growing over a navy background"]
)
def test_the_default_template_takes_exactly_the_tokens_that_are_cropped(pipeline, prompt):
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    tokens = pipeline.tokenizer.tokenize(template.format(prompt))
    assert "".join(tokens[94:95]) == "\n\n"
    kept = tokens[DEFAULT_PROMPT_TEMPLATE["crop_start"] :]
    assert [token.removeprefix("▁") for token in kept] == [*prompt.split(), "<|eot_id|>"]
    states, _, mask = pipeline.encode_prompt(prompt)
    assert states.shape[1] == TEXT_TOKENS
    assert mask.sum() == len(kept)
    assert mask[0, : len(kept)].all()


@same_draw
def test_training_reads_the_text_that_the_pipeline_reads(pipeline, family):
    prompts = [PROMPT, "", "a big red circle moving right over a gray plain background"]
    states, pooled, mask = pipeline.encode_prompt(prompts)
    told = family.conditioning(prompts, None)
    width = told["encoder_hidden_states"].shape[1]
    torch.testing.assert_close(told["encoder_hidden_states"], states[:, :width])
    torch.testing.assert_close(told["pooled_projections"], pooled)
    assert torch.equal(told["encoder_attention_mask"], mask[:, :width])
    assert mask[:, width:].sum() == 0


@same_draw
def test_shorter_padding_gives_the_same_prediction(pipeline, family):
    states, pooled, mask = pipeline.encode_prompt(PROMPT)
    told = family.conditioning([PROMPT], None)
    latents, timestep = torch.randn(1, 16, 3, 8, 8), torch.tensor([700.0])
    with torch.no_grad():
        result = family.forward(pipeline.transformer, latents, timestep, told)
        wanted = pipeline.transformer(
            latents, timestep, states, mask, pooled, told["guidance"]
        ).sample
        other = family.forward(
            pipeline.transformer, latents, timestep, family.conditioning([""], None)
        )
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other, wanted, rtol=1e-2, atol=1e-2)


def test_a_small_generation_with_guidance_is_finite(pipeline):
    video = generate(pipeline, output_type="pt", negative_prompt="", true_cfg_scale=3.0)
    assert video.shape == (1, 9, 3, 64, 64)
    assert torch.isfinite(video).all()


def test_starting_weights_modulate_as_wan_does(family):
    from diffusers import WanTransformer3DModel
    from from_wan import hunyuan_video

    wan = WanTransformer3DModel.from_pretrained(SAMPLES / "wan-tiny", subfolder="transformer")
    model = family.make_transformer()
    hunyuan_video(model, wan)
    timestep = torch.tensor([3.0, 250.0, 777.0])
    seen = []
    handle = wan.blocks[1].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    with torch.no_grad():
        wan(torch.randn(3, 16, 1, 2, 2), timestep, torch.randn(3, 4, 64))
        wanted = (wan.blocks[1].scale_shift_table + seen[0][2]).flatten(1)
        embedder = model.time_text_embed
        time = embedder.timestep_embedder(embedder.time_proj(timestep))
        found = model.transformer_blocks[1].norm1.linear(torch.nn.functional.silu(time))
    handle.remove()
    assert (found - wanted).square().mean() < 1e-3 * wanted.square().mean()
    first = model.transformer_blocks[1].ff.net[2].weight
    assert torch.equal(first, wan.blocks[1].ffn.net[2].weight)


def test_a_teacher_gives_the_guided_prediction(family, pipeline, tmp_path):
    from objectives import Flow
    from train_dit import Teacher

    torch.save({"average": pipeline.transformer.state_dict()}, tmp_path / "dit.pt")
    noised = Flow()(torch.randn(2, 16, 1, 4, 4), torch.randn(2, 16, 1, 4, 4), torch.rand(2))
    told = family.conditioning([PROMPT, "a blue square growing"], None)
    with torch.no_grad():
        cond, uncond = (
            family.forward(pipeline.transformer, noised.noisy, noised.timestep, text)
            for text in (told, family.conditioning(["", ""], None))
        )
    guided = Teacher(family, tmp_path / "dit.pt", 4.0)(noised, told, None)
    torch.testing.assert_close(guided, 4 * cond - 3 * uncond, rtol=1e-3, atol=1e-3)
