# SPDX-License-Identifier: Apache-2.0
"""Scores of one tile and what stands for them: shared by the forward and the backward kernels.

Exponents are base 2: ``exp(scale * s - lse) = exp2(factor * s - lse * log2 e)`` with ``factor =
scale * log2 e``, one fused instruction. ``factor`` is rounded to float32; ``drift``, what it lacks
as a share of itself, puts that right where float32 results would show it. With log weights scores
are ``scale * s + weight`` and ``factor`` is ``log2 e``.
"""

import triton
import triton.language as tl

from dit_sparse.kernels.triton_blocks import load_rows

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOG2_E_REST: tl.constexpr = tl.constexpr(1.92596298909109e-08)  # log2 e - float32(log2 e)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def score_tile(
    b_q,
    p_key,
    key,
    kv,
    at,
    lists,
    at_partial,
    i_entry,
    q_longest,
    rows,
    start,
    done,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load a tile of keys and score it: -inf where a query does not keep a key.

    Nothing here branches: between two products a branch makes the compiler lay out the tile so
    that P travels through shared memory. ``WHOLE`` tiles have no weights, bits or missing keys.

    Returns:
        Scores fp32 ``[BLOCK_M, BLOCK_N]``; the keys ``[BLOCK_N, BLOCK_D]``; where there is a key,
        ``[BLOCK_N]``; which pairs are kept, ``[BLOCK_M, BLOCK_N]`` or ``[1, BLOCK_N]``; and a
        number that is not 0 where a query keeps any, ``[BLOCK_M]`` or scalar.
    """
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_columns = tl.full([BLOCK_N], 1, tl.int1) if WHOLE else columns < length - done  # [BLOCK_N]
    start += done
    if kv.weight is not None:
        p_weight = kv.weight + at[3] + start + columns
        weight = tl.load(p_weight, mask=m_columns, other=float("-inf"))  # [BLOCK_N]
        m_columns = m_columns & (weight != float("-inf"))
    b_k = load_rows(
        p_key, key, kv.permutation, at[2], start, columns, m_columns, HEAD_DIM, BLOCK_D,
        ALIGN,
    )  # fmt: skip  # [BLOCK_N, BLOCK_D]
    score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if kv.weight is not None:
        score = tl.fma(score, scale, weight[None, :])
    score = tl.where(m_columns[None, :], score, float("-inf"))
    m_pair = m_columns[None, :]
    if lists.partial is not None:
        m_tile, kept = tile_bits(
            lists.bits, tl.load(lists.partial + at_partial + i_entry), q_longest, kv.longest,
            rows, done, length, BLOCK_M, BLOCK_N, TRANSPOSED=False,
        )  # fmt: skip
        score = tl.where(m_tile, score, float("-inf"))
        m_pair = m_pair & m_tile
    elif kv.weight is not None:
        kept = tl.sum(m_columns.to(tl.int32), 0)
    elif WHOLE:
        kept = 1
    else:
        kept = tl.maximum(length - done, 0)
    return score, b_k, m_columns, m_pair, kept


@triton.jit
def soften(score, peak, total, factor):
    """Take one tile into an online softmax.

    Args:
        score: ``[BLOCK_M, BLOCK_N]``.
        peak: Running maximum times ``factor``, ``[BLOCK_M]``.
        total: Running sum of ``exp2(factor * score - peak)``, ``[BLOCK_M]``.
        factor: Positive.

    Returns:
        The exponentials; by how much everything summed before shrinks, ``[BLOCK_M]``; the new
        peak and total.
    """
    peak_new = tl.maximum(peak, tl.max(score, 1) * factor)  # [BLOCK_M]
    base = tl.where(peak_new == float("-inf"), 0.0, peak_new)  # [BLOCK_M]: nothing kept yet
    b_p = tl.exp2(tl.fma(score, factor, -base[:, None]))  # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2(peak - base)  # [BLOCK_M]
    return b_p, shrink, peak_new, total * shrink + tl.sum(b_p, 1)


@triton.jit
def row_lse(peak, total, drift):
    """Return the natural LSE of rows: -inf where nothing was kept.

    ``peak`` is the very number that the exponentials were taken relative to, so its rounding
    cancels; what ``factor`` lacks is added.
    """
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return (base + tl.fma(base, drift, tl.log2(total))) * LN_2


@triton.jit
def load_lse(p_lse, m_rows, drift):
    """Load natural LSEs in log2 units, and what the exponents of such a row lack: ``[ROWS]`` each.

    That is the rounding of the LSE in log2 units, and ``drift`` of a score that is about the LSE,
    as those are whose weights are not small. Rows with nothing kept (-inf) and rows that are not
    there get +inf: all their weights are 0.
    """
    lse = tl.load(p_lse, mask=m_rows, other=float("-inf"))
    log2_lse = lse * LOG2_E
    lost = tl.fma(lse, LOG2_E, -log2_lse) + lse * LOG2_E_REST
    rest = tl.fma(log2_lse, drift, -lost)
    empty = lse == float("-inf")
    return tl.where(empty, float("inf"), log2_lse), tl.where(empty, 0.0, rest)


@triton.jit
def softmax_weights(score, log2_lse, rest, factor, PRECISION: tl.constexpr):
    """Return ``exp(score - lse)``; the row values stand as ``score`` broadcasts them.

    For 16-bit inputs ``rest`` is far below a rounding of the products that follow.
    """
    exponent = tl.fma(score, factor, -log2_lse)
    if PRECISION == "ieee":
        exponent += rest
    return tl.exp2(exponent)


@triton.jit
def tile_bits(
    p_tiles,
    number,
    q_longest,
    kv_longest,
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
        p_tiles: int32 ``[count, q_longest, ceil(kv_longest / 32)]``.
        number: Row of ``p_tiles``.
        q_longest: Longest query block.
        kv_longest: Longest key block.
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
    words = (kv_longest + 31) // 32
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    p_word = p_tiles + number.to(tl.int64) * q_longest * words + rows * words + done // 32
    if TRANSPOSED:
        bits = tl.full([BLOCK_N, BLOCK_M], -1, tl.int32)
    else:
        bits = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    kept = tl.zeros([BLOCK_M], tl.int32)
    first = done % 32  # 0, or 16 where half a word is a whole tile
    for i_word in tl.static_range(WORDS):
        # (The interpreter makes numbers of a row mask that is combined with a scalar one.)
        existing_rows = tl.where(number >= 0, q_longest, 0)
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
