# SPDX-License-Identifier: Apache-2.0
"""Plans that Hypothesis draws: every freedom that the plan's contract gives, in small sizes.

Hypothesis draws the shape of a plan (what is there, how large, shared or not); the numbers inside
come from one drawn seed, which keeps drawing fast and still replays exactly.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.tiles import pack_bits
from tests.strategies import batches, generator, head_counts, seeds

lengths = st.lists(st.integers(1, 13), min_size=1, max_size=6)


def partition(random: torch.Generator, leading: tuple[int, int], blocks: int, tokens: int):
    """Cut ``tokens`` into ``blocks`` runs, other ones per sample and head; some are empty."""
    edges = torch.randint(0, tokens + 1, (*leading, blocks - 1), generator=random).sort().values
    first = torch.zeros(*leading, 1, dtype=torch.int64)
    edges = torch.cat([first, edges, first + tokens], -1)
    return edges[..., 1:] - edges[..., :-1]  # [batch|1, heads|1, blocks]


@st.composite
def sides(draw, batch: int, heads: int, *, is_query: bool):
    """Draw one side: its layout, its permutation or None, its number of tokens."""
    random = generator(draw(seeds))
    leading = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    blocks, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 70))
    form = draw(st.sampled_from(["uniform", "shared", "own", "permuted", "slack"]))
    if form == "uniform":
        size = draw(st.sampled_from([1, 4, 16, 17]))
        grid = LatentsGrid(1, 1, tokens, draw(st.integers(0, 20)), draw(st.booleans()))
        valid = None
        if not is_query and draw(st.booleans()):
            valid = torch.randint(0, grid.text_length + 1, (leading[0],), generator=random)
        return grid.layout(size, text_valid=valid), None, grid.tokens
    if form in {"shared", "own"}:
        leading = (1, 1) if form == "shared" else leading
        length = partition(random, leading, blocks, tokens)
        start = length.cumsum(-1) - length
        if not is_query:  # padding keys: the end of a block takes no part
            length = (length - torch.randint(0, 3, length.shape, generator=random)).clamp(min=0)
        layout = BlockLayout(
            start.int(), length.int(), slots=tokens, max_length=max(1, int(length.max()))
        )
        return layout, None, tokens
    # Slots in an order of their own; "slack": blocks stand apart, -1 between them.
    length = partition(random, leading, blocks, tokens)
    room = int(length.max()) + draw(st.integers(0, 3))
    start = length.cumsum(-1) - length
    slots = tokens
    if form == "slack":
        start = (torch.arange(blocks) * room).expand_as(length)
        slots = blocks * room
    permutation = torch.full((*leading, slots), -1, dtype=torch.int64)
    for i_batch in range(leading[0]):
        for i_head in range(leading[1]):
            token = torch.randperm(tokens, generator=random)
            at = 0
            for a, n in zip(
                start[i_batch, i_head].tolist(), length[i_batch, i_head].tolist(), strict=True
            ):
                permutation[i_batch, i_head, a : a + n] = token[at : at + n]
                at += n
    if not is_query:
        length = (length - torch.randint(0, 2, length.shape, generator=random)).clamp(min=0)
    layout = BlockLayout(start.int(), length.int(), slots=slots, max_length=max(1, room))
    return layout, permutation, tokens


@st.composite
def plans(
    draw, batch: int, heads: int, *, partial: bool = True, log_weight: bool = True
) -> BlockPlan:
    """Draw a valid plan for ``batch`` samples and ``heads`` heads."""
    q, q_permutation, q_tokens = draw(sides(batch, heads, is_query=True))
    kv, kv_permutation, kv_tokens = draw(sides(batch, heads, is_query=False))
    random = generator(draw(seeds))
    leading = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    mask = torch.rand(*leading, q.blocks, kv.blocks, generator=random) < density
    plan = BlockPlan.from_block_mask(
        mask,
        q,
        kv,
        cap=kv.blocks if draw(st.booleans()) else None,
        q_permutation=q_permutation,
        kv_permutation=kv_permutation,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
    )
    if log_weight and draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), kv.slots)
        weight = torch.randn(shape, generator=random)
        weight[torch.rand(shape, generator=random) < draw(st.sampled_from([0, 0.3]))] = -torch.inf
        plan = replace(plan, kv_log_weight=weight)
    if partial and draw(st.booleans()):
        plan = with_tiles(plan, random)
    return plan.validate()


def with_tiles(plan: BlockPlan, random: torch.Generator) -> BlockPlan:
    """Cut about half of the kept blocks by random bits (some by none: nothing kept)."""
    index = plan.kv_indices
    partial = torch.full_like(index, -1)
    tiles = []
    q_length = plan.q.lengths.amin((0, 1))  # bits past a block's end are 0, for every sharer
    kv_length = plan.kv.lengths.amin((0, 1))
    for entry in (torch.rand(index.shape, generator=random) < 0.5).nonzero().tolist():
        i_batch, i_head, i_q, i_entry = entry
        keep = torch.rand(plan.q.max_length, plan.kv.max_length, generator=random)
        bits = keep < torch.rand((), generator=random)
        bits[int(q_length[i_q]) :] = False
        bits[:, int(kv_length[index[i_batch, i_head, i_q, i_entry]]) :] = False
        partial[i_batch, i_head, i_q, i_entry] = len(tiles)
        tiles.append(pack_bits(bits))
    words = -(-plan.kv.max_length // 32)
    empty = torch.zeros(0, plan.q.max_length, words, dtype=torch.int32)
    return replace(plan, partial=partial, tiles=torch.stack(tiles) if tiles else empty)


@st.composite
def cases(draw, **kinds: bool) -> tuple[BlockPlan, int, int, int]:
    """Draw a plan, the batch and head counts it is for, and a seed for the inputs."""
    batch, heads = draw(batches), draw(head_counts)
    return draw(plans(batch, heads, **kinds)), batch, heads, draw(seeds)


def inputs_for(
    plan: BlockPlan, batch: int, heads: int, head_dim: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make peaky query, key and value for a plan; query and key lengths differ."""
    random = generator(seed)

    def make(tokens: int, size: float) -> torch.Tensor:
        shape = (batch, tokens, heads, head_dim)
        return (size * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

    return make(plan.query_length, 3.0), make(plan.key_length, 1.0), make(plan.key_length, 1.0)
