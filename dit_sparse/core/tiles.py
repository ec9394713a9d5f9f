# SPDX-License-Identifier: Apache-2.0
"""Bit tiles: token-level masks of the few blocks that a window's or band's border cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout

WORD = 32  # keys per int32 word


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool ``[..., keys]`` into int32 ``[..., ceil(keys / 32)]``; key 0 is the lowest bit."""
    keys = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, -keys % WORD))
    bits = padded.unflatten(-1, (-1, WORD)).long()
    weight = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(
        WORD, device=mask.device
    )
    word = (bits * weight).sum(-1)
    return torch.where(word >= 1 << (WORD - 1), word - (1 << WORD), word).int()


def unpack_tiles(tiles: Tensor, keys: int) -> Tensor:
    """Unpack int32 words ``[..., words]`` into bool ``[..., keys]``."""
    shift = torch.arange(WORD, device=tiles.device, dtype=torch.int32)
    bits = (tiles[..., None] >> shift) & 1
    return bits.flatten(-2)[..., :keys].bool()


def pack_tiles(mask: Tensor, q: BlockLayout, kv: BlockLayout) -> tuple[Tensor, Tensor]:
    """Cut a bool mask over slots into blocks; deduplicate those neither full nor empty.

    Args:
        mask: ``[batch, heads, q.slots, kv.slots]``, True = attended.
        q: Query blocks, shared by samples and heads.
        kv: Key blocks, likewise.

    Returns:
        Tiles as bits, int32 ``[count, q.max_length, words]``, and for every block pair the row of
        its tile, -1 = whole, -2 = empty: int32 ``[batch, heads, q_blocks, kv_blocks]``.
    """
    if q.starts.shape[:2] != (1, 1) or kv.starts.shape[:2] != (1, 1):
        raise PlanError("tiles require a layout shared by all samples and heads")
    index = torch.full((*mask.shape[:2], q.blocks, kv.blocks), -1, dtype=torch.int32)
    known: dict[bytes, int] = {}
    rows: list[Tensor] = []
    spans = [
        list(zip(side.starts[0, 0].tolist(), side.lengths[0, 0].tolist(), strict=True))
        for side in (q, kv)
    ]
    source = mask.cpu()
    for i_q, (q_start, q_length) in enumerate(spans[0]):
        for i_kv, (kv_start, kv_length) in enumerate(spans[1]):
            block = source[..., q_start : q_start + q_length, kv_start : kv_start + kv_length]
            kept, whole = block.flatten(2).any(-1), block.flatten(2).all(-1)
            index[..., i_q, i_kv].masked_fill_(~kept, -2)
            for i_batch, i_head in (kept & ~whole).nonzero().tolist():
                tile = torch.zeros(q.max_length, kv.max_length, dtype=torch.bool)
                tile[:q_length, :kv_length] = block[i_batch, i_head]
                bits = pack_bits(tile)
                key = bits.numpy().tobytes()
                if key not in known:
                    known[key] = len(rows)
                    rows.append(bits)
                index[i_batch, i_head, i_q, i_kv] = known[key]
    words = -(-kv.max_length // WORD)
    tiles = torch.stack(rows) if rows else torch.zeros(0, q.max_length, words, dtype=torch.int32)
    return tiles.to(mask.device), index.to(mask.device)


def invert_tiles(
    tiles: Tensor, number: Tensor, q: BlockLayout, kv: BlockLayout
) -> tuple[Tensor, Tensor]:
    """Keep of each cut block what its tile drops, and nothing behind the block's ends.

    Args:
        tiles: int32 ``[count, q.max_length, words]``.
        number: Tile of each block pair, -1 = none: int32 ``[batch|1, heads|1, q_blocks,
            kv_blocks]``.
        q: Query blocks.
        kv: Key blocks.

    Returns:
        Tiles, one for each different (tile, query length, key length), and ``number`` for them.
    """
    q_length = q.lengths[..., None].expand(*number.shape)
    kv_length = kv.lengths[..., None, :].expand(*number.shape)
    cut = number >= 0
    cases = torch.stack([x[cut].long() for x in (number, q_length, kv_length)], -1)
    cases, case = cases.unique(dim=0, return_inverse=True)
    row = torch.arange(q.max_length, device=tiles.device)[:, None]
    key = torch.arange(kv.max_length, device=tiles.device)
    tile, rows, keys = (x[:, None, None] for x in cases.unbind(-1))
    inside = (row < rows) & (key < keys)
    dropped = ~unpack_tiles(tiles[tile[:, 0, 0]], kv.max_length) & inside
    found = torch.full_like(number, -1)
    found[cut] = case.int()
    return pack_bits(dropped), found
