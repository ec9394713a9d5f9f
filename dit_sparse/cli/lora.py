# SPDX-License-Identifier: Apache-2.0
"""``--lora SOURCE[=SCALE]``: adapters that a command merges into the model it loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.cli.console import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter.

    Args:
        source: Folder, safetensors file, or Hub id.
        scale: Its share, finite; 1 is as trained.
    """

    source: str
    scale: float = 1.0

    def __str__(self) -> str:
        """Write it as it is given."""
        return self.source if self.scale == 1.0 else f"{self.source}={self.scale:g}"


def read_loras(texts: Sequence[str] | None) -> tuple[Lora, ...]:
    """Read what ``--lora`` names, once for each adapter.

    Raises:
        UserError: A scale that is no number, or a source named twice.
    """
    found: list[Lora] = []
    for text in texts or ():
        source, equals, scale = text.rpartition("=")
        try:
            one = Lora(source, float(scale)) if equals else Lora(text)
        except ValueError:
            one = Lora("", math.nan)
        if not (one.source and math.isfinite(one.scale)):
            raise UserError(
                f"--lora {text!r:.200}: must be a folder, file or Hub id, optionally with a "
                "scale, e.g. my-lora=0.8"
            )
        if one.source in {other.source for other in found}:
            raise UserError(f"--lora {one.source}: given twice; remove one")
        found.append(one)
    return tuple(found)


def merge_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Merge adapters into a pipeline's weights: it runs, and is told apart, like any other model.

    Raises:
        UserError: One cannot be loaded, or this pipeline takes none.
    """
    name = type(pipe).__name__
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"--lora: {name} does not support LoRA")
    if loras and getattr(pipe, "transformer_2", None) is not None:
        raise UserError(
            f"--lora: this {name} has two transformers, and an adapter applies to only one of "
            "them; merge adapters in Python (load_lora_weights, load_into_transformer_2) and "
            "save the pipeline"
        )
    for one in loras:
        _merge(pipe, one)


def _merge(pipe: Any, one: Lora) -> None:
    from dit_sparse.strategy.hub import means_a_file

    name = type(pipe).__name__
    if means_a_file(one.source) and not Path(one.source).exists():
        raise UserError(f"--lora {one.source}: file or folder not found")
    try:
        pipe.load_lora_weights(
            one.source, adapter_name="merged", use_safetensors=True, **_file_name(Path(one.source))
        )
    except Exception as error:  # whatever is wrong here is wrong with what was named
        hint = (
            "; to install PEFT: pip install 'dit-sparse[distill]'" if "PEFT" in str(error) else ""
        )
        raise UserError(
            f"--lora {one.source}: cannot be loaded into {name}: {first_line(error)}{hint}"
        ) from error
    if not any("merged" in adapters for adapters in pipe.get_list_adapters().values()):
        raise UserError(f"--lora {one.source}: contains no weights for the model of {name}")
    pipe.set_adapters("merged", one.scale)
    pipe.fuse_lora(adapter_names=["merged"])
    pipe.unload_lora_weights()


def _file_name(source: Path) -> dict[str, str]:
    """Name the file of a local adapter: offline, diffusers before 0.40 does not look for it."""
    found = [source] if source.is_file() else list(source.glob("*.safetensors"))
    return {"weight_name": found[0].name} if len(found) == 1 else {}
