# SPDX-License-Identifier: Apache-2.0
"""One call of the fused attention that torch has for CPUs, and joining results of several."""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 16  # numbers that the fused attention takes at a time, at most

# What F.scaled_dot_product_attention reaches on the CPU; called by name, it also gives the LSE.
_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001


def fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to every key, all ``[batch, heads, tokens, head_dim]``; gives output and LSE.

    Torch's fused attention loses a nan in two cases (seen in 2.13): of fewer than one vector of
    keys all of whose scores are nan it makes 0, and of an infinite score in 16 bits too.
    """
    few = k.shape[2] < VECTOR
    if few and not (bool(q.isfinite().all()) and bool(k.isfinite().all())):
        keep = torch.ones((), dtype=torch.bool).expand(q.shape[2], k.shape[2])
        bias = torch.zeros((), dtype=torch.float32) if bias is None else bias
        return attend_not_finite(q, k, v, bias, keep, scale)
    o, e = _sdpa(q, k, v, attn_mask=bias, scale=scale)
    lost = e == torch.inf
    if bool(lost.any()):
        o.masked_fill_(lost[..., None], torch.nan)
    return o, e


def attend_not_finite(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend under a mask when some key or value is nan or inf: who keeps it sees it, no other."""
    work = torch.promote_types(q.dtype, torch.float32)
    score = (q.to(work) @ k.to(work).mT) * scale + torch.where(keep, bias, 0.0).to(work)
    score.masked_fill_(~keep, -torch.inf)
    lse = score.logsumexp(-1, keepdim=True)
    weight = (score - lse).exp().masked_fill_(~keep, 0.0)
    wide = v.to(work)
    finite = wide.isfinite()
    output = weight @ torch.where(finite, wide, 0.0)
    for j in (~finite).any(-1).flatten(0, 1).any(0).nonzero().flatten().tolist():
        term = weight[..., j, None] * wide[..., j, None, :]  # [batch, heads, queries, head_dim]
        seen = keep[:, j, None] & ~finite[..., j, None, :]
        output += torch.where(seen, term, 0.0)
    return output.to(q.dtype), lse.squeeze(-1)


def merge(
    o: Tensor | None, e: Tensor | None, o_new: Tensor, e_new: Tensor
) -> tuple[Tensor, Tensor]:
    """Join two results over disjoint keys: ``O = sum O_i exp(LSE_i - LSE)``."""
    if o is None or e is None:
        return o_new, e_new
    lse = torch.logaddexp(e, e_new)
    base = torch.where(lse == -torch.inf, 0.0, lse)
    mixed = o * (e - base).exp()[..., None] + o_new * (e_new - base).exp()[..., None]
    return mixed.to(o.dtype), lse
