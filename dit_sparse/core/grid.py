# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand: the latents grid of one attention call and blocks of tokens on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.errors import GeometryError

MAX_TOKENS = 4_000_000  # of a strategy's or a picture's grid: 50 times a 720p video of 5 seconds
MAX_BLOCKS = 10_000  # along one side: 640,000 tokens in blocks of 64
_PAIR_BYTES = 24  # a block pair while a plan is packed: its mask, its place in a list, the list


def check_blocks(blocks: int, cut_by: str, grid: LatentsGrid) -> None:
    """Refuse more blocks than any plan needs, before memory for their pairs is asked for.

    Args:
        blocks: Blocks along one side.
        cut_by: The params that cut the grid so, for people.
        grid: What is cut.
    """
    if blocks > MAX_BLOCKS:
        raise GeometryError(
            f"{cut_by} cuts {grid} tokens into {blocks:,} blocks; a plan of all block pairs would "
            f"need about {_PAIR_BYTES * blocks**2 / 2**30:,.0f} GiB, and the maximum is "
            f"{MAX_BLOCKS:,} blocks; use larger blocks or a smaller grid"
        )


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Blocks of consecutive slots along one side (query or key) of an attention call.

    Blocks never overlap; their lengths may differ, and may be 0. A slot that no block covers
    takes no part. The leading dimensions are 1 where all samples or heads share the layout.

    Args:
        starts: First slot of each block, int32 ``[batch|1, heads|1, blocks]``.
        lengths: Slots in each block, int32, same shape, each in ``[0, max_length]``.
        slots: Length of the sequence that the blocks cut, in slots.
        max_length: No block is longer; a Python int, so that a kernel needs no device read.
        spread: Starts are ``0, max_length, 2 * max_length, ...`` for every sample and head.
    """

    starts: Tensor
    lengths: Tensor
    slots: int
    max_length: int
    spread: bool = False

    def __post_init__(self) -> None:
        """Check shapes and dtypes; never reads device memory."""
        if self.starts.shape != self.lengths.shape or self.starts.ndim != 3:
            raise GeometryError(
                "block starts and lengths must both be [batch|1, heads|1, blocks], got "
                f"{tuple(self.starts.shape)} and {tuple(self.lengths.shape)}"
            )
        if self.starts.dtype != torch.int32 or self.lengths.dtype != torch.int32:
            raise GeometryError(
                f"block starts and lengths must be int32, got {self.starts.dtype} and "
                f"{self.lengths.dtype}; call .int() on them"
            )
        if self.max_length < 1 or self.slots < 1:
            raise GeometryError(
                f"slots and max_length must be at least 1, got {self.slots}, {self.max_length}"
            )

    @classmethod
    def from_lengths(
        cls, lengths: list[int], device: torch.device | str | None = None
    ) -> BlockLayout:
        """Lay blocks of the given lengths (each >= 1) one after the other from slot 0."""
        if not lengths or min(lengths) < 1:
            raise GeometryError(f"block lengths must be at least 1, got {lengths}")
        length = torch.tensor(lengths, dtype=torch.int32)
        start = torch.cumsum(length, 0, dtype=torch.int32) - length
        longest = max(lengths)
        return cls(
            start[None, None].to(device),
            length[None, None].to(device),
            slots=sum(lengths),
            max_length=longest,
            spread=all(value == longest for value in lengths[:-1]),
        )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.starts.shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of the index tensors."""
        return self.starts.device

    def to(self, device: torch.device | str) -> BlockLayout:
        """Move the index tensors to ``device``."""
        if self.starts.device == torch.device(device):
            return self
        return BlockLayout(
            self.starts.to(device),
            self.lengths.to(device),
            self.slots,
            self.max_length,
            self.spread,
        )


