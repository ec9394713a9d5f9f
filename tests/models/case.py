# SPDX-License-Identifier: Apache-2.0
"""What a case of the contract over all transformer classes is, and how its model is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tests.tiny import newer, normal

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = 7  # prompt tokens where a case does not say otherwise
VIDEO = (3, 4, 6)  # tokens of the video cases: 72
PICTURE = (1, 6, 8)  # and of the picture cases: 48


@dataclass(frozen=True)
class Case:
    """One tiny model of a class, how to call it, and what must be found. Numbers by hand.

    Args:
        config: Of the class, which is the key in the table.
        inputs: ``batch -> forward arguments``.
        grid: Frames, height, width in tokens.
        text: Tokens beside them in the sequence, in every layer but ``bare`` ones.
        layers: Main attention modules.
        first: The text stands in front.
        bare: Layers that hold no text.
        texts: Text tokens of each sample, where the processor calls attention one by one.
        batch_text: Text tokens of a batch of two, where they are others.
        source: Argument that holds the latents.
        axes: A letter for each axis of the latents: b(atch), x (a list of samples), t (frames),
            i (items of one frame each, the last of which is put first), h, w, n (tokens);
            anything else for what a token has of it.
        patch: Rows and columns of latents in a token.
        offset: Tokens before the video's among the latents.
        mixed: So many tokens, from the video's first, have been exchanging something before the
            first main layer.
        unread: So many tokens of the prediction, from its first, are of no picture: their
            padding may hold anything.
    """

    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    grid: tuple[int, int, int] = VIDEO
    text: int = 0
    layers: int = 2
    first: bool = False
    bare: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    batch_text: int | None = None
    source: str = "hidden_states"
    axes: str = "bcthw"
    patch: int = 2
    offset: int = 0
    mixed: int = 0
    unread: int = 0

    def grids(self, batch: int) -> set[tuple[int, ...]]:
        """Give every (frames, height, width, text) that attention must be called with."""
        text = self.text if batch == 1 or self.batch_text is None else self.batch_text
        texts = self.texts[:batch] or ((text, 0) if self.bare else (text,))
        return {(*self.grid, each) for each in texts}

    def poked(self, place: tuple[int, int, int]) -> dict[str, Any]:
        """Make the arguments of one sample whose latents differ in one token."""
        inputs = self.inputs(1)
        frame, row, column = place
        at = {
            "b": 0,
            "t": frame,
            "i": frame - 1,
            "h": row * self.patch,
            "w": column * self.patch,
            "n": self.offset + (frame * self.grid[1] + row) * self.grid[2] + column,
        }
        latents = inputs[self.source]
        if self.axes.startswith("x"):
            latents = [latents[0].clone()]
            latents[0][tuple(at.get(axis, slice(None)) for axis in self.axes[1:])] += 1.0
        else:
            latents = latents.clone()
            latents[tuple(at.get(axis, slice(None)) for axis in self.axes)] += 1.0
        return {**inputs, self.source: latents}


def make(name: str, case: Case) -> Any:
    """Build a case's model; every weight is drawn anew, as many classes start with zeros.

    Skips the test where this version of diffusers does not have the class.
    """
    cls = newer(name.split("/", maxsplit=1)[0])
    model = cls(**case.config).eval()
    draw = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.normal_(0.0, spread, generator=draw)
            if weight.ndim == 1 and path.endswith("weight"):
                weight.add_(1.0)
    return model


def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Run one pass, and give what it predicts for the video as one tensor."""
    with torch.no_grad():
        output = model(**inputs)
    sample = output.sample if hasattr(output, "sample") else output[0]
    return torch.stack(sample) if isinstance(sample, list) else sample


def per_sample(*shape: int, seed: int = 0) -> Callable[[int], torch.Tensor]:
    """Draw a tensor for each sample, the first sample's always the same."""

    def draw(batch: int) -> torch.Tensor:
        return torch.cat([normal(1, *shape, seed=seed + 100 * i) for i in range(batch)])

    return draw


def mask(valid: tuple[int, int], length: int) -> Callable[[int], torch.Tensor]:
    """Make a prompt's mask, int ``[batch, length]``: so many valid tokens in each sample."""

    def draw(batch: int) -> torch.Tensor:
        return torch.stack([(torch.arange(length) < valid[i]).long() for i in range(batch)])

    return draw


def time(batch: int) -> torch.Tensor:
    """Make timesteps."""
    return torch.full((batch,), 500.0)


def ids(grid: tuple[int, int, int], columns: int = 3, corner: int = 0) -> torch.Tensor:
    """Make positions (0, row, column, ...) of one picture, the first at ``corner``."""
    made = torch.zeros(grid[1], grid[2], columns)
    made[..., 1] += torch.arange(grid[1])[:, None] + corner
    made[..., 2] += torch.arange(grid[2]) + corner
    return made.flatten(0, 1)


def arguments(**parts: Any) -> Callable[[int], dict[str, Any]]:
    """Make ``inputs`` of a case: what can be called is called with the batch size."""

    def inputs(batch: int) -> dict[str, Any]:
        return {key: each(batch) if callable(each) else each for key, each in parts.items()}

    return inputs
