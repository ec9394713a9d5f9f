# SPDX-License-Identifier: Apache-2.0
"""Model glue: the only package code that imports diffusers, and the table of model families.

A new model is one file here and one line in this table (the exact class name, never a prefix).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from dit_sparse.pipelines.family import Family

FAMILIES: dict[str, str] = {
    "CogVideoXTransformer3DModel": "cogvideox:COGVIDEOX",
    "FluxTransformer2DModel": "flux:FLUX",
    "HunyuanVideoTransformer3DModel": "hunyuan_video:HUNYUAN_VIDEO",
    "PixArtTransformer2DModel": "pixart:PIXART",
    "WanTransformer3DModel": "wan:WAN",
}


def family_by_name(class_name: str) -> Family:
    """Look up the family of a transformer class by its exact name."""
    if class_name not in FAMILIES:
        raise UnsupportedError(
            f"no adapter for {class_name}; dit_sparse knows: {', '.join(sorted(FAMILIES))}"
        )
    file, _, symbol = FAMILIES[class_name].partition(":")
    found: Family = getattr(import_module(f"dit_sparse.pipelines.{file}"), symbol)
    return found


def unwrap(module: nn.Module) -> Any:
    """Return the model inside ``torch.compile``'s wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def family_of(module: nn.Module) -> Family:
    """Look up the family of a transformer."""
    return family_by_name(type(unwrap(module)).__name__)
