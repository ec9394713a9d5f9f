# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel does with a plan: find its tile, walk a block list, load rows.

Device functions only. A *tile* here is the part of a block that one program owns (``BLOCK_M``
rows) or reads in one iteration (``BLOCK_N`` columns); blocks of any length are cut into tiles.
"""

import triton
import triton.language as tl


@triton.jit
def own_tile(p_tiles, tile_strides, i_batch, i_head, parts):
    """Return (block, part of it) that this program owns; a block beyond the last means none.

    ``p_tiles`` is None where every block has the same number of parts.
    """
    i_tile = tl.program_id(0)
    if p_tiles is None:
        return i_tile // parts, i_tile % parts
    else:
        p_tile = p_tiles + i_batch * tile_strides[0] + i_head * tile_strides[1] + i_tile * 2
        return tl.load(p_tile), tl.load(p_tile + 1)


@triton.jit
def leading(p_tensor, i_batch, i_head, batch_stride, head_stride):
    """Step to one (sample, head) of a plan's tensor; a shared dimension has stride 0.

    Not for a pointer that may be None: Triton 3.6 cannot return one.
    """
    return p_tensor + i_batch * batch_stride + i_head * head_stride


@triton.jit
def own_span(
    p_starts, p_lengths, strides, i_batch, i_head, i_block, max_length, SPREAD: tl.constexpr
):
    """Return first slot and length of the block that this program owns."""
    return block_span(
        leading(p_starts, i_batch, i_head, strides[0], strides[1]),
        leading(p_lengths, i_batch, i_head, strides[2], strides[3]),
        i_block,
        max_length,
        SPREAD,
    )


@triton.jit
def own_list(p_counts, p_indices, strides, i_batch, i_head, i_block):
    """Point at the count and at the list of the block that this program owns."""
    i_row = i_block.to(tl.int64)
    p_count = leading(p_counts, i_batch, i_head, strides[0], strides[1]) + i_row * strides[2]
    p_list = leading(p_indices, i_batch, i_head, strides[3], strides[4]) + i_row * strides[5]
    return p_count, p_list


@triton.jit
def block_span(p_starts, p_lengths, i_block, max_length, SPREAD: tl.constexpr):
    """Return first slot and length of a block."""
    length = tl.load(p_lengths + i_block)
    if SPREAD:
        return i_block * max_length, length
    else:
        return tl.load(p_starts + i_block), length


@triton.jit
def walk_total(p_list, count, p_lengths, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
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
            length = tl.load(p_lengths + i_block, mask=m_entry, other=0)
            tiles = tl.maximum((length + BLOCK - 1) // BLOCK, 1)
            total += tl.where(m_entry, tiles, 0)
        return tl.sum(total, 0)


@triton.jit
def walk_first(p_list, count, p_starts, p_lengths, max_length, SPREAD: tl.constexpr):
    """Return (start, length) of the first listed block and the number of the second one."""
    start, length = block_span(
        p_starts, p_lengths, tl.load(p_list, mask=count > 0, other=0), max_length, SPREAD
    )
    return start, length, tl.load(p_list + 1, mask=count > 1, other=0)


@triton.jit
def walk_next(
    i_entry,
    done,
    start,
    length,
    ahead,
    p_list,
    count,
    p_starts,
    p_lengths,
    max_length,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Step to the next tile of the walk.

    The number of the block after next is loaded here, one block early, so that the address of a
    tile never waits for a load of the same iteration and the tile loads can be pipelined.

    Returns:
        The new ``i_entry, done, start, length, ahead``.
    """
    start_ahead, length_ahead = block_span(p_starts, p_lengths, ahead, max_length, SPREAD)
    ahead_next = tl.load(p_list + i_entry + 2, mask=i_entry + 2 < count, other=0)
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
def row_tokens(p_permutation, start, rows, m_rows):
    """Return the token of each slot ``start + rows``: int64 ``[ROWS]``, 0 where masked."""
    if p_permutation is None:
        return start.to(tl.int64) + rows
    else:
        return tl.load(p_permutation + start + rows, mask=m_rows, other=0)


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
def head_offset(i_batch, i_head, strides, ALIGN: tl.constexpr):
    """Return the offset of one (sample, head) of ``[batch, seq, heads, head_dim]``, int64."""
    return aligned(i_batch * strides[0] + i_head * strides[2], ALIGN)


