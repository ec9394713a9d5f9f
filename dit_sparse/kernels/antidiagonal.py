# SPDX-License-Identifier: Apache-2.0
"""XAttention's block scores: every ``stride`` x ``stride`` cell by its antidiagonal's mean.

Source: Xu et al. 2025, "XAttention: Block Sparse Attention with Antidiagonal Scoring",
arXiv:2503.16428, in the non-causal form. Two things differ from its code: runs of tokens start at
each block's start, so that they never cross a border, and a run cut short at a block's end repeats
its own tokens and counts as many keys as it has, where the code pads with zeros that take part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.errors import KernelError
from dit_sparse.kernels.chunks import budget, head_parts, heads_of, scores, work_dtype
from dit_sparse.kernels.permute import gather_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout


@torch.no_grad()
def antidiagonal(
    query: Tensor, key: Tensor, q: BlockLayout, kv: BlockLayout, stride: int, scale: float
) -> Tensor:
    """Estimate how much softmax weight each block pair holds, at ``1 / stride`` of the products.

    With stride 1 it is the exact block mass, padding keys left out. Meant for blocks of about
    equal length: the work grows with ``blocks * max_length``.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        q: Query blocks.
        kv: Key blocks; keys in no block count nowhere.
        stride: Tokens in a run, at least 1; more is cheaper and coarser.
        scale: Multiplies the scores.

    Returns:
        fp32 ``[batch, heads, q_blocks, kv_blocks]``; a row sums to its block's query tokens.
    """
    if stride < 1:
        raise KernelError(f"stride must be at least 1, got {stride}")
    batch, _, heads, dim = query.shape
    work = work_dtype(query.dtype)
    q_runs, kv_runs = (-(-side.max_length // stride) for side in (q, kv))
    mass = torch.zeros(batch, heads, q.blocks, kv.blocks, dtype=torch.float32, device=query.device)
    folded_slots = max(q.blocks * q_runs, kv.blocks * kv_runs) * stride
    for part in head_parts(heads, 4 * batch * folded_slots * dim * work.itemsize, query.device):
        q_fold, q_size = _folded(query[:, :, part], *heads_of(q, part), q_runs, stride, flip=True)
        k_fold, k_size = _folded(key[:, :, part], *heads_of(kv, part), kv_runs, stride, flip=False)
        # Keys run-major, [runs, blocks]: sums over a block's runs then add whole rows.
        k_fold = k_fold.transpose(2, 3).flatten(2, 3)
        k_weight = (k_size.to(work) / stride).log().transpose(2, 3).flatten(2, 3)[:, :, None]
        per_block = q_fold.shape[1] * batch * q_runs * k_fold.shape[2] * work.itemsize
        step = max(1, budget(query.device) // per_block)
        for first in range(0, q.blocks, step):
            rows = q_fold[:, :, first : first + step]  # [batch, part, blocks, runs, stride * dim]
            score = scores(rows.flatten(2, 3), k_fold)
            torch.add(k_weight, score, alpha=scale / stride, out=score)
            peak = score.amax(-1, keepdim=True).clamp_(min=torch.finfo(work).min)
            score.sub_(peak).exp_()
            size = q_size[:, :, first : first + step].flatten(2, 3)[..., None]
            score.mul_(size / score.sum(-1, keepdim=True).clamp_(min=1))  # below 1: no key
            by_key = score.unflatten(-1, (kv_runs, kv.blocks)).sum(-2)
            mass[:, part, first : first + step] = by_key.unflatten(2, (-1, q_runs)).sum(3)
    return mass


def _folded(
    x: Tensor, starts: Tensor, lengths: Tensor, runs: int, stride: int, *, flip: bool
) -> tuple[Tensor, Tensor]:
    """Join the tokens of each run into one long vector, the last first where ``flip``.

    Returns:
        ``[batch, heads, blocks, runs, stride * head_dim]`` and the tokens in each run, int32
        ``[batch|1, heads|1, blocks, runs]``, 0 behind a block's end.
    """
    run = torch.arange(runs, dtype=torch.int32, device=x.device) * stride
    size = (lengths[..., None] - run).clamp(0, stride)  # [batch|1, heads|1, blocks, runs]
    place = torch.arange(stride, dtype=torch.int32, device=x.device)
    if flip:
        place = place.flip(0)
    slot = (starts[..., None] + run)[..., None] + place % size[..., None].clamp(min=1)
    slot = slot.masked_fill_(size[..., None] == 0, -1)  # behind a block's end nothing is read
    found = gather_tokens(x, slot.flatten(2).long())  # [batch, blocks * runs * stride, heads, dim]
    found = found.unflatten(1, (starts.shape[-1], runs, stride))
    return found.permute(0, 4, 1, 2, 3, 5).flatten(4), size
