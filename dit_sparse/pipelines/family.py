# SPDX-License-Identifier: Apache-2.0
"""What must be known of a model family: where its attention is and where its tokens stand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.errors import UnsupportedError
from dit_sparse.grid import LatentsGrid

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Shape = tuple[int, int, int, int]  # frames, height, width (tokens), text tokens


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a tensor that has a shape and no data."""
    return torch.empty(size, dtype=dtype, device="meta")


def _no_example(*_: Any) -> dict[str, Any]:
    raise UnsupportedError("this family does not say how to call its transformer without data")


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of families.

    Args:
        name: Short name for reports.
        attention: Pattern of the module paths of the main self-attention, matched whole.
        shape: ``(config, forward arguments by name) -> (frames, height, width, text)`` in tokens.
            Runs inside compiled graphs too: shapes and plain arithmetic only.
        text_first: The text stands before the video in the joint sequence.
        text_padding: The model's mask hides padded text at the end of the text, nothing else.
        batched_cfg: The pipeline runs both guidance branches as one batch.
        shape_input: Forward argument that ``shape`` reads values from (a device read); while the
            very same object comes again, the shape is not computed anew.
        example: ``(config, latent frames, latent height, latent width, text tokens)`` -> forward
            arguments without data (device "meta", but for ``shape_input``), one sample.
        text_tokens: Text tokens that its pipeline passes where it is not told.
        compression: Pixels of a latent pixel's side, and frames of a latent frame, in its VAE.
    """

    name: str
    attention: str
    shape: Callable[[Any, dict[str, Any]], Shape]
    text_first: bool = False
    text_padding: bool = False
    batched_cfg: bool = False
    shape_input: str | None = None
    example: Callable[[Any, int, int, int, int], dict[str, Any]] = _no_example
    text_tokens: int = 512
    compression: tuple[int, int] = (8, 4)

    def attention_modules(self, transformer: nn.Module) -> list[tuple[str, Any]]:
        """List the main self-attention modules in the order of their layers."""
        pattern = re.compile(self.attention)
        found = [
            (path, module)
            for path, module in transformer.named_modules()
            if pattern.fullmatch(path)
        ]
        if not found:
            raise UnsupportedError(
                f"{type(transformer).__name__} has no module that matches {self.attention!r}; "
                "this version of diffusers may name them otherwise, please report it"
            )
        return found

    def grid(self, shape: Shape) -> LatentsGrid:
        """Make the latents grid from what ``shape`` returned."""
        frames, height, width, text = shape
        return LatentsGrid(frames, height, width, text, self.text_first and text > 0)
