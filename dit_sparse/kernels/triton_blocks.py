# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel does with a plan: find its tile, walk a block list, load rows.

A kernel gets one side of a plan as a ``Side``, its lists as ``Lists``, and a tensor of tokens as
``Rows``; ``triton_launch.py`` makes them. The rest are device functions. A *tile* here is the part
of a block that one program owns or reads in one iteration; blocks of any length are cut into
tiles. Offsets of one (sample, head) are int64, and a shared dimension has stride 0.

Strides are fields beside the tensors, not a tuple of their own: Triton 3.6 forgets constants (a
stride of 1) in a tuple within a tuple.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor of tokens, ``[batch, seq, heads, head_dim]``, and its four strides."""

    data: Any
    batch: Any
    seq: Any
    head: Any
    dim: Any


class Side(NamedTuple):
    """One side of a plan; ``_batch`` and ``_head`` are strides.

    Args:
        starts: First slot of every block, or None: block ``i`` starts at ``i * longest``.
        lengths: Slots of every block.
        permutation: Token of every slot, or None: slots are tokens.
        weight: Log weight of every slot, or None.
        tiles: (block, part) of every tile, or None: every block has ``parts`` tiles.
        blocks: How many blocks.
        longest: Slots of the longest one.
        parts: Tiles that the longest one takes.
    """

    starts: Any
    lengths: Any
    permutation: Any
    weight: Any
    tiles: Any
    blocks: Any
    longest: Any
    parts: Any
    starts_batch: Any
    starts_head: Any
    lengths_batch: Any
    lengths_head: Any
    permutation_batch: Any
    permutation_head: Any
    weight_batch: Any
    weight_head: Any
    tiles_batch: Any
    tiles_head: Any


class Lists(NamedTuple):
    """Which blocks of the other side each block reads; ``_batch``, ``_head``, ``_block``: strides.

    Args:
        counts: ``[batch|1, heads|1, blocks]``.
        indices: ``[batch|1, heads|1, blocks, cap]``, ascending.
        partial: Bit tile of every entry, -1 = none, or None.
        bits: The bit tiles, ``[count, q_longest, words]``, or None.
    """

    counts: Any
    indices: Any
    partial: Any
    bits: Any
    counts_batch: Any
    counts_head: Any
    counts_block: Any
    indices_batch: Any
    indices_head: Any
    indices_block: Any
    partial_batch: Any
    partial_head: Any
    partial_block: Any


@triton.jit
def side_offsets(side, i_batch, i_head):
    """Return where one (sample, head) starts in starts, lengths, permutation and weight."""
    at_starts = i_batch * side.starts_batch + i_head * side.starts_head
    at_lengths = i_batch * side.lengths_batch + i_head * side.lengths_head
    at_permutation = i_batch * side.permutation_batch + i_head * side.permutation_head
    at_weight = i_batch * side.weight_batch + i_head * side.weight_head
    return at_starts, at_lengths, at_permutation, at_weight


@triton.jit
def block_span(side, at, i_block):
    """Return first slot and length of a block."""
    length = tl.load(side.lengths + at[1] + i_block)
    if side.starts is None:
        return i_block * side.longest, length
    else:
        return tl.load(side.starts + at[0] + i_block), length


@triton.jit
def own_rows(side, at, i_batch, i_head, BLOCK: tl.constexpr):
    """Find the tile that this program owns.

    Returns:
        The block, its first slot, its length, and the tile's first row in it: none is there where
        that is not below the length.
    """
    i_tile = tl.program_id(0)
    if side.tiles is None:
        i_block = i_tile // side.parts
        start, length = block_span(side, at, i_block)
        return i_block, start, length, i_tile % side.parts * BLOCK
    else:
        p_tile = side.tiles + i_batch * side.tiles_batch + i_head * side.tiles_head + i_tile * 2
        i_found = tl.load(p_tile)
        i_block = tl.minimum(i_found, side.blocks - 1)  # behind the last tile: no block
        start, length = block_span(side, at, i_block)
        length = tl.where(i_found < side.blocks, length, 0)
        return i_block, start, length, tl.load(p_tile + 1) * BLOCK


@triton.jit
def own_list(lists, i_batch, i_head, i_block):
    """Return the count of a block's list, a pointer to it, and where its bit tiles are named."""
    i_row = i_block.to(tl.int64)
    at_count = i_batch * lists.counts_batch + i_head * lists.counts_head
    at_list = i_batch * lists.indices_batch + i_head * lists.indices_head
    at_partial = i_batch * lists.partial_batch + i_head * lists.partial_head
    return (
        tl.load(lists.counts + at_count + i_row * lists.counts_block),
        lists.indices + at_list + i_row * lists.indices_block,
        at_partial + i_row * lists.partial_block,
    )


