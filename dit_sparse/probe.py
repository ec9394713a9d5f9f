# SPDX-License-Identifier: Apache-2.0
"""Recall on probed rows: how much of the dense softmax mass the kept keys hold."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_rows(seq_len: int, count: int, seed: int) -> Tensor:
    """Draw ``count`` different rows of ``[0, seq_len)``, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(seq_len, generator=generator)[:count].sort().values


def dense_lse(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scale: float,
    text_start: int,
    text_valid: Tensor | None,
) -> Tensor:
    """Compute the dense log-sum-exp of a few rows, in fp32.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``.
        key: Like ``query``.
        rows: Query rows, int64 ``[count]``.
        scale: Multiplies the scores.
        text_start: Where the text begins in the sequence.
        text_valid: Valid text tokens per sample, int ``[batch]``; the text's padding stands
            behind them and is left out. None: every key counts.

    Returns:
        ``[batch, heads, count]``, natural log.
    """
    chosen = query[:, rows.to(query.device)].transpose(1, 2).float() * scale
    scores = chosen @ key.permute(0, 2, 3, 1).float()  # [batch, heads, count, keys]
    if text_valid is not None:
        position = torch.arange(key.shape[1], device=key.device)
        padding = position >= text_start + text_valid.to(key.device)[:, None]
        scores.masked_fill_(padding[:, None, None], -torch.inf)
    return scores.logsumexp(-1)


def recall(lse: Tensor, full: Tensor, rows: Tensor) -> Tensor:
    """Give the kept share of softmax mass per head, averaged over samples and rows.

    A kept row's normaliser is the mass of its kept keys: recall = exp(LSE_kept - LSE_dense).

    Args:
        lse: Of the sparse call, ``[batch, heads, seq_len]``.
        full: From ``dense_lse``, ``[batch, heads, count]``.
        rows: The rows of ``full``.

    Returns:
        fp32 ``[heads]``, in [0, 1] up to rounding.
    """
    kept = lse[..., rows.to(lse.device)].float()
    return (kept - full).exp().mean((0, 2))
