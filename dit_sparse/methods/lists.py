# SPDX-License-Identifier: Apache-2.0
"""Video blocks chosen by score: how the choice is kept for later steps and joined with text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall

    Choose = Callable[[slice], tuple[Tensor, Tensor, Tensor]]

_SCRATCH = 64 * 2**20  # bytes of scores held at a time; heads are taken in chunks
_LARGEST = 2**15 - 1


MAX_COUNT = 1_000_000  # steps and tokens along an axis: a larger number is a typing error
MAX_ENTRIES = 1024  # of a list in the params


def check_count(name: str, value: int, span: tuple[int, int], hint: int) -> None:
    """Refuse counts outside of ``span``, both ends included."""
    if not span[0] <= value <= span[1]:
        raise StrategyError(
            f"{name} must be a whole number in [{span[0]}, {span[1]}], got {value!r:.40}; "
            f"try {hint}"
        )


def check_block_size(block_size: int) -> None:
    """Refuse block sizes outside of [1, 1024]."""
    if not 1 <= block_size <= 1024:
        raise StrategyError(
            f"block_size must be a token count in [1, 1024], got {block_size!r:.40}; try 128"
        )


def check_compensate(compensate: str) -> None:
    """Refuse what stands in for dropped blocks, unless it is nothing or their means."""
    if compensate not in {"none", "means"}:
        raise StrategyError(f"compensate must be 'none' or 'means', got {compensate!r:.40}")


def compensated(plan: BlockPlan, compensate: str) -> BlockPlan:
    """Let a plan read dropped blocks as their means, where that is asked for."""
    return plan.with_means() if compensate == "means" else plan


def check_refresh(refresh: int) -> None:
    """Refuse refresh periods below one step."""
    check_count("refresh", refresh, (1, MAX_COUNT), 1)


def check_seed(seed: int) -> None:
    """Refuse seeds that a generator cannot take once layer and step are mixed in."""
    if not 0 <= seed < 2**31:
        raise StrategyError(f"seed must lie in [0, 2 ** 31), got {seed!r:.40}")


def check_share(name: str, value: float, *, zero: bool, hint: float) -> None:
    """Refuse shares outside of (0, 1], or of [0, 1] where ``zero`` is allowed."""
    if not (0 <= value <= 1) or (value == 0 and not zero):
        span = "[0, 1]" if zero else "(0, 1]"
        raise StrategyError(f"{name} must lie in {span}, got {value}; try {hint}")


def share_of(share: float, blocks: int) -> int:
    """Round a share of ``blocks`` half up to a count of at least one."""
    return min(max(int(share * blocks + 0.5), 1), blocks)


def video_blocks(call: AttentionCall, block_size: int) -> slice:
    """Which blocks of ``call.layout(block_size)`` hold video."""
    video, text = (len(part) for part in call.grid.block_lengths(block_size))
    first = text if call.grid.text_first else 0
    return slice(first, first + video)


def identity(call: AttentionCall) -> tuple[object, ...]:
    """What remembered lists are for; anything else needs new ones."""
    return (call.grid, call.heads, call.num_steps, tuple(call.query.shape), call.query.device)


def head_numbers(call: AttentionCall) -> Tensor:
    """Look up (or make, once) the model's numbers of the call's heads on its device."""
    device = call.query.device
    place = ("head numbers", call.heads, device)
    return call.once(place, lambda: torch.tensor(call.heads, dtype=torch.int64, device=device))


def select_by_two(
    scores: Tensor, ties: Tensor, select: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Select by ``scores``, and by ``ties`` between key blocks of exactly equal score.

    The selections rank equal scores by the blocks' numbers. Here they see the blocks in the order
    of ``ties``, highest first, so that unequal scores rank as they would without it.

    Args:
        scores: ``[batch, heads, q_blocks, kv_blocks]``.
        ties: The same shape; the lower number wins where both are equal.
        select: One of the select operations, with its arguments.
    """
    order = ties.argsort(dim=-1, descending=True, stable=True)
    mask, lists, counts = select(scores.gather(-1, order))
    blocks = mask.shape[-1]
    entry = torch.arange(lists.shape[-1], device=lists.device)
    # Entries that do not count get a number above all blocks, so that sorting puts them last.
    found = order.gather(-1, lists.long()).masked_fill_(entry >= counts[..., None], blocks)
    found = found.sort(dim=-1).values.clamp_(max=blocks - 1)
    return torch.empty_like(mask).scatter_(-1, order, mask), found.int(), counts