@triton.jit
def walk_total(side, at, p_list, count, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Count the tiles of all listed blocks; a block of length 0 still takes one.

    ``CHUNKS`` is the number of tiles of every block, or 0 where it follows from its length.
    """
    if CHUNKS > 0:
        return count * CHUNKS
    else:
        total = tl.zeros([128], tl.int32)
        for first in range(0, count, 128):
            i_entry = first + tl.arange(0, 128)
            m_entry = i_entry < count
            i_block = tl.load(p_list + i_entry, mask=m_entry, other=0)
            length = tl.load(side.lengths + at[1] + i_block, mask=m_entry, other=0)
            tiles = tl.maximum((length + BLOCK - 1) // BLOCK, 1)
            total += tl.where(m_entry, tiles, 0)
        return tl.sum(total, 0)


@triton.jit
def whole_run(side, at, p_list, count, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Find the entries around the middle of a list whose blocks all are ``CHUNKS`` whole tiles.

    Short blocks are at the ends of most lists: the text before or after the video, and its tail.

    Returns:
        The first entry of the run, and the first one behind it.
    """
    begin = tl.zeros([128], tl.int32)
    end = tl.zeros([128], tl.int32) + count
    for first in range(0, count, 128):
        i_entry = first + tl.arange(0, 128)
        i_block = tl.load(p_list + i_entry, mask=i_entry < count, other=0)
        short = tl.load(side.lengths + at[1] + i_block) != CHUNKS * BLOCK
        begin = tl.where(short & (i_entry < count // 2), i_entry + 1, begin)
        end = tl.where(short & (i_entry >= count // 2), tl.minimum(end, i_entry), end)
    return tl.max(begin, 0), tl.min(end, 0)


@triton.jit
def listed(p_list, count, i_entry, gap, gap_size):
    """Load the block of an entry, 0 behind the end; entries from ``gap`` on are left out."""
    i_entry += tl.where(i_entry >= gap, gap_size, 0)
    return tl.load(p_list + i_entry, mask=i_entry < count, other=0)


@triton.jit
def walk_first(side, at, p_list, count, gap, gap_size):
    """Return (start, length) of the first listed block and the number of the second one."""
    start, length = block_span(side, at, listed(p_list, count, 0, gap, gap_size))
    return start, length, listed(p_list, count, 1, gap, gap_size)


@triton.jit
def walk_next(
    side,
    at,
    p_list,
    count,
    i_entry,
    done,
    start,
    length,
    ahead,
    gap,
    gap_size,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Step to the next tile of the walk.

    The number of the block after next is loaded here, one block early, so that the address of a
    tile never waits for a load of the same iteration and the tile loads can be pipelined.

    Returns:
        The new ``i_entry, done, start, length, ahead``.
    """
    start_ahead, length_ahead = block_span(side, at, ahead)
    ahead_next = listed(p_list, count, i_entry + 2, gap, gap_size)
    if CHUNKS == 1:
        return i_entry + 1, done, start_ahead, length_ahead, ahead_next
    else:
        done += BLOCK
        turn = done >= CHUNKS * BLOCK if CHUNKS > 1 else done >= length
        return (
            tl.where(turn, i_entry + 1, i_entry),
            tl.where(turn, 0, done),
            tl.where(turn, start_ahead, start),
            tl.where(turn, length_ahead, length),
            tl.where(turn, ahead_next, ahead),
        )


@triton.jit
def row_tokens(side, at, start, rows, m_rows):
    """Return the token of each slot ``start + rows``: int64 ``[ROWS]``, 0 where masked."""
    if side.permutation is None:
        return start.to(tl.int64) + rows
    else:
        return tl.load(side.permutation + at[2] + start + rows, mask=m_rows, other=0)


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """Tell the compiler that ``offset`` is a multiple of ``ALIGN``; the launcher has checked.

    It finds out by itself for multiples of 16 only; a head_dim of 72 or 24 would be read in words.
    """
    if ALIGN > 1:
        return offset // ALIGN * ALIGN
    else:
        return offset


@triton.jit
def head_rows(rows, i_batch, i_head, ALIGN: tl.constexpr):
    """Point at the rows of one (sample, head)."""
    return rows.data + aligned(i_batch * rows.batch + i_head * rows.head, ALIGN)


@triton.jit
def row_pointers(
    p_rows,
    rows,
    p_permutation,
    at_permutation,
    start,
    offsets,
    m_rows,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Point at the rows of slots ``start + offsets``: ``[ROWS, BLOCK_D]``.

    Without a permutation only the start is multiplied in 64 bits: the offsets within a tile stay
    the same over a whole walk and cost no register pair each.
    """
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    seq_stride = aligned(rows.seq, ALIGN)
    if p_permutation is None:
        offset = offsets[:, None] * seq_stride + columns[None, :] * rows.dim  # [ROWS, BLOCK_D]
        return p_rows + start.to(tl.int64) * seq_stride + offset
    else:
        slots = at_permutation + start + offsets
        token = tl.load(p_permutation + slots, mask=m_rows, other=0)  # [ROWS]
        return p_rows + token[:, None] * seq_stride + columns[None, :] * rows.dim


@triton.jit
def row_mask(m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Widen a row mask by the columns that the padded head_dim does not have."""
    if HEAD_DIM == BLOCK_D:
        return m_rows[:, None]  # [ROWS, 1]
    else:
        return m_rows[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]  # [ROWS, BLOCK_D]


@triton.jit
def load_rows(
    p_rows,
    rows,
    p_permutation,
    at_permutation,
    start,
    offsets,
    m_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Load the rows of slots ``start + offsets``, 0 where masked: ``[ROWS, BLOCK_D]``."""
    p_block = row_pointers(
        p_rows, rows, p_permutation, at_permutation, start, offsets, m_rows, BLOCK_D, ALIGN
    )
    return tl.load(p_block, mask=row_mask(m_rows, HEAD_DIM, BLOCK_D), other=0.0)
