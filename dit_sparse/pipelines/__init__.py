# SPDX-License-Identifier: Apache-2.0
"""Model glue: the only package code that imports diffusers, and the table of model families.

A new model is one row (in a file of its own, or beside those of its token layout) and one line in
this table (the exact class name, never a prefix).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines.declined import DECLINED
from dit_sparse.pipelines.trained import refuse_gates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dit_sparse.pipelines.family import Family

# What has been tried in whole pipelines, with every method.
FAMILIES: dict[str, str] = {
    "CogVideoXTransformer3DModel": "cogvideox:COGVIDEOX",
    "FluxTransformer2DModel": "flux:FLUX",
    "HunyuanVideoTransformer3DModel": "hunyuan_video:HUNYUAN_VIDEO",
    "PixArtTransformer2DModel": "pixart:PIXART",
    "WanTransformer3DModel": "wan:WAN",
}
# What has been tried as a transformer by itself (tests/models): one row each, by token layout.
MODELS: dict[str, str] = {
    "AllegroTransformer3DModel": "video_only:ALLEGRO",
    "AnyFlowTransformer3DModel": "video_only:ANYFLOW",
    "AuraFlowTransformer2DModel": "text_first:AURAFLOW",
    "BriaFibo2Transformer2DModel": "text_first:BRIA_FIBO2",
    "BriaFiboTransformer2DModel": "packed:BRIA_FIBO",
    "BriaTransformer2DModel": "packed:BRIA",
    "ChromaTransformer2DModel": "packed:CHROMA",
    "ChronoEditTransformer3DModel": "video_only:CHRONOEDIT",
    "CogView3PlusTransformer2DModel": "text_first:COGVIEW3_PLUS",
    "CogView4Transformer2DModel": "text_first:COGVIEW4",
    "ConsisIDTransformer3DModel": "text_first:CONSISID",
    "CosmosTransformer3DModel": "video_only:COSMOS",
    "DiTTransformer2DModel": "video_only:DIT",
    "EasyAnimateTransformer3DModel": "text_first:EASYANIMATE",
    "ErnieImageTransformer2DModel": "text_last:ERNIE_IMAGE",
    "Flux2Transformer2DModel": "packed:FLUX2",
    "Flux3Transformer2DModel": "packed:FLUX3",
    "GlmImageTransformer2DModel": "text_first:GLM_IMAGE",
    "HeliosTransformer3DModel": "text_first:HELIOS",
    "HiDreamImageTransformer2DModel": "text_last:HIDREAM",
    "HunyuanDiT2DModel": "video_only:HUNYUAN_DIT",
    "HunyuanImageTransformer2DModel": "text_last:HUNYUAN_IMAGE",
    "HunyuanVideo15Transformer3DModel": "text_last:HUNYUAN_VIDEO_15",
    "Ideogram4Transformer2DModel": "text_first:IDEOGRAM4",
    "JoyImageEditPlusTransformer3DModel": "text_last:JOYIMAGE_EDIT_PLUS",
    "JoyImageEditTransformer3DModel": "text_last:JOYIMAGE_EDIT",
    "Kandinsky5Transformer3DModel": "video_only:KANDINSKY5",
    "Kandinsky6Transformer3DModel": "video_only:KANDINSKY6",
    "Krea2Transformer2DModel": "packed:KREA2",
    "LTX2VideoTransformer3DModel": "video_only:LTX2",
    "LTXVideoTransformer3DModel": "video_only:LTX",
    "LatteTransformer3DModel": "video_only:LATTE",
    "LongCatImageTransformer2DModel": "packed:LONGCAT_IMAGE",
    "Lumina2Transformer2DModel": "text_first:LUMINA2",
    "LuminaNextDiT2DModel": "video_only:LUMINA_NEXT",
    "MiniMaxH3Transformer3DModel": "text_first:MINIMAX_H3",
    "MochiTransformer3DModel": "text_last:MOCHI",
    "MotifVideoTransformer3DModel": "text_last:MOTIF_VIDEO",
    "OvisImageTransformer2DModel": "packed:OVIS_IMAGE",
    "QwenImageTransformer2DModel": "text_first:QWEN_IMAGE",
    "SD3Transformer2DModel": "text_last:SD3",
    "SkyReelsV2Transformer3DModel": "video_only:SKYREELS_V2",
    "WanAnimateTransformer3DModel": "video_only:WAN_ANIMATE",
    "WanVACETransformer3DModel": "video_only:WAN_VACE",
    "ZImageTransformer2DModel": "text_last:Z_IMAGE",
}
ALL = f"{', '.join(sorted(FAMILIES))} and {len(MODELS)} more (dit-sparse methods --models)"


def family_by_name(class_name: str) -> Family:
    """Look up the family of a transformer class by its exact name."""
    if class_name in DECLINED:
        raise UnsupportedError(f"{class_name} is not supported: {DECLINED[class_name]}")
    row = FAMILIES.get(class_name) or MODELS.get(class_name)
    if row is None:
        raise UnsupportedError(f"{class_name} is not supported; supported: {ALL}")
    file, _, symbol = row.partition(":")
    found: Family = getattr(import_module(f"dit_sparse.pipelines.{file}"), symbol)
    return found


def known_class(model: Any) -> str:
    """Name a model's class of the table: its own, or the nearest one that it derives from.

    A class of a user's own and one that ``fully_shard`` renamed derive from a known one; where
    there is none, the name is the model's own class's.
    """
    names = [each.__name__ for each in type(model).__mro__]
    known = (name for name in names if name in FAMILIES or name in MODELS or name in DECLINED)
    return next(known, names[0])


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if (name := known_class(module)) in FAMILIES or name in MODELS or name in DECLINED:
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def unwrap(module: nn.Module) -> Any:
    """Return the one model of a known class in ``module``, or else the module itself.

    torch.compile, peft, DDP, FSDP, DataParallel and users wrap models in modules of their own.
    """
    found = list(dict.fromkeys(_outermost(module)))
    return found[0] if len(found) == 1 else getattr(module, "_orig_mod", module)


def family_of(module: nn.Module) -> Family:
    """Look up the family of a transformer; refuse a checkpoint that cannot be served."""
    model = unwrap(module)
    name = known_class(model)
    family = family_by_name(name)
    if (reason := family.refuses(model.config)) is not None:
        raise UnsupportedError(f"this {name} is not supported: {reason}")
    refuse_gates(model)
    return family
