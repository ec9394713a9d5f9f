# SPDX-License-Identifier: Apache-2.0
"""Top-k and top-p against sorts of Python tuples, row by row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError
from dit_sparse.kernels import chunks
from dit_sparse.kernels.select import select_top_k, select_top_p
from tests.strategies import generator, seeds


def drawn(seed, batch, heads, rows, blocks, *, ties, keep):
    random = generator(seed)
    score = torch.rand(batch, heads, rows, blocks, generator=random)
    if ties:
        score = (score * 4).floor() / 4
    forced = torch.rand(1, heads, rows, blocks, generator=random) < 0.2
    return score, forced if keep else None


def check(kept, wanted):
    """Compare with rows of sorted block numbers; lists must make a plan as they are."""
    batch, heads, rows, blocks = kept.block_mask.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                count = int(kept.kv_num_blocks[b, h, i])
                assert kept.kv_indices[b, h, i, :count].tolist() == wanted(b, h, i)
                assert kept.block_mask[b, h, i].nonzero().flatten().tolist() == wanted(b, h, i)
    q = BlockLayout.from_lengths([2] * rows)
    kv = BlockLayout.from_lengths([3] * blocks)
    plan = BlockPlan(q, kv, kept.kv_indices, kept.kv_num_blocks).validate()
    assert torch.equal(plan.block_mask(), kept.block_mask)


sizes = {
    "seed": seeds,
    "batch": st.integers(1, 2),
    "heads": st.integers(1, 3),
    "rows": st.integers(1, 4),
    "blocks": st.integers(1, 13),
    "ties": st.booleans(),
    "keep": st.booleans(),
    "inside": st.booleans(),
}


@given(**sizes, count=st.integers(0, 15), as_tensor=st.booleans())
def test_top_k(seed, batch, heads, rows, blocks, ties, keep, inside, count, as_tensor):
    score, forced = drawn(seed, batch, heads, rows, blocks, ties=ties, keep=keep)
    score[score < 0.1] = -math.inf
    counts = torch.randint(0, count + 1, (1, heads, 1), generator=generator(seed))
    kept = select_top_k(score, counts if as_tensor else count, forced, keep_inside=inside)

    def wanted(b, h, i):
        row = score[b, h, i].tolist()
        must = [] if forced is None else forced[0, h, i].nonzero().flatten().tolist()
        limit = int(counts[0, h, 0]) if as_tensor else count
        if inside:
            limit = max(0, limit - len(must))
        free = [j for j in range(blocks) if j not in must and row[j] > -math.inf]
        best = sorted(free, key=lambda j: (-row[j], j))[:limit]
        return sorted(set(must) | set(best))

    check(kept, wanted)
    if forced is None and not as_tensor:
        assert kept.kv_indices.shape[-1] == max(1, min(count, blocks))


@given(
    **sizes,
    p=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    floor=st.integers(0, 3),
    room=st.one_of(st.none(), st.integers(0, 6)),
)
def test_top_p(seed, batch, heads, rows, blocks, ties, keep, inside, p, floor, room):
    score, forced = drawn(seed, batch, heads, rows, blocks, ties=ties, keep=keep)
    score[score < 0.05] = 0
    score[score > 0.95] = -1
    ceiling = None if room is None else min(floor, blocks) + room
    kept = select_top_p(score, p, floor, forced, ceiling=ceiling, keep_inside=inside)

    def wanted(b, h, i):
        row = score[b, h, i].tolist()
        must = set() if forced is None else set(forced[0, h, i].nonzero().flatten().tolist())
        first = must if inside else set()
        free = [j for j in range(blocks) if (j in first or j not in must)]
        ranked = sorted(free, key=lambda j: (j not in first, j if j in first else -row[j], j))
        total = sum(max(row[j], 0) for j in ranked)
        taken, before = set(), 0.0
        for place, j in enumerate(ranked):
            line = before < p * total - 1e-6 or p == 1
            if row[j] >= 0 and (line or place < floor) and (ceiling is None or place < ceiling):
                taken.add(j)
            before += max(row[j], 0)
        return sorted(must | taken)

    # Random weights do not stand on the line, ties and quarters may: those have their own test.
    if not ties:
        check(kept, wanted)


def test_the_block_that_crosses_the_line_is_kept():
    weight = torch.tensor([[[[4.0, 1.0, 2.0, 1.0]]]])
    for p, wanted in [(0.0, []), (0.4, [0]), (0.5, [0]), (0.6, [0, 2]), (0.75, [0, 2]), (0.8, 3)]:
        kept = select_top_p(weight, p).block_mask[0, 0, 0].nonzero().flatten().tolist()
        assert kept == ([0, 1, 2] if wanted == 3 else wanted)


def test_a_fault_upstream_shows():
    score = torch.tensor([[[[1.0, math.nan, 3.0], [1.0, 2.0, math.inf]]]])
    assert select_top_p(score, 0.1).block_mask.all()
    assert select_top_k(score, 1).kv_indices[0, 0, :, 0].tolist() == [1, 2]


def test_chunks_do_not_matter(monkeypatch):
    score = torch.rand(2, 5, 7, 9, generator=generator(0))
    keep = torch.rand(5, 7, 9, generator=generator(1)) < 0.1
    whole = [select_top_k(score, 3, keep), select_top_p(score, 0.5, 1, keep)]
    monkeypatch.setattr(chunks, "BUDGET_CPU", 1)
    parts = [select_top_k(score, 3, keep), select_top_p(score, 0.5, 1, keep)]
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: select_top_k(s, -1), "counts"),
        (lambda s: select_top_p(s, 1.5), r"p must lie in \[0, 1\], got 1.5"),
        (lambda s: select_top_p(s, 0.5, 3, ceiling=2), "ceiling = 2"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(KernelError, match=words):
        call(torch.rand(1, 1, 2, 4))