@dataclass(frozen=True, slots=True)
class LatentsGrid:
    """The token grid of one self-attention call: video (or image) tokens and text tokens.

    Video tokens stand in raster order: frame by frame, row by row (an image is one frame).

    Args:
        frames: Latent frames after patchify, >= 1.
        height: Token rows per frame, >= 1.
        width: Tokens per row, >= 1.
        text_length: Text tokens in the same sequence, padding included, >= 0.
        text_first: Whether the text stands before the video (CogVideoX, FLUX).
    """

    frames: int
    height: int
    width: int
    text_length: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.frames, self.height, self.width) < 1 or self.text_length < 0:
            raise GeometryError(
                "a latents grid needs frames, height, width >= 1 and text_length >= 0, got "
                f"{self.frames} x {self.height} x {self.width} + {self.text_length}"
            )

    def __str__(self) -> str:
        """Render as ``frames x height x width + text``."""
        text = f" + {self.text_length} text" if self.text_length else ""
        return f"{self.frames} x {self.height} x {self.width}{text}"

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """Tokens of all frames."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        return self.video_tokens + self.text_length

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.text_length if self.text_first else 0

    @property
    def text_start(self) -> int:
        """Position of the first text token (meaningless where there is no text)."""
        return 0 if self.text_first else self.video_tokens

    def block_lengths(self, block_size: int) -> tuple[list[int], list[int]]:
        """Cut video and text into blocks of ``block_size`` tokens that never mix the two.

        Returns:
            Lengths of the video blocks and of the text blocks, each in token order; the last of
            each may be shorter.
        """
        return cut(self.video_tokens, block_size), cut(self.text_length, block_size)

    def check_blocks(self, block_size: int) -> None:
        """Raise ``GeometryError`` where blocks of this size are too many to plan."""
        if block_size < 1:
            raise GeometryError(f"block_size must be at least 1, got {block_size}")
        blocks = sum(-(-part // block_size) for part in (self.video_tokens, self.text_length))
        check_blocks(blocks, f"block_size {block_size}", self)

    def layout(
        self,
        block_size: int,
        device: torch.device | str | None = None,
        text_valid: Tensor | None = None,
    ) -> BlockLayout:
        """Lay uniform blocks over the sequence in its own token order, text and video apart.

        Args:
            block_size: Tokens in a block, >= 1; the last of video and of text may be shorter.
            device: Where the layout's tensors live.
            text_valid: Text tokens that are not padding, int ``[batch]``; padding stands at the
                end of the text and is left out of the blocks. None: all are valid.
        """
        self.check_blocks(block_size)
        video, text = self.block_lengths(block_size)
        lengths = text + video if self.text_first else video + text
        layout = BlockLayout.from_lengths(lengths, device)
        if text_valid is None or not text:
            return layout
        room = text_valid.to(layout.device, torch.int32)[:, None, None] + (
            self.text_start - layout.starts
        )
        cut_short = torch.minimum(layout.lengths, room.clamp(min=0))
        limited = torch.where(self.text_blocks(block_size, device), cut_short, layout.lengths)
        return BlockLayout(
            layout.starts.expand_as(limited),
            limited,
            layout.slots,
            layout.max_length,
            layout.spread,
        )

    def text_blocks(self, block_size: int, device: torch.device | str | None = None) -> Tensor:
        """Mark which blocks of ``layout(block_size)`` hold text: bool ``[blocks]``."""
        self.check_blocks(block_size)
        video, text = self.block_lengths(block_size)
        mark = [False] * len(video)
        marks = [True] * len(text) + mark if self.text_first else mark + [True] * len(text)
        return torch.tensor(marks, dtype=torch.bool, device=device)


def cut(tokens: int, block_size: int) -> list[int]:
    """Cut ``tokens`` into runs of ``block_size``; the last run holds what is left."""
    if block_size < 1:
        raise GeometryError(f"block_size must be at least 1, got {block_size}")
    full, rest = divmod(tokens, block_size)
    return [block_size] * full + ([rest] if rest else [])
