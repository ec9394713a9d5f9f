# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernel reads out of a plan: rows of queries and the spans of keys they keep."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.core.plan import BlockPlan

WHOLE_BLOCKS = 8  # slots: shorter pieces are gathered token by token

Span = tuple[int, int]  # first slot, behind the last slot
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """Queries that keep the same keys, in slots of the plan.

    Args:
        q: Query spans, ascending.
        kv: Spans of the key blocks that are kept whole; blocks side by side are one span.
        partial: Key span and bit tile of each partial block; then ``q`` is one block.
    """

    q: list[Span]
    kv: list[Span]
    partial: list[tuple[int, int, int]]

    @property
    def queries(self) -> int:
        """Number of queries."""
        return sum(stop - start for start, stop in self.q)

    @property
    def keys(self) -> int:
        """Number of keys, partial blocks counted whole."""
        whole = sum(stop - start for start, stop in self.kv)
        return whole + sum(stop - start for start, stop, _ in self.partial)


def pick(tensor: Tensor, i_batch: int, i_head: int) -> Tensor:
    """Take one (sample, head) of a tensor whose leading dimensions may be shared."""
    return tensor[i_batch % tensor.shape[0], i_head % tensor.shape[1]]


def rows_of(plan: BlockPlan, i_batch: int, i_head: int) -> list[Row]:
    """List one (sample, head)'s rows; query blocks with equal lists are joined."""
    index = pick(plan.kv_indices, i_batch, i_head).numpy()
    count = pick(plan.kv_num_blocks, i_batch, i_head).numpy()
    i_q, entry = np.nonzero(np.arange(index.shape[1]) < count[:, None])
    block = index[i_q, entry]
    start = pick(plan.kv.starts, i_batch, i_head).numpy()[block].astype(np.int64)
    stop = start + pick(plan.kv.lengths, i_batch, i_head).numpy()[block]
    tile = np.full_like(block, -1)
    if plan.partial is not None:
        tile = pick(plan.partial, i_batch, i_head).numpy()[i_q, entry]
    filled = stop > start
    whole, cut = filled & (tile < 0), filled & (tile >= 0)
    spans, owner = _join(np.stack([start[whole], stop[whole]], 1), i_q[whole])
    edges = np.searchsorted(owner, np.arange(plan.q.blocks + 1))
    partial: dict[int, list[tuple[int, int, int]]] = {}
    for row, *part in zip(*(x[cut].tolist() for x in (i_q, start, stop, tile)), strict=True):
        partial.setdefault(row, []).append((part[0], part[1], part[2]))

    rows: list[Row] = []
    known: dict[bytes, Row] = {}
    q_start = pick(plan.q.starts, i_batch, i_head).tolist()
    q_length = pick(plan.q.lengths, i_batch, i_head).tolist()
    for row in sorted(range(plan.q.blocks), key=q_start.__getitem__):
        kept = spans[edges[row] : edges[row + 1]]
        q = (q_start[row], q_start[row] + q_length[row])
        if not q_length[row] or not (len(kept) or row in partial):
            continue
        name = kept.tobytes()
        if row in partial or name not in known:
            rows.append(Row([q], [(a, b) for a, b in kept.tolist()], partial.get(row, [])))
            if row not in partial:
                known[name] = rows[-1]
            continue
        same = known[name].q
        if same[-1][1] == q[0]:
            same[-1] = (same[-1][0], q[1])
        else:
            same.append(q)
    return rows


def _join(spans: Array, owner: Array) -> tuple[Array, Array]:
    """Join an owner's spans that stand side by side; ``[entries, 2]`` and ``[entries]``."""
    if not len(spans):
        return spans, owner
    apart = (owner[1:] != owner[:-1]) | (spans[1:, 0] != spans[:-1, 1])
    first = np.flatnonzero(np.concatenate([[True], apart]))
    last = np.flatnonzero(np.concatenate([apart, [True]]))
    return np.stack([spans[first, 0], spans[last, 1]], 1), owner[first]


def cut_spans(spans: list[Span], most: int) -> Iterator[list[Span]]:
    """Cut spans into lists of at most ``most`` slots each."""
    held: list[Span] = []
    room = most
    for start, stop in spans:
        begin = start
        while begin < stop:
            end = min(stop, begin + room)
            held.append((begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield held
                held, room = [], most
    if held:
        yield held


def cut_row(row: Row, most: int) -> Iterator[Row]:
    """Cut a row that joins many queries into rows of at most ``most``."""
    if row.queries <= most or row.partial:
        yield row
        return
    for q in cut_spans(row.q, most):
        yield Row(q, row.kv, [])


def slots_of(spans: list[Span]) -> Array:
    """List the slots of spans."""
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def piece_length(rows: list[list[Span]], slots: int) -> int:
    """Find the longest equal pieces on one raster that all spans of all rows are made of.

    The end of the sequence may leave a piece that is shorter; 1 where pieces would be short.
    """
    length = gcd(*(bound for spans in rows for span in spans for bound in span if bound < slots))
    return length if length >= WHOLE_BLOCKS else 1


def pieces_of(spans: list[Span], length: int, slots: int) -> tuple[list[int], int] | None:
    """Spell spans of a sequence of ``slots`` out as pieces of ``length`` slots on one raster.

    Returns:
        Which whole pieces the spans are, in order; and how many slots of the last span are a rest
        shorter than a piece. None: they are no whole pieces, or these are single slots.
    """
    if length == 1:
        return None
    found: list[int] = []
    for start, stop in spans:
        if start % length or (stop % length and stop != slots):
            return None
        found += range(start // length, stop // length)
    return found, spans[-1][1] % length
