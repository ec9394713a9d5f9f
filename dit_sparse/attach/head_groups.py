# SPDX-License-Identifier: Apache-2.0
"""Heads of one layer that use different methods: how a call is split, and joined in one launch."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from dit_sparse.core.plan import BlockPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import BlockLayout

    Heads = tuple[int, ...]


def head_index(heads: Heads, device: torch.device | None = None) -> slice | Tensor:
    """Index ascending heads by a slice where they are neighbours: a view instead of a copy.

    Others get an index on ``device``; without one it is on the CPU, and its use elsewhere waits.
    """
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return slice(first, last + 1)
    return index_on(heads, device)


@lru_cache(maxsize=4096)
def index_on(numbers: tuple[int, ...], device: torch.device | None) -> Tensor:
    """Put an index on a device once: a list as an index is copied at every use, and waits."""
    with torch.inference_mode(mode=False):  # it may be used outside of it, too
        return torch.tensor(numbers).to(device)


def select_heads(call: AttentionCall, heads: Heads) -> AttentionCall:
    """Narrow a call to some of its heads; the narrowed call has no state yet."""
    if len(heads) == len(call.heads):
        return replace(call, heads=heads, state={})
    at = head_index(heads, call.query.device)
    parts = {name: getattr(call, name)[:, :, at] for name in ("query", "key", "value")}
    return replace(call, **parts, heads=heads, state={})


def merge_plans(parts: Sequence[tuple[BlockPlan, Heads]]) -> tuple[BlockPlan, Heads] | None:
    """Join plans of different heads into one, so that all run in one launch.

    Args:
        parts: Plans with the heads they are for (each plan's heads dimension is 1 or that many).

    Returns:
        The joint plan and its heads in ascending order; None where the plans' blocks differ, or
        tokens are reordered or weighted, or only some add means, so that they must run one by one.
    """
    first = parts[0][0]
    if len(parts) == 1:
        return parts[0]
    for plan, _ in parts:
        plain = plan.q_permutation is None and plan.kv_permutation is None
        plain = plain and plan.means == first.means
        if not (plain and plan.kv_log_weight is None and plan.dense_keys is None):
            return None
        if not (_same(plan.q, first.q) and _same(plan.kv, first.kv)):
            return None
    batch = max(plan.batch for plan, _ in parts)
    cap = max(plan.kv_indices.shape[-1] for plan, _ in parts)
    partial = any(plan.partial is not None for plan, _ in parts)
    indices: list[Tensor] = []
    counts: list[Tensor] = []
    tiles: list[Tensor] = []
    tile_of: list[Tensor] = []
    for plan, heads in parts:
        shape = (batch, len(heads), plan.q.blocks)
        missing = cap - plan.kv_indices.shape[-1]
        indices.append(torch.nn.functional.pad(plan.kv_indices.expand(*shape, -1), (0, missing)))
        counts.append(plan.kv_num_blocks.expand(shape))
        if partial:
            tile_of.append(_shifted(plan, shape, missing, sum(t.shape[0] for t in tiles)))
            if plan.tiles is not None:
                tiles.append(plan.tiles)
    together = [head for _, heads in parts for head in heads]
    places = sorted(range(len(together)), key=together.__getitem__)
    order = index_on(tuple(places), first.device)
    joint = BlockPlan(
        first.q,
        first.kv,
        torch.cat(indices, 1)[:, order],
        torch.cat(counts, 1)[:, order],
        partial=torch.cat(tile_of, 1)[:, order] if partial else None,
        tiles=torch.cat(tiles) if partial else None,
        complete=all(plan.complete for plan, _ in parts),
        means=first.means,
    )
    return joint, tuple(sorted(together))


def _shifted(plan: BlockPlan, shape: tuple[int, ...], missing: int, before: int) -> Tensor:
    """Renumber a plan's tiles for a table in which ``before`` others come first."""
    if plan.partial is None:
        width = plan.kv_indices.shape[-1] + missing
        return torch.full((*shape, width), -1, dtype=torch.int32, device=plan.device)
    own = torch.where(plan.partial >= 0, plan.partial + before, plan.partial)
    return torch.nn.functional.pad(own.expand(*shape, -1), (0, missing), value=-1)


def _same(one: BlockLayout, other: BlockLayout) -> bool:
    """Tell without a device read whether two layouts are the same; unsure counts as no."""
    if one is other:
        return True
    return (
        one.slots == other.slots
        and one.max_length == other.max_length
        and one.starts.data_ptr() == other.starts.data_ptr()
        and one.lengths.data_ptr() == other.lengths.data_ptr()
        and one.lengths.shape == other.lengths.shape
    )
