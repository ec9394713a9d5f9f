# SPDX-License-Identifier: Apache-2.0
"""What sparse attention lost on a few rows: kept softmax mass, and the error of the output."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_rows(seq_len: int, count: int, seed: int) -> Tensor:
    """Draw ``count`` different rows of ``[0, seq_len)``, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(seq_len, generator=generator)[:count].sort().values


def spread_rows(seq_len: int, count: int, random: torch.Generator) -> Tensor:
    """Draw one row from each of ``count`` equal stretches of ``[0, seq_len)``, ascending.

    Every row is drawn ``count / seq_len`` times in the mean, so sums over the drawn rows estimate
    sums over all without bias, with less spread than rows drawn anywhere (Cochran 1977, "Sampling
    Techniques", chapter 5). Where ``count`` does not divide ``seq_len`` neighbouring stretches
    share a row, which may come twice. All rows where there are no more than ``count``.

    Returns:
        int64 on the CPU, in O(``count``) time.
    """
    if count >= seq_len:
        return torch.arange(seq_len)
    place = torch.arange(count) + torch.rand(count, generator=random, dtype=torch.float64)
    return (place * seq_len / count).long().clamp_(max=seq_len - 1)


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
    chosen = query[:, rows.to(query.device, non_blocking=True)].transpose(1, 2).float() * scale
    scores = chosen @ key.permute(0, 2, 3, 1).float()  # [batch, heads, count, keys]
    if text_valid is not None:
        position = torch.arange(key.shape[1], device=key.device)
        padding = _padding(position, text_start, text_valid)
        scores.masked_fill_(padding[:, None, None], -torch.inf)
    return scores.logsumexp(-1)


def dense_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    scale: float,
    text_start: int,
    text_valid: Tensor | None,
) -> Tensor:
    """Compute the dense attention of a few rows, by torch's own fused attention.

    In the dtype it is given: for 16 bits both this and what it is compared with are rounded.

    Args:
        query: See ``dense_lse``; so too ``key``, ``rows``, ``scale``, ``text_start`` and
            ``text_valid``.
        key: See there.
        value: Like ``key``.
        rows: See there.
        scale: See there.
        text_start: See there.
        text_valid: See there.

    Returns:
        ``[batch, count, heads, head_dim]``.
    """
    chosen = query[:, rows.to(query.device, non_blocking=True)]
    q, k, v = (x.transpose(1, 2) for x in (chosen, key, value))
    mask = None
    if text_valid is not None:
        position = torch.arange(key.shape[1], device=key.device)
        mask = ~_padding(position, text_start, text_valid)[:, None, None]
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return output.transpose(1, 2)


def _padding(position: Tensor, text_start: int, text_valid: Tensor) -> Tensor:
    """Mark the positions behind each sample's valid text: bool ``[batch, positions]``."""
    return position >= text_start + text_valid.to(position.device)[:, None]


def recall(lse: Tensor, full: Tensor, rows: Tensor) -> Tensor:
    """Give the kept share of softmax mass per head, averaged over samples and rows.

    A kept row's normaliser is the mass of its kept keys: recall = exp(LSE_kept - LSE_dense).

    Args:
        lse: Of the sparse call, ``[batch, heads, seq_len]``.
        full: From ``dense_lse``, ``[batch, heads, count]``.
        rows: The rows of ``full``.

    Returns:
        fp32 ``[heads]``, in [0, 1]: a row whose two LSEs are rounded apart counts 1.
    """
    kept = lse[..., rows.to(lse.device, non_blocking=True)].float()
    return (kept - full).exp().clamp(max=1).mean((0, 2))


def relative_error(
    output: Tensor,
    exact: Tensor,
    rows: Tensor,
    text_start: int,
    text_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Estimate ||O - O_dense|| / ||O_dense|| per sample and head from a few rows.

    With e_i and d_i the squared norms of row i of the difference and of the dense output, R =
    sum e / sum d over n of S drawn rows is a ratio estimate, E = sqrt(R). Its standard error is
    the first-order one, with a_i = e_i - R d_i:
    s(R) = sqrt((1 - n / S) n / (n - 1) sum a^2) / sum d, s(E) = s(R) / (2 E)
    (Cochran 1977, "Sampling Techniques", chapters 2 and 6). It is for rows drawn anywhere; those
    of ``spread_rows`` spread less. Rows of padded text do not count.

    Args:
        output: What attention gave, ``[batch, seq_len, heads, head_dim]``.
        exact: From ``dense_output``, ``[batch, count, heads, head_dim]``.
        rows: The rows of ``exact``, int64 ``[count]``.
        text_start: Where the text begins.
        text_valid: Valid text tokens per sample; None: all.

    Returns:
        E and s(E), both ``[batch, heads]``, fp32 or wider; nan where a row is not finite.
    """
    seq_len, count = output.shape[1], len(rows)
    at = rows.to(output.device, non_blocking=True)
    exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
    lost = (output[:, at].to(exact.dtype) - exact).square().sum(-1)  # [batch, count, heads]
    whole = exact.square().sum(-1)
    if text_valid is not None:
        padding = _padding(at, text_start, text_valid)[..., None]
        lost, whole = lost.masked_fill(padding, 0.0), whole.masked_fill(padding, 0.0)
    tiny = torch.finfo(exact.dtype).tiny
    total = whole.sum(1).clamp(min=tiny)
    ratio = lost.sum(1) / total
    left_over = (lost - ratio[:, None] * whole).square().sum(1)
    drawn = max(0.0, 1 - count / seq_len) * count / max(count - 1, 1)
    error = ratio.sqrt()
    return error, (left_over * drawn).sqrt() / total / (2 * error.clamp(min=tiny))
