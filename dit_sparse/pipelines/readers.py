# SPDX-License-Identifier: Apache-2.0
"""The ways in which a model's forward arguments tell its token grid.

Each reader is data that can be called: ``(config, forward arguments by name)`` gives (frames,
height, width, text) in tokens, or None where this pass cannot be placed on a grid. They run
inside compiled graphs too, but for ``Ids``, which reads values: an operator runs it there, and it
costs a device read where its object is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.pipelines.family import Shape

ENCODER = ("encoder_hidden_states",)


def text_tokens(inputs: dict[str, Any], names: tuple[str, ...]) -> int:
    """Add up the lengths of those text arguments ``[batch, tokens, ...]`` that are there."""
    return sum(inputs[name].shape[1] for name in names if inputs.get(name) is not None)


@dataclass(frozen=True)
class Latents:
    """Reads the sizes of a tensor of latents, and divides them by the patch.

    Args:
        axes: A letter for each axis, one string for each rank it may come in: b(atch),
            c(hannels), n (items, each of t frames), t, h, w; "_" for one that does not matter.
        text: Arguments whose tokens stand in the same sequence.
        registers: Tokens that the model adds to the text by itself.
        patch: Config key of the patch: one number for rows and columns, or one for each axis.
        patch_t: Config key of the patch in time, where it has its own.
        source: Forward argument.
    """

    axes: tuple[str, ...]
    text: tuple[str, ...] = ()
    registers: int = 0
    patch: str = "patch_size"
    patch_t: str | None = None
    source: str = "hidden_states"

    @property
    def about(self) -> str:
        """Name what is read, for people."""
        return f"`{self.source}` [{' or '.join(', '.join(axes) for axes in self.axes)}]"

    def __call__(self, config: Any, inputs: dict[str, Any]) -> Shape | None:
        """Read one pass."""
        sizes = inputs[self.source].shape
        for axes in self.axes:
            if len(axes) == len(sizes):
                break
        else:
            return None
        size = dict(zip(axes, sizes, strict=True))
        patch_t, patch_h, patch_w = self._patch(config)
        frames = size.get("t", 1) * size.get("n", 1) // patch_t
        text = text_tokens(inputs, self.text) + self.registers
        return frames, size["h"] // patch_h, size["w"] // patch_w, text

    def _patch(self, config: Any) -> tuple[int, int, int]:
        patch = getattr(config, self.patch)
        if isinstance(patch, int):
            time = 1 if self.patch_t is None else getattr(config, self.patch_t) or 1
            return time, patch, patch
        time, height, width = (1, *patch)[-3:]
        return time, height, width


@dataclass(frozen=True)
class Ids:
    """Counts rows and columns in the positions of the picture's tokens.

    The tokens must be one picture's, row by row; the positions may begin anywhere and have any
    pitch. Positions in any other order, and those of several pictures, are no grid.

    Args:
        source: Forward argument ``[tokens, 3 or 4]``, or with a batch before; (time, row,
            column, ...) of each token.
        joint: The text's positions stand before the picture's in the same tensor.
    """

    source: str = "img_ids"
    joint: bool = False

    @property
    def about(self) -> str:
        """Name what is read, for people."""
        return f"the rows and columns in `{self.source}`"

    def __call__(self, config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG002
        """Read one pass."""
        ids = inputs[self.source].detach().cpu()
        text = text_tokens(inputs, ENCODER)
        if ids.ndim == 3 and bool((ids == ids[:1]).all()):  # the same for every sample
            ids = ids[0]
        if ids.ndim != 2 or ids.shape[1] < 3:
            return None
        sides = _sides(ids[text:] if self.joint else ids)
        return None if sides is None else (1, *sides, text)


def _sides(ids: Tensor) -> tuple[int, int] | None:
    """Count rows and columns of positions ``[tokens, (time, row, column, ...)]``."""
    row, column = ids[:, 1], ids[:, 2]
    width = int((row == row[:1]).cumprod(0).sum())  # of the first row; 0 where it is NaN
    others = ids[:, [0, *range(3, ids.shape[1])]]
    if width == 0 or len(ids) % width or not bool((others == others[:1]).all()):
        return None
    rows, columns = row.view(-1, width), column.view(-1, width)
    regular = bool((rows == rows[:, :1]).all()) and bool((columns == columns[:1]).all())
    for line in (rows[:, 0], columns[0]):  # rounded to bfloat16, neighbours may be equal
        rises = bool((line[1:] >= line[:-1]).all())
        regular = regular and rises and (len(line) == 1 or bool(line[-1] > line[0]))
    return (len(rows), width) if regular else None


@dataclass(frozen=True)
class Arguments:
    """Reads three numbers that are forward arguments themselves, in tokens."""

    names: tuple[str, str, str] = ("num_frames", "height", "width")

    @property
    def about(self) -> str:
        """Name what is read, for people."""
        return ", ".join(f"`{name}`" for name in self.names)

    def __call__(self, config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG002
        """Read one pass; None where the model was given coordinates instead."""
        frames, height, width = (inputs.get(name) for name in self.names)
        if frames is None or height is None or width is None:
            return None
        return int(frames), int(height), int(width), 0


@dataclass(frozen=True)
class Listed:
    """Reads a list of (frames, height, width), one for each picture of a sample.

    Pictures of one size stand one after the other like the frames of a video; pictures of several
    sizes are no grid. The same must hold for every sample.
    """

    source: str

    @property
    def about(self) -> str:
        """Name what is read, for people."""
        return f"`{self.source}`"

    def __call__(self, config: Any, inputs: dict[str, Any]) -> Shape | None:  # noqa: ARG002
        """Read one pass."""
        samples = inputs.get(self.source)
        if not samples:
            return None
        seen = set()
        for sample in samples:
            pictures = sample if isinstance(sample, list) else [sample]
            sides = {(int(height), int(width)) for _, height, width in pictures}
            if len(sides) > 1:
                return None
            seen.add((sum(int(frames) for frames, _, _ in pictures), *sides.pop()))
        if len(seen) > 1:
            return None
        frames, height, width = seen.pop()
        return frames, height, width, text_tokens(inputs, ENCODER)
