# SPDX-License-Identifier: Apache-2.0
"""The sizes that are measured: the models' own on a GPU, smaller ones on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call's size.

    Args:
        name: For tables.
        grid: Where the tokens stand.
        heads: Number of heads.
        head_dim: Width of one.
    """

    name: str
    grid: LatentsGrid
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.grid.tokens


CPU_SHAPES = (
    Shape("2k, head_dim 48", LatentsGrid(9, 16, 16), 4, 48),
    Shape("8k, head_dim 64", LatentsGrid(8, 32, 32), 2, 64),
    Shape("8k, head_dim 128", LatentsGrid(8, 32, 32), 2, 128),
)
METHOD_SHAPES = (  # on a CPU
    Shape("8k video", LatentsGrid(8, 32, 32), 2, 64),
    Shape("32k video", LatentsGrid(20, 32, 51), 1, 64),
)
MODEL_SHAPES = (
    Shape("HunyuanVideo 720p 129 frames", LatentsGrid(33, 45, 80, 256), 24, 128),
    Shape("Wan 2.1 14B 720p 81 frames", LatentsGrid(21, 45, 80), 40, 128),
    Shape(
        "CogVideoX 1.5 768x1360 81 frames", LatentsGrid(11, 48, 85, 226, text_first=True), 48, 64
    ),
    Shape("FLUX 2048 px", LatentsGrid(1, 128, 128, 512, text_first=True), 24, 128),
    Shape("PixArt 1024 px", LatentsGrid(1, 64, 64), 16, 72),
)
NUMBERS = 5


def find_shapes(wanted: Sequence[str]) -> tuple[Shape, ...]:
    """Read shapes: part of a known name, or ``FRAMESxHEIGHTxWIDTHxHEADSxHEAD_DIM`` in tokens.

    Raises:
        KernelError: A text is neither, or fits several names.
    """
    known = {shape.name: shape for shape in (*MODEL_SHAPES, *CPU_SHAPES, *METHOD_SHAPES)}
    found = []
    for text in wanted:
        parts = text.lower().split("x")
        if len(parts) == NUMBERS and all(part.isdecimal() and int(part) > 0 for part in parts):
            frames, height, width, heads, head_dim = map(int, parts)
            found.append(Shape(text, LatentsGrid(frames, height, width), heads, head_dim))
            continue
        fits = [name for name in known if text.lower() in name.lower()]
        if len(fits) != 1:
            raise KernelError(
                f"shape {text!r} matches {len(fits)} of the known shapes ({', '.join(known)}); "
                "give exactly one name, or FRAMESxHEIGHTxWIDTHxHEADSxHEAD_DIM in tokens, e.g. "
                "8x32x32x2x64"
            )
        found.append(known[fits[0]])
    return tuple(found)
