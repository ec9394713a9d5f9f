# SPDX-License-Identifier: Apache-2.0
"""Published models by name, to be forecast without a download: configs and usual sizes.

A config holds what differs from its class's defaults in diffusers; there are no weights here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_sparse.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One published model.

    Args:
        config: Its transformer's config, with ``_class_name``.
        height: Pixels.
        width: Pixels.
        num_frames: Frames.
        num_steps: Denoising steps that its authors use.
    """

    config: dict[str, Any]
    height: int
    width: int
    num_frames: int = 1
    num_steps: int = 50


# A config without a key but the class has the class's defaults in diffusers, which are those of
# the published model: the tests hold the number of its weights against the published one.
_COG = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
_PIXART = {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096}
_WAN = {"_class_name": "WanTransformer3DModel"}
_WAN_SMALL = {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}

KNOWN_MODELS: dict[str, KnownModel] = {
    "hunyuan-video": KnownModel(
        {"_class_name": "HunyuanVideoTransformer3DModel"}, 720, 1280, 129
    ),
    "wan2.1-14b": KnownModel(_WAN, 720, 1280, 81),
    "wan2.1-1.3b": KnownModel(_WAN_SMALL, 480, 832, 81),
    "cogvideox-2b": KnownModel({"_class_name": "CogVideoXTransformer3DModel"}, 480, 720, 49),
    "cogvideox-5b": KnownModel(_COG, 480, 720, 49),
    "cogvideox1.5-5b": KnownModel(
        {**_COG, "patch_size_t": 2, "patch_bias": False, "sample_height": 300,
         "sample_width": 300, "sample_frames": 81},
        768, 1360, 81,
    ),
    "hunyuan-video-1.5": KnownModel(
        {"_class_name": "HunyuanVideo15Transformer3DModel"}, 480, 848, 121
    ),
    "wan2.1-vace-14b": KnownModel({"_class_name": "WanVACETransformer3DModel"}, 480, 832, 81),
    "ltx-video-2b": KnownModel({"_class_name": "LTXVideoTransformer3DModel"}, 512, 704, 161),
    "ltx-2": KnownModel(
        {"_class_name": "LTX2VideoTransformer3DModel"}, 512, 768, 121, num_steps=30
    ),
    "mochi-1": KnownModel(
        {"_class_name": "MochiTransformer3DModel"}, 480, 848, 19, num_steps=64
    ),
    "allegro": KnownModel(
        {"_class_name": "AllegroTransformer3DModel"}, 720, 1280, 85, num_steps=100
    ),
    "flux.1-dev": KnownModel(_FLUX, 1024, 1024, num_steps=28),
    "flux.2-dev": KnownModel({"_class_name": "Flux2Transformer2DModel"}, 1024, 1024),
    "qwen-image": KnownModel({"_class_name": "QwenImageTransformer2DModel"}, 1024, 1024),
    "z-image": KnownModel({"_class_name": "ZImageTransformer2DModel"}, 1024, 1024),
    "pixart-sigma": KnownModel(_PIXART, 1024, 1024, num_steps=20),
}  # fmt: skip


def known_model(name: str) -> KnownModel:
    """Look up a published model; ``UnsupportedError`` lists the names."""
    if name not in KNOWN_MODELS:
        raise UnsupportedError(
            f"unknown model name {name!r}; known names: {', '.join(KNOWN_MODELS)}"
        )
    return KNOWN_MODELS[name]
