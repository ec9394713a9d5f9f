# SPDX-License-Identifier: Apache-2.0
"""How to call a transformer without data: the other direction of ``readers``.

A row's ``example`` makes the forward arguments of one sample at a size. Almost every argument is
a tensor of a shape that can be said in words, so a row says it in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.pipelines.family import empty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Part = str | Callable[[Any, "Asked"], Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: sizes of the latents before they become tokens, and text tokens.

    Args:
        t: Frames.
        h: Rows.
        w: Columns.
        text: Tokens of the prompt.
        pack: Rows and columns that the pipeline packs into a token before it calls the model.
    """

    t: int
    h: int
    w: int
    text: int
    pack: int = 1

    @property
    def rows(self) -> int:
        """Rows of packed tokens."""
        return self.h // self.pack

    @property
    def columns(self) -> int:
        """Columns of packed tokens."""
        return self.w // self.pack

    @property
    def tokens(self) -> int:
        """All packed tokens."""
        return self.t * self.rows * self.columns

    def sizes(self, config: Any, words: str) -> list[int] | None:
        """Read a shape: numbers, names of what is asked for, keys of the config.

        A last word ``?key`` says that the argument is there only where the config has that key
        and it is neither None, False nor 0; otherwise the result is None.
        """
        found = words.split()
        if found[-1].startswith("?") and not getattr(config, found.pop()[1:], None):
            return None
        return [self._size(config, word) for word in found]

    def _size(self, config: Any, word: str) -> int:
        if word.isdecimal():
            return int(word)
        held = self if word in {"t", "h", "w", "text", "rows", "columns", "tokens"} else config
        return int(getattr(held, word))


@dataclass(frozen=True)
class Example:
    """Makes forward arguments.

    Args:
        parts: By name of the argument: the shape of a tensor without data in the words that
            ``Asked.sizes`` reads, or what makes the argument of ``(config, asked)``. One that
            comes out as None is left out.
        pack: As in ``Asked``.
    """

    parts: Mapping[str, Part]
    pack: int = 1

    def __call__(self, config: Any, t: int, h: int, w: int, text: int) -> dict[str, Any]:
        """Make the arguments of one sample."""
        asked = Asked(t, h, w, text, self.pack)
        made = {}
        for name, part in self.parts.items():
            value = _empty(config, asked, part) if isinstance(part, str) else part(config, asked)
            if value is not None:
                made[name] = value
        return made


def _empty(config: Any, asked: Asked, words: str) -> torch.Tensor | None:
    sizes = asked.sizes(config, words)
    return None if sizes is None else empty(*sizes)


@dataclass(frozen=True)
class Full:
    """Makes a tensor with data, all the same: a mask of ones, which hides nothing."""

    words: str
    value: float = 1

    def __call__(self, config: Any, asked: Asked) -> torch.Tensor | None:
        """Make it."""
        sizes = asked.sizes(config, self.words)
        return None if sizes is None else torch.full(sizes, self.value)


@dataclass(frozen=True)
class Positions:
    """Makes (0, row, column, 0...) of each packed token, with data.

    Args:
        axes: Columns.
        joint: The text's stand before them, all 0.
    """

    axes: int = 3
    joint: bool = False

    def __call__(self, config: Any, asked: Asked) -> torch.Tensor:  # noqa: ARG002
        """Make it."""
        ids = torch.zeros(asked.rows, asked.columns, self.axes)
        ids[..., 1] += torch.arange(asked.rows)[:, None]
        ids[..., 2] += torch.arange(asked.columns)
        text = torch.zeros(asked.text if self.joint else 0, self.axes)
        return torch.cat([text, ids.flatten(0, 1)])


VIDEO_LATENTS = "1 in_channels t h w"
PICTURE_LATENTS = "1 in_channels h w"
PACKED_LATENTS = "1 tokens in_channels"
PROMPT_MASK = Full("1 text")

# The prompt by cross-attention, and a picture's where there is one: Wan and its relatives.
WAN_PARTS: dict[str, Part] = {
    "hidden_states": VIDEO_LATENTS,
    "timestep": "1",
    "encoder_hidden_states": "1 text text_dim",
    "encoder_hidden_states_image": "1 257 image_dim ?image_dim",
}
# Two by two latent pixels in a token, and positions: FLUX and its relatives.
FLUX_PARTS: dict[str, Part] = {
    "hidden_states": PACKED_LATENTS,
    "encoder_hidden_states": "1 text joint_attention_dim",
    "timestep": "1",
    "img_ids": Positions(),
    "txt_ids": "text 3",
}
# Sizes of the picture, as CogView is told them.
COGVIEW_PARTS: dict[str, Part] = {
    "hidden_states": PICTURE_LATENTS,
    "encoder_hidden_states": "1 text text_embed_dim",
    "timestep": "1",
    "original_size": "1 2",
    "target_size": "1 2",
    "crop_coords": "1 2",
}