@triton.jit
def row_pointers(
    p_rows,
    strides,
    p_permutation,
    start,
    rows,
    m_rows,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Point at the rows of slots ``start + rows``: ``[ROWS, BLOCK_D]``.

    Without a permutation only the start is multiplied in 64 bits: the offsets within a tile stay
    the same over a whole walk and cost no register pair each.
    """
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    seq_stride = aligned(strides[1], ALIGN)
    if p_permutation is None:
        offset = rows[:, None] * seq_stride + columns[None, :] * strides[3]  # [ROWS, BLOCK_D]
        return p_rows + start.to(tl.int64) * seq_stride + offset
    else:
        token = tl.load(p_permutation + start + rows, mask=m_rows, other=0)  # [ROWS]
        return p_rows + token[:, None] * seq_stride + columns[None, :] * strides[3]


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
    strides,
    p_permutation,
    start,
    rows,
    m_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Load the rows of slots ``start + rows``, 0 where masked: ``[ROWS, BLOCK_D]``."""
    p_block = row_pointers(p_rows, strides, p_permutation, start, rows, m_rows, BLOCK_D, ALIGN)
    return tl.load(p_block, mask=row_mask(m_rows, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def tile_bits(
    p_tiles,
    number,
    q_max,
    kv_max,
    rows,
    done,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Read a bit tile, or all ones where ``number`` is negative (a whole block).

    There is no branch on purpose: on Hopper one would serialise the matrix instructions. Words
    are loaded a column of 32 keys at a time; a pointer per pair would take as many registers as
    the scores.

    Args:
        p_tiles: int32 ``[count, q_max, ceil(kv_max / 32)]``.
        number: Row of ``p_tiles``.
        q_max: Longest query block.
        kv_max: Longest key block.
        rows: Query offsets within the block, ``[BLOCK_M]``.
        done: Key offset within the block, a multiple of ``BLOCK_N``.
        length: Keys in the block.
        BLOCK_M: Rows.
        BLOCK_N: Columns.
        TRANSPOSED: Keys stand in rows.

    Returns:
        True where the tile keeps the pair, ``[BLOCK_M, BLOCK_N]`` (or transposed); and for each
        row a number that is not 0 where it keeps any existing key, ``[BLOCK_M]``.
    """
    WORDS: tl.constexpr = (BLOCK_N + 31) // 32
    words = (kv_max + 31) // 32
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    p_word = p_tiles + number.to(tl.int64) * q_max * words + rows * words + done // 32
    if TRANSPOSED:
        bits = tl.full([BLOCK_N, BLOCK_M], -1, tl.int32)
    else:
        bits = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    kept = tl.zeros([BLOCK_M], tl.int32)
    first = done % 32  # 0, or 16 where half a word is a whole tile
    for i_word in tl.static_range(WORDS):
        # (The interpreter makes numbers of a row mask that is combined with a scalar one.)
        existing_rows = tl.where(number >= 0, q_max, 0)
        existing_rows = tl.where(words > done // 32 + i_word, existing_rows, 0)
        word = tl.load(p_word + i_word, mask=rows < existing_rows, other=-1)  # [BLOCK_M]
        here_word = columns // 32 == i_word  # [BLOCK_N]
        if TRANSPOSED:
            bits = tl.where(here_word[:, None], word[None, :], bits)
        else:
            bits = tl.where(here_word[None, :], word[:, None], bits)
        here = tl.minimum(tl.maximum(length - done - 32 * i_word, 0), min(BLOCK_N, 32))
        existing = (1 << here.to(tl.int64)) - 1
        kept = kept | ((word >> first) & existing.to(tl.int32))
    shift = first + columns % 32  # [BLOCK_N]
    shift = shift[:, None] if TRANSPOSED else shift[None, :]
    return ((bits >> shift) & 1) == 1, kept
