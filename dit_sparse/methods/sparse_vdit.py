# SPDX-License-Identifier: Apache-2.0
"""Sparse-vDiT's five patterns, one for each head, and all heads of a layer in one launch.

Source: Chen et al. 2025, "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate
Video Diffusion Transformers", arXiv:2506.03065, of which no code exists. Static: what a pattern
keeps depends on the geometry alone. Which head gets which is the profiler's to find.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.lists import MAX_ENTRIES, check_block_size, check_count, check_share
from dit_sparse.methods.order import patch_major

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params

Pattern = Literal["full", "skip", "diagonal", "multi_diagonal", "vertical_stripe"]
Spans = tuple[tuple[float, float], ...]

PATTERNS: tuple[Pattern, ...] = ("full", "skip", "diagonal", "multi_diagonal", "vertical_stripe")
_SLACK = 1e-9  # (1 - sqrt(0.64)) * 10 is 1.9999999999999996 in binary


class _Table(NamedTuple):
    """The lists of all five patterns on one grid, text included.

    Args:
        indices: Kept key blocks, int32 ``[patterns, blocks, blocks]``.
        counts: How many, int32 ``[patterns, blocks]``.
        orders: The model's own and the patch-major one, int64 ``[2, tokens]``.
        caps: Largest count of each pattern, at least 1.
        complete: Whether a pattern keeps everything here.
    """

    indices: Tensor
    counts: Tensor
    orders: Tensor
    caps: tuple[int, ...]
    complete: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SparseVDiT(Method):
    """Keep the blocks of one fixed pattern in each head.

    - "full": everything.
    - "diagonal": a band |q - k| <= width around each token in frame-major order (the model's own):
      neighbours in the same and in near frames.
    - "multi_diagonal": the same band in patch-major order, where all frames of one place follow
      each other: nearly the same place in every frame. In an image, rows stand for frames.
    - "vertical_stripe": the same key columns for all queries.
    - "skip": nothing of the video.

    The paper gives no widths, no stripes and no treatment of text, so these are ours. The width
    of a band follows from the share of pairs that it is to keep, as in SVG, which the paper builds
    on: n tokens and width w keep 1 - (1 - w / n)^2. Stripes stand where they are told to. A block
    pair is kept whole where the pattern keeps any token pair in it, so nothing that the pattern
    keeps is lost; the plan's density is what is really computed (the paper's S is 1 - density).

    Text queries and text keys are exact in every head, of padding nothing is kept. So the video
    queries of a skipped head read the text alone where there is text in the sequence, and their
    output is zero, as the paper has it, where there is none (or none that is not padding).

    Args:
        patterns: "full", "diagonal", "multi_diagonal", "vertical_stripe" or "skip" for all heads,
            or a list of these by the model's number of the head; heads beyond the end of a short
            list are full.
        diagonal_density: Share of the video's pairs in the diagonal band, in (0, 1]. Higher is
            closer to dense and slower. SVG has 0.2 to 0.3.
        multi_diagonal_density: The same for the multi-diagonal band.
        stripes: Stripes as [start, stop) fractions of the video in frame-major order, so [0.0,
            0.25] is the first quarter of the frames. Each holds at least one token.
        frame_stripes: Stripes as [start, stop) fractions of a frame, in raster order, the same in
            every frame. Kept beside ``stripes``.
        block_size: Tokens in a block, 1 to 1024; kernels are fastest at 128 and 64.
    """

    summary: ClassVar[str] = (
        "static: one of five patterns per head, from full to skip (Sparse-vDiT, 2506.03065)"
    )
    static: ClassVar[bool] = True
    everything: ClassVar[Params] = {"patterns": "full"}
    example: ClassVar[Params] = {"patterns": ["multi_diagonal", "skip"], "block_size": 8}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "default": ("patterns=diagonal", "patterns=multi_diagonal"),
        "quick": ("patterns=diagonal", "patterns=multi_diagonal"),
        "sparse-vdit": tuple(f"patterns={pattern}" for pattern in PATTERNS),
    }
    stays: ClassVar[str] = "band densities are fractions of pairs, and stripes are fractions of "
    "the video"

    patterns: Pattern | tuple[Pattern, ...] = "diagonal"
    diagonal_density: float = 0.25
    multi_diagonal_density: float = 0.25
    stripes: Spans = ((0.0, 0.25),)
    frame_stripes: Spans = ()
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("patterns", "stripes", "frame_stripes"):
            value = getattr(self, name)
            if not isinstance(value, str):
                check_count(f"{name}: its length", len(value), (0, MAX_ENTRIES), 1)
        named = self.patterns if isinstance(self.patterns, tuple) else (self.patterns,)
        wrong = sorted(set(named).difference(PATTERNS))
        if wrong or not named:
            raise StrategyError(
                f"patterns must be one of, or a list of, {', '.join(PATTERNS)}; got "
                + (f"{wrong[0]!r:.80}" if wrong else "[]")
            )
        check_share("diagonal_density", self.diagonal_density, zero=False, hint=0.25)
        check_share("multi_diagonal_density", self.multi_diagonal_density, zero=False, hint=0.25)
        both: dict[str, tuple[tuple[float, ...], ...]]
        both = {"stripes": self.stripes, "frame_stripes": self.frame_stripes}
        for name, spans in both.items():
            for span in spans:
                if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
                    raise StrategyError(
                        f"{name} must contain pairs [start, stop) of fractions, 0 <= start < "
                        f"stop <= 1, got {list(span)}; the first quarter is [0.0, 0.25]"
                    )
        if "vertical_stripe" in named and not self.stripes and not self.frame_stripes:
            raise StrategyError(
                "vertical_stripe requires stripes or frame_stripes, but both are empty; to keep "
                "no video tokens, use the pattern 'skip'"
            )
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:  # noqa: ARG003
        """Set both bands."""
        return {"diagonal_density": density, "multi_diagonal_density": density}

    @classmethod
    def choices(cls, params: Params) -> list[tuple[Params, bool]]:
        """Try each pattern; a band given alone is tried at several densities."""
        if not params:
            return [one for pattern in PATTERNS for one in cls.choices({"patterns": pattern})]
        return [(params, params in ({"patterns": "diagonal"}, {"patterns": "multi_diagonal"}))]

    @property
    def keeps_all(self) -> bool:
        """Whether all heads have the full pattern."""
        return self.patterns == "full"

    @property
    def asked_density(self) -> float | None:
        """Known for "full" and "skip"; that of the others follows from the grid."""
        return {"full": 1.0, "skip": 0.0}.get(str(self.patterns))

    @property
    def names_heads(self) -> bool:
        """Whether patterns are listed head by head."""
        return isinstance(self.patterns, tuple)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:  # noqa: ARG002
        """Join each head's pattern into one plan; leave padded text keys out."""
        grid, device = call.grid, call.query.device
        q, kv = call.layout(self.block_size), call.key_layout(self.block_size)
        numbers = call.heads or tuple(range(call.query.shape[2]))
        heads = self.of_heads(numbers)
        # Layers differ in who has which pattern, not in what a pattern is: that is shared.
        alike = replace(self, patterns="full")
        table = call.once((alike, grid, device), lambda: self._table(grid, device))
        rows = [PATTERNS.index(name) for name in heads]
        if all(table.complete[row] for row in rows):
            return BlockPlan.full(q, kv)
        if len(set(rows)) == 1:
            rows = rows[:1]  # one list for all of them
        at = call.once(
            ("sparse_vdit", tuple(rows), device), lambda: torch.tensor(rows, device=device)
        )
        cap = max(table.caps[row] for row in rows)
        order = None
        if "multi_diagonal" in heads:
            order = table.orders[(at == PATTERNS.index("multi_diagonal")).long()][None]
        return BlockPlan(
            q,
            kv,
            table.indices[at, :, :cap][None],
            table.counts[at][None],
            q_permutation=order,
            kv_permutation=order,
        )

    def of_heads(self, heads: tuple[int, ...]) -> tuple[Pattern, ...]:
        """Name the pattern of each of the model's heads."""
        if isinstance(self.patterns, str):
            return (self.patterns,) * len(heads)
        named = self.patterns
        return tuple(named[head] if head < len(named) else "full" for head in heads)

    def kept(self, grid: LatentsGrid, pattern: Pattern) -> Tensor:
        """Mark the block pairs of the video that a pattern keeps: bool ``[blocks, blocks]``.

        Blocks of the multi-diagonal pattern are cut from the patch-major order.
        """
        tokens, size = grid.video_tokens, self.block_size
        first = torch.arange(0, tokens, size)
        last = (first + size).clamp(max=tokens) - 1
        if pattern in {"full", "skip"}:
            return torch.full((len(first), len(first)), pattern == "full")
        if pattern == "vertical_stripe":
            column = torch.zeros(tokens, dtype=torch.bool)
            for start, stop in _tokens(self.stripes, tokens):
                column[start:stop] = True
            for start, stop in _tokens(self.frame_stripes, grid.frame_tokens):
                column.view(grid.frames, -1)[:, start:stop] = True
            block = torch.arange(tokens) // size
            touched = torch.zeros(len(first), dtype=torch.bool).index_fill_(0, block[column], True)
            return touched.expand(len(first), -1)
        share = self.diagonal_density if pattern == "diagonal" else self.multi_diagonal_density
        width = floor((1 - sqrt(1 - share)) * tokens + _SLACK)
        gap = torch.maximum(first - last[:, None], first[:, None] - last)
        return gap <= width

    def _table(self, grid: LatentsGrid, device: torch.device) -> _Table:
        is_text = grid.text_blocks(self.block_size)
        mask = (is_text[:, None] | is_text).repeat(len(PATTERNS), 1, 1)
        video = ~is_text
        pairs = video[:, None] & video
        for i_pattern, pattern in enumerate(PATTERNS):
            mask[i_pattern, pairs] = self.kept(grid, pattern).flatten()
        layout = grid.layout(self.block_size)
        lists = BlockPlan.from_block_mask(mask[None], layout, layout)
        orders = torch.stack([torch.arange(grid.tokens), patch_major(grid)[0, 0]])
        return _Table(
            lists.kv_indices[0].to(device),
            lists.kv_num_blocks[0].to(device),
            orders.to(device),
            tuple(max(1, cap) for cap in lists.kv_num_blocks[0].amax(-1).tolist()),
            tuple(mask.flatten(1).all(-1).tolist()),
        )


def _tokens(spans: Spans, tokens: int) -> list[tuple[int, int]]:
    """Round [start, stop) fractions half up to tokens; each holds at least one."""
    found = []
    for start, stop in spans:
        first = min(floor(start * tokens + 0.5 + _SLACK), tokens - 1)
        found.append((first, max(floor(stop * tokens + 0.5 + _SLACK), first + 1)))
    return found