def reused_plan(
    call: AttentionCall, block_size: int, refresh: int | None, choose: Choose
) -> BlockPlan:
    """Choose video blocks anew where that is due, else take those remembered in the state.

    Due is a choice on the first sparse call, ``refresh`` steps after the last choice (None:
    never again), and where the call's geometry changed.

    Args:
        call: The call.
        block_size: Tokens in a block.
        refresh: Steps for which a choice lives.
        choose: Gives, for a slice of the call's heads, ``(block_mask, kv_indices,
            kv_num_blocks)`` over video blocks only, as the select operations do.
    """
    state = call.state
    age = call.step - state["made"] if state.get("for") == identity(call) else -1
    if age < 0 or (refresh is not None and age >= refresh):
        state.clear()
        remember(call, block_size, choose)
        lists, counts = state["lists"], state["counts"]
        if refresh == 1:
            state.clear()  # nobody will ask for them again
    else:
        lists, counts = state["lists"], state["counts"]
    return listed_plan(call, block_size, lists, counts)


def remember(call: AttentionCall, block_size: int, choose: Choose) -> None:
    """Choose for all heads and put the lists into the state, two bytes an entry where they fit."""
    batch, _, heads, _ = call.query.shape
    blocks = call.layout(block_size).blocks
    chunk = max(1, _SCRATCH // (4 * batch * blocks * blocks))
    small = torch.int16 if blocks <= _LARGEST else torch.int32
    lists, counts = [], []
    for first in range(0, heads, chunk):
        _, kept, count = choose(slice(first, min(first + chunk, heads)))
        lists.append(kept.to(small))
        counts.append(count)
    found, number = torch.cat(lists, 1), torch.cat(counts, 1)
    if found.device.type == "cpu":  # reading is free there
        found = found[..., : max(1, int(number.max()))].contiguous()
    call.state.update(lists=found, counts=number, made=call.step)
    call.state["for"] = identity(call)


def listed_plan(call: AttentionCall, block_size: int, lists: Tensor, counts: Tensor) -> BlockPlan:
    """Add text blocks to every row of chosen video blocks, and whole rows for text queries.

    Args:
        call: The call.
        block_size: Tokens in a block.
        lists: Ascending video blocks, integer ``[batch, heads, video_blocks, cap]``.
        counts: How many of them count, int32 ``[batch, heads, video_blocks]``.
    """
    q, kv = call.layout(block_size), call.key_layout(block_size)
    video, text = (len(part) for part in call.grid.block_lengths(block_size))
    if not text:
        return BlockPlan(q, kv, lists.int(), counts)
    batch, heads, _, width = lists.shape
    device = lists.device
    indices = torch.arange(kv.blocks, dtype=torch.int32, device=device)
    indices = indices.expand(batch, heads, q.blocks, -1).contiguous()
    if call.grid.text_first:  # text blocks 0 ... text - 1 stand there already
        indices[:, :, text:, text : text + width] = lists.int() + text
    else:  # text blocks follow the kept video blocks, whose number differs by row
        entry = torch.arange(width + text, dtype=torch.int32, device=device)
        after = (video + entry - counts[..., None]).clamp_(video, kv.blocks - 1)
        kept = torch.nn.functional.pad(lists, (0, text)).int()
        live = entry < counts[..., None]
        indices[:, :, :video, : width + text] = torch.where(live, kept, after)
    full = torch.full((batch, heads, text), kv.blocks, dtype=torch.int32, device=device)
    rows = counts + text
    parts = [full, rows] if call.grid.text_first else [rows, full]
    return BlockPlan(q, kv, indices, torch.cat(parts, -1))
