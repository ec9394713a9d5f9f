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
    "flux.1-dev": KnownModel(_FLUX, 1024, 1024, num_steps=28),
    "pixart-sigma": KnownModel(_PIXART, 1024, 1024, num_steps=20),
}  # fmt: skip


def known_model(name: str) -> KnownModel:
    """Look up a published model; ``UnsupportedError`` lists the names."""
    if name not in KNOWN_MODELS:
        raise UnsupportedError(
            f"no model is known as {name!r}; there are {', '.join(KNOWN_MODELS)}"
        )
    return KNOWN_MODELS[name]
