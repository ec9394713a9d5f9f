# SPDX-License-Identifier: Apache-2.0
"""A model's size, counted without weights, against real tiny models and the formulas of papers."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines import FAMILIES, family_by_name
from dit_sparse.pipelines.known import KNOWN_MODELS, known_model
from dit_sparse.pipelines.size import compression, model_size
from tests.tiny import PIPELINES, run


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
def test_known_models_are_counted_at_their_usual_size(name):
    model = known_model(name)
    size = model_size(model.config, model.height, model.width, model.num_frames)
    billions = {
        "hunyuan-video": 12.8,
        "wan2.1-14b": 14.3,
        "wan2.1-1.3b": 1.4,
        "cogvideox-2b": 1.7,
        "cogvideox-5b": 5.6,
        "cogvideox1.5-5b": 5.6,
        "hunyuan-video-1.5": 8.3,
        "wan2.1-vace-14b": 17.3,
        "ltx-video-2b": 1.9,
        "ltx-2": 18.9,
        "mochi-1": 10.0,
        "allegro": 2.8,
        "flux.1-dev": 11.9,
        "flux.2-dev": 32.2,
        "qwen-image": 20.4,
        "z-image": 6.15,
        "pixart-sigma": 0.6,
    }[name]
    assert size.parameters / 1e9 == pytest.approx(billions, rel=0.05)
    tokens = {
        "hunyuan-video": 33 * 45 * 80 + 256,
        "wan2.1-14b": 75_600,
        "wan2.1-1.3b": 32_760,
        "cogvideox1.5-5b": 45_106,
        "hunyuan-video-1.5": 31 * 30 * 53 + 1000 + 256 + 729,
        "wan2.1-vace-14b": 21 * 30 * 52,
        "ltx-video-2b": 21 * 16 * 22,
        "ltx-2": 16 * 16 * 24,
        "mochi-1": 4 * 30 * 53 + 256,
        "allegro": 22 * 45 * 80,
        "flux.1-dev": 4_096 + 512,
        "flux.2-dev": 4_096 + 512,
        "qwen-image": 4_096 + 512,
        "z-image": 4_096 + 512,
        "pixart-sigma": 4_096,
    }.get(name, 13 * 30 * 45 + 226)
    assert size.grid.tokens == tokens
    # What is not self-attention: at least two operations for every weight that each token meets.
    assert size.other_flops > size.parameters * size.grid.tokens * 0.5


def test_published_counts_are_met():
    """PFLOP of attention and of a pass, as the papers count them for 50 steps of two passes."""
    model = known_model("hunyuan-video")
    size = model_size(model.config, 720, 1280, 129)
    total = (size.attention_flops + size.other_flops) * 50
    assert total == pytest.approx(612.37e15, rel=0.02)  # SVG, Radial, Sparse-vDiT: dense
    model = known_model("wan2.1-14b")
    size = model_size(model.config, 720, 1280, 81)
    assert size.attention_flops * 100 + size.other_flops * 100 == pytest.approx(
        660.49e15, rel=0.02
    )


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_tiny_model_counts_as_its_own_forward_does(name):
    """The count without data equals the count of a real call of the real model."""
    pipe, args = PIPELINES[name]()
    transformer = pipe.transformer
    forward, seen = transformer.forward, {}

    def counting(*positional, **named):
        # Plain attention: torch's counter does not know the CPU's fused one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = forward(*positional, **named)
        hidden = named.get("hidden_states", positional[0] if positional else None)
        seen["flops"] = counter.get_total_flops() / hidden.shape[0]
        seen["text"] = named["encoder_hidden_states"].shape[1]
        return result

    transformer.forward = counting
    run(pipe, args)
    size = model_size(
        dict(transformer.config) | {"_class_name": type(transformer).__name__},
        args["height"],
        args["width"],
        args.get("num_frames", 1),
        vae=dict(pipe.vae.config),
        text=seen["text"],
    )
    family = family_by_name(type(transformer).__name__)
    assert size.layers == len(family.attention_modules(transformer))
    counted = size.attention_flops + size.other_flops
    assert counted == pytest.approx(seen["flops"], rel=0.01)


def test_every_family_can_be_counted():
    counted = {model.config["_class_name"] for model in KNOWN_MODELS.values()}
    assert counted >= set(FAMILIES)


def test_what_cannot_be_counted_is_said():
    with pytest.raises(UnsupportedError, match="UNet2DModel is not supported"):
        model_size({"_class_name": "UNet2DModel"}, 64, 64)
    wan = known_model("wan2.1-14b").config
    with pytest.raises(
        UnsupportedError, match=r"multiples of 8, and frames one more than a multiple of"
    ):
        model_size(wan, 720, 1284, 81)
    with pytest.raises(UnsupportedError, match=r"frames one more"):
        model_size(wan, 720, 1280, 80)
    with pytest.raises(UnsupportedError, match="cannot be counted with this config"):
        model_size(wan | {"num_layers": "many"}, 720, 1280, 81)
    with pytest.raises(UnsupportedError, match="unknown model name 'sora'; known names:"):
        known_model("sora")


def test_a_vae_config_tells_its_compression():
    wan = family_by_name("WanTransformer3DModel")
    assert compression(None, wan) == (8, 4)
    assert compression({"scale_factor_spatial": 16, "scale_factor_temporal": 4}, wan) == (16, 4)
    assert compression({"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}, wan) == (
        8,
        4,
    )
    assert compression({"block_out_channels": [8, 16, 32]}, wan)[0] == 4
