# SPDX-License-Identifier: Apache-2.0
"""Radial's token rule, and its rounding to blocks by interval arithmetic.

A *unit* is a frame of a video or a row of an image; ``length`` its tokens. Two tokens at offsets
k and l of two units that stand ``distance`` apart see each other where |k - l| is at most the half
width of that distance. No tensor here has an axis of tokens.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

DROPPED = -1  # half width of a distance at which nothing is kept
_CHUNK = 1 << 19  # piece pairs at a time: about 30 MB of intermediates


def paper_half_widths(units: int, length: int, factor: float) -> Tensor:
    """Give the half width at each distance 0 ... units - 1 by the paper's formula.

    With r = floor(log2(max(distance, 1))) and width = factor * length / 2^r: distance 0 and 1 keep
    all; a width of at least 1 keeps |k - l| + 1 <= width; below it only k = l stays, at distances
    divisible by ceil(1 / width). Factor 1 is arXiv:2506.19852.
    """
    found = []
    for distance in range(units):
        power = 1 << max(distance.bit_length() - 1, 0)  # 2^r
        width = factor * length / power
        if distance <= 1:
            found.append(length - 1)
        elif width >= 1:
            found.append(int(min(width, length)) - 1)
        else:
            # Compared before rounding: a tiny factor makes the quotient infinite.
            every = ceil(min(power / (factor * length), distance + 1))
            found.append(DROPPED if distance % every else 0)
    return torch.tensor(found, dtype=torch.int32)


def released_half_widths(
    units: int, length: int, factor: float, floor: int, decimate_below: int
) -> Tensor:
    """Give the half width at each distance 0 ... units - 1 as the authors' code has it.

    With bits(n) the length of n in binary and base = 2^(bits(length) - bits(distance)): distance 0
    and 1 keep all; beyond, |k - l| <= max(factor * base, floor), but where base is below
    ``decimate_below`` only at distances divisible by int(decimate_below / base).
    """
    found = []
    for distance in range(units):
        base = 2.0 ** (length.bit_length() - distance.bit_length())
        if distance <= 1:
            found.append(length - 1)
        elif base < decimate_below and distance % int(decimate_below / base):
            found.append(DROPPED)
        else:
            found.append(int(min(max(factor * base, floor), length - 1)))
    return torch.tensor(found, dtype=torch.int32)


def round_to_blocks(
    units: int, length: int, block_size: int, half_widths: Tensor, *, majority: bool, sink: bool
) -> Tensor:
    """Mark the block pairs that the token rule keeps: bool ``[blocks, blocks]``.

    Blocks cut ``units * length`` tokens every ``block_size``; units need not be aligned to them.
    A *piece* is what a block has of one unit; a block pair is kept where a pair of its pieces is.

    Args:
        units: Frames (or rows).
        length: Tokens of each.
        block_size: Tokens of a block.
        half_widths: By distance, ``DROPPED`` where nothing is kept.
        majority: A piece pair is kept where the rule keeps any token pair in it (False), or where
            more than 60 % of its columns that are kept at all are kept in more than a third of
            its rows (True; the released code's rule, which counts a third of the whole block's
            rows and so loses links at the edges of frames that are not aligned to blocks).
        sink: Keep all of unit 0's keys.
    """
    tokens = units * length
    starts = torch.cat([torch.arange(0, tokens, block_size), torch.arange(0, tokens, length)])
    starts = starts.unique()
    ends = torch.cat([starts[1:], starts.new_tensor([tokens])])
    block, unit = starts // block_size, starts // length
    first = (starts - unit * length).int()  # first and last offset of each piece in its unit
    last = (ends - 1 - unit * length).int()
    blocks = -(-tokens // block_size)
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    step = max(1, _CHUNK // starts.numel())
    for rows in torch.arange(starts.numel()).split(step):
        width = half_widths[(unit[rows, None] - unit).abs()]  # [rows, pieces]
        test = _majority if majority else _any
        kept = test(first[rows, None], last[rows, None], first, last, width)
        kept &= width != DROPPED
        if sink:
            kept |= unit == 0
        i_row, i_column = kept.nonzero(as_tuple=True)
        mask[block[rows][i_row], block[i_column]] = True
    return mask


def _any(
    q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor, width: Tensor
) -> Tensor:
    """Whether the nearest two tokens of the pieces are near enough."""
    return torch.maximum(k_first - q_last, q_first - k_last) <= width


def _majority(
    q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor, width: Tensor
) -> Tensor:
    """Whether > 60 % of the columns kept at all are kept in more than a third of the rows.

    A column l is kept in at least n rows where l lies in
    [q_first + n - 1 - width, q_last - n + 1 + width] and 2 * width + 1 >= n.
    """
    third = (q_last - q_first + 1) // 3 + 1  # the least count above a third of the rows

    def columns(rows: Tensor | int) -> Tensor:
        low = torch.maximum(k_first, q_first + rows - 1 - width)
        high = torch.minimum(k_last, q_last - rows + 1 + width)
        return (high - low + 1).clamp_(min=0) * (2 * width + 1 >= rows)

    good = columns(third)
    return 5 * good > 3 * columns(1)  # no column at all: 0 > 0 is False


def round_to_tiles(
    rows: list[tuple[int, int]], columns: list[tuple[int, int]], half_widths: Tensor
) -> Tensor:
    """Mark the pairs of 2-D tiles in which the token rule keeps any pair: bool ``[tiles, tiles]``.

    Args:
        rows: First and last row of each row of tiles.
        columns: First and last column of each column of tiles.
        half_widths: By row distance, ``DROPPED`` where nothing is kept.
    """
    first, last = torch.tensor(rows).unbind(1)
    near = torch.maximum(first[:, None] - last, first - last[:, None]).clamp_(min=0)
    far = torch.maximum(last[:, None] - first, last - first[:, None])
    # The widest window among the row distances between two rows of tiles.
    widest = torch.tensor(
        [
            [int(half_widths[low : high + 1].max()) for low, high in zip(*pair, strict=True)]
            for pair in zip(near.tolist(), far.tolist(), strict=True)
        ]
    )
    left, right = torch.tensor(columns).unbind(1)
    gap = torch.maximum(left[:, None] - right, left - right[:, None]).clamp_(min=0)
    kept = (gap[None, :, None, :] <= widest[:, None, :, None]) & (widest != DROPPED)[
        :, None, :, None
    ]
    return kept.flatten(2).flatten(0, 1)
