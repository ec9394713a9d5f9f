# SPDX-License-Identifier: Apache-2.0
"""Torch's FlexAttention, compiled, over a ``BlockMask`` made from the plan's lists.

Not yet run on a GPU: chosen by name only. What is tested is the translation of plans, with the
uncompiled function, which computes every score.

Whole blocks go to the lists that FlexAttention computes without a mask; blocks that are short or
cut by a bit tile to those where it asks ``mask_mod``. Log weights are a ``score_mod``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.kernels.padded import Padded, padded, reasons_against_padding
from dit_sparse.kernels.select import listed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

HAS_BACKWARD = False
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 64  # FlexAttention's own tiles must divide the blocks of its mask


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    reasons = []
    if query.device.type != "cuda":
        reasons.append(
            f"needs a CUDA or ROCm device, query is on {query.device} (compiled for the CPU it "
            "gives no LSE, and is slower than dense attention)"
        )
    if query.dtype not in DTYPES:
        reasons.append(f"computes float16, bfloat16 and float32, query is {query.dtype}")
    if query.shape[-1] < 16:
        reasons.append(f"needs head_dim >= 16, got {query.shape[-1]}")
    return reasons + reasons_against_padding(plan, _size(plan.q), _size(plan.kv))


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend each query to the keys that its plan keeps; see ``cpu.attend`` for the contract."""
    form = padded(plan, _size(plan.q), _size(plan.kv))
    q, k, v = (x.transpose(1, 2) for x in form.inputs(query, key, value))
    mask = block_mask(plan, form, q.shape[2], k.shape[2])
    run = _compiled() if query.is_cuda else _flex
    output, lse = run(q, k, v, _score_mod(plan, form), mask, scale, _options(form))
    # Rows that keep nothing: 0 and -inf is what they are, whatever was left there.
    nothing = lse == -torch.inf
    output = output.masked_fill(nothing[..., None], 0)
    return form.results(output.transpose(1, 2), lse, query.shape[1])


def block_mask(plan: BlockPlan, form: Padded, q_slots: int, kv_slots: int) -> Any:
    """Translate a plan into torch's ``BlockMask`` over the slots of ``form``."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = plan.block_mask()  # [batch|1, heads|1, q_blocks, kv_blocks]
    tile = _tile_of_block(plan)
    masked = (form.kv_lengths < form.kv_size)[:, :, None].expand(*kept.shape[:2], 1, -1)
    if tile is not None:
        masked = masked | (tile >= 0)
    width = kept.shape[-1]
    some, some_counts = listed(kept & masked, width)
    full, full_counts = listed(kept & ~masked, width)
    return BlockMask.from_kv_blocks(
        some_counts,
        some,
        full_counts,
        full,
        BLOCK_SIZE=(form.q_size, form.kv_size),
        mask_mod=_mask_mod(plan, form, tile),
        seq_lengths=(q_slots, kv_slots),
    )


def _tile_of_block(plan: BlockPlan) -> Tensor | None:
    """Give the bit tile of every block pair, -1 where it is whole or dropped."""
    if plan.partial is None:
        return None
    lead, (rows, cap) = (plan.batch, plan.heads), plan.partial.shape[2:]
    live = torch.arange(cap, device=plan.device) < plan.kv_num_blocks[..., None]
    index = torch.where(live, plan.kv_indices, plan.kv.blocks).expand(*lead, rows, cap)
    tile = plan.partial.new_full((*lead, rows, plan.kv.blocks + 1), -1)
    tile.scatter_(-1, index.long(), plan.partial.expand(*lead, rows, cap))
    return tile[..., :-1].contiguous()


def _mask_mod(plan: BlockPlan, form: Padded, tile: Tensor | None) -> Callable[..., Tensor]:
    lengths, q_size, kv_size = form.kv_lengths, form.q_size, form.kv_size
    length_b, length_h = (lengths.shape[0] > 1, lengths.shape[1] > 1)

    def filled(b: Tensor, h: Tensor, _q: Tensor, kv: Tensor) -> Tensor:
        return kv % kv_size < lengths[b * length_b, h * length_h, kv // kv_size]

    if tile is None or plan.tiles is None or not plan.tiles.shape[0]:
        return filled
    bits, longest = plan.tiles, plan.q.max_length
    tile_b, tile_h = (tile.shape[0] > 1, tile.shape[1] > 1)
    words = bits.shape[-1]

    def cut(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        number = tile[b * tile_b, h * tile_h, q // q_size, kv // kv_size]
        row, word = (q % q_size).clamp(max=longest - 1), (kv % kv_size // 32).clamp(max=words - 1)
        bit = (bits[number.clamp(min=0), row, word] >> (kv % 32)) & 1
        return filled(b, h, q, kv) & ((number < 0) | (bit == 1))

    return cut


def _score_mod(plan: BlockPlan, form: Padded) -> Callable[..., Tensor] | None:
    if plan.kv_log_weight is None:
        return None
    weight = plan.kv_log_weight
    slot = _slot_of(plan.kv, form)
    lead = torch.broadcast_shapes(weight.shape[:2], slot.shape[:2])
    weight = weight.expand(*lead, -1).gather(-1, slot.expand(*lead, -1))
    many_b, many_h = lead[0] > 1, lead[1] > 1

    def weighted(score: Tensor, b: Tensor, h: Tensor, _q: Tensor, kv: Tensor) -> Tensor:
        return score + weight[b * many_b, h * many_h, kv]

    return weighted


def _slot_of(layout: BlockLayout, form: Padded) -> Tensor:
    """Give the plan's slot of every slot of ``form``; 0 where it is empty."""
    from dit_sparse.kernels.padded import slots_of

    size = form.kv_slots.shape[-1] // layout.blocks
    return slots_of(layout, size, None).clamp(min=0)


def _size(layout: BlockLayout) -> int:
    return -(-layout.max_length // TILE) * TILE


def _options(form: Padded) -> dict[str, int]:
    """Choose tiles that divide the blocks."""
    return {"BLOCK_M": TILE * (1 + (form.q_size % (2 * TILE) == 0)), "BLOCK_N": TILE}


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Callable[..., Tensor] | None,
    mask: Any,
    scale: float,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as flex

    more: dict[str, Any] = {"scale": scale, "kernel_options": options}
    wanted = flex.AuxRequest(lse=True)
    output, aux = flex.flex_attention(q, k, v, score_mod, mask, return_aux=wanted, **more)
    return output, aux.lse


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_flex, dynamic=False)
