# SPDX-License-Identifier: Apache-2.0
"""Naive answers in float64, one token at a time: what methods are held against."""

from __future__ import annotations

import torch

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.kernels.planning import Planning
from tests.strategies import attention_inputs


def token_mask(plan, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    """Read a plan into bool ``[batch, heads, queries, keys]`` over tokens, bit by bit."""
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    words = [] if plan.tiles is None else plan.tiles.tolist()

    def pick(tensor, i_batch, i_head):
        return tensor[min(i_batch, tensor.shape[0] - 1), min(i_head, tensor.shape[1] - 1)].tolist()

    for b in range(batch):
        for h in range(heads):
            q_order = list(range(queries))
            kv_order = list(range(keys))
            if plan.q_permutation is not None:
                q_order = pick(plan.q_permutation, b, h)
            if plan.kv_permutation is not None:
                kv_order = pick(plan.kv_permutation, b, h)
            q_blocks, kv_blocks = (
                list(zip(pick(side.starts, b, h), pick(side.lengths, b, h), strict=True))
                for side in (plan.q, plan.kv)
            )
            lists, counts = pick(plan.kv_indices, b, h), pick(plan.kv_num_blocks, b, h)
            tiles = [[-1] * len(row) for row in lists]
            if plan.partial is not None:
                tiles = pick(plan.partial, b, h)
            rows = zip(q_blocks, lists, tiles, counts, strict=True)
            for (start, length), kept, cut, count in rows:
                for slot in range(start, start + length):
                    tokens = [
                        kv_order[kv_blocks[block][0] + i]
                        for block, tile in zip(kept[:count], cut, strict=False)
                        for i in range(kv_blocks[block][1])
                        if tile < 0 or words[tile][slot - start][i // 32] >> i % 32 & 1
                    ]
                    mask[b, h, q_order[slot], tokens] = True
    return mask


def masked_attention(query, key, value, mask, scale):
    """Softmax over kept keys in float64: output and LSE."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return (weights @ v).transpose(1, 2), lse


def with_means(query, key, value, plan, mask, scale, output, lse):
    """Read every key block of which a query reads nothing as one key, in float64."""
    output, lse = output.clone(), lse.clone()
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))

    def pick(tensor, i_batch, i_head):
        return tensor[min(i_batch, tensor.shape[0] - 1), min(i_head, tensor.shape[1] - 1)].tolist()

    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            order = list(range(key.shape[1]))
            if plan.kv_permutation is not None:
                order = pick(plan.kv_permutation, b, h)
            member = torch.zeros(plan.kv.blocks, key.shape[1], dtype=torch.float64)
            for i, (start, length) in enumerate(
                zip(*(pick(x, b, h) for x in (plan.kv.starts, plan.kv.lengths)), strict=True)
            ):
                member[i, [order[slot] for slot in range(start, start + length)]] = 1
            size = member.sum(1)
            dropped = (mask[b, h].double() @ member.T == 0) & (size > 0)
            mean = member / size.clamp(min=1)[:, None]
            own = (q[b, h] @ k[b, h].T * scale).masked_fill(~mask[b, h], -torch.inf)
            rest = q[b, h] @ (mean @ k[b, h]).T * scale + size.clamp(min=1).log()
            score = torch.cat([own, rest.masked_fill(~dropped, -torch.inf)], 1)
            lse[b, h] = score.logsumexp(1)
            output[b, :, h] = score.softmax(1) @ torch.cat([v[b, h], mean @ v[b, h]])
    return output, lse


class NaiveOps(Planning):
    """``Ops`` in float64, counting its calls."""

    def __init__(self):
        self.searches = 0

    def attend(self, query, key, value, plan, scale):
        mask = token_mask(plan, query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        kept = masked_attention(query, key, value, mask, scale)
        return with_means(query, key, value, plan, mask, scale, *kept) if plan.means else kept

    def block_mass(self, query, key, lse, q, kv, scale):
        self.searches += 1
        scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
        weights = (scores - lse.double()[..., None]).exp()
        batch, heads = weights.shape[:2]
        mass = torch.zeros(batch, heads, q.blocks, kv.blocks, dtype=torch.float64)
        for b in range(batch):
            for i in range(q.blocks):
                for j in range(kv.blocks):
                    rows, columns = _span(q, b, i), _span(kv, b, j)
                    mass[b, :, i, j] = weights[b, :, rows, columns].sum((-1, -2))
        return mass


def _span(layout, i_batch, i_block):
    i_batch = min(i_batch, layout.starts.shape[0] - 1)
    start = int(layout.starts[i_batch, 0, i_block])
    return slice(start, start + int(layout.lengths[i_batch, 0, i_block]))


def make_call(grid: LatentsGrid, seed: int = 0, batch: int = 1, heads: int = 2, **fields):
    """Make a call with random queries, keys and values (float64, head_dim 8)."""
    query, key, value = attention_inputs(seed, batch, grid.tokens, heads, 8)
    fields = {"heads": tuple(range(heads)), "scale": 8**-0.5} | fields
    return AttentionCall(query=query, key=key, value=value, grid=grid, **fields)


def run(method, call, ops):
    """Take one call through a method's two moments; the plan, and the output (None: dense)."""
    plan = method.plan(call, ops)
    if plan is None:
        return None, None
    output, lse = method.attend(call, plan, ops)
    return plan, method.finish(call, output, lse, ops)
