# SPDX-License-Identifier: Apache-2.0
"""K-means over tokens, one clustering for every (sample, head), and the token order it gives.

Lloyd's iterations with squared Euclidean distance, as SVG2 uses them (Yang et al. 2025,
arXiv:2505.18875), a fixed number of them: nothing is read back to test for convergence. But on the
CPU, where reading is free, they end once no label changes, which gives the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import KernelError
from dit_sparse.kernels.chunks import (
    HALF,
    budget,
    head_parts,
    scores,
    seeded_order,
    segment_sums,
    work_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Lloyd = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def kmeans(
    points: Tensor,
    clusters: int,
    iterations: int,
    *,
    init: Tensor | None = None,
    seed: int = 0,
    heads: Tensor | None = None,
    lloyd: Lloyd | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the tokens of each (sample, head); more iterations fit better and cost as much each.

    A tie goes to the cluster with the lower number. A cluster that nobody chose keeps the
    centroid it had and counts 0.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides; leave padding tokens out.
        clusters: How many, at least 1; beyond ``seq_len`` the rest stay empty.
        iterations: At least 1, each an assignment and an update.
        init: Centroids to start from ``[batch, heads, clusters, head_dim]`` (warm start). None:
            tokens drawn without replacement, the same for the same seed on any device, and the
            same places in every sample: who else is in the batch changes nothing.
        seed: For the draw.
        heads: Number of each head, which its draw goes by, int64 ``[heads]``; None: 0, 1, ...
        lloyd: Runs the iterations from ``(points, init, iterations)`` in another way; None: torch.

    Returns:
        Centroids fp32 ``[batch, heads, clusters, head_dim]``, labels int32 ``[batch, heads,
        seq_len]`` of the last assignment, whose means the centroids are, and how many tokens
        each has, int32 ``[batch, heads, clusters]``.
    """
    batch, tokens, count, dim = points.shape
    if clusters < 1 or iterations < 1:
        raise KernelError(
            f"k-means needs clusters >= 1 and iterations >= 1, got {clusters} and {iterations}"
        )
    wanted = (batch, count, clusters, dim)
    if init is not None and tuple(init.shape) != wanted:
        raise KernelError(
            f"init must be [batch, heads, clusters, head_dim] = {wanted}, got "
            f"{tuple(init.shape)}; start without it where the shape changed"
        )
    work = work_dtype(points.dtype)
    if init is None:
        init = _drawn(points, clusters, seed, heads)
    if lloyd is not None:
        return lloyd(points, init, iterations)
    centroids = torch.empty(wanted, dtype=work, device=points.device)
    labels = torch.empty(batch, count, tokens, dtype=torch.int32, device=points.device)
    counts = torch.empty(batch, count, clusters, dtype=torch.int32, device=points.device)
    per_head = 2 * batch * tokens * dim * work.itemsize
    for part in head_parts(count, per_head, points.device):
        x = points[:, :, part].transpose(1, 2)
        x = x.reshape(-1, tokens, dim)  # [batch * part, tokens, dim]
        if not (points.is_cuda and points.dtype in HALF):
            x = x.to(work)
        means = init[:, part].reshape(-1, clusters, dim).to(work)
        label = torch.empty(0, dtype=torch.int64, device=x.device)
        for _ in range(iterations):
            last = label
            label, means, sizes = _lloyd(x, means)
            if label.device.type == "cpu" and torch.equal(label, last):
                break  # the same labels give the same means
        lead = (batch, -1)
        centroids[:, part] = means.unflatten(0, lead)
        labels[:, part] = label.unflatten(0, lead)
        counts[:, part] = sizes.unflatten(0, lead)
    return centroids.float(), labels, counts


@torch.no_grad()
def cluster_order(
    labels: Tensor, counts: Tensor, max_length: int | None = None
) -> tuple[Tensor, BlockLayout, Tensor]:
    """Order tokens by cluster, and lay blocks over the clusters.

    A layout has to say how long its longest block is without asking the device. So give
    ``max_length``: a cluster is cut into pieces of at most that many tokens, in a fixed number of
    blocks, ``clusters + seq_len // max_length``, of which the last may be empty. Without it every
    cluster is one block, and the layout's ``max_length`` is the longest on the CPU, where reading
    is free, and all of ``seq_len`` elsewhere.

    Args:
        labels: int32 ``[batch, heads, seq_len]``, each in ``[0, clusters)``.
        counts: int32 ``[batch, heads, clusters]``: how often each label occurs.
        max_length: Tokens in a block at most.

    Returns:
        Permutation int64 ``[batch, heads, seq_len]``, stable; the layout; and the cluster of
        every block, int64 ``[batch, heads, blocks]``, for ``expand_clusters``.
    """
    batch, heads, tokens = labels.shape
    clusters = counts.shape[-1]
    permutation = labels.argsort(dim=-1, stable=True)
    starts = counts.cumsum(-1, dtype=torch.int32) - counts
    if max_length is None:
        longest = int(counts.max()) if counts.device.type == "cpu" else tokens
        owner = torch.arange(clusters, device=counts.device).expand(batch, heads, -1)
        return permutation, BlockLayout(starts, counts, tokens, max(1, longest)), owner
    if max_length < 1:
        raise KernelError(f"max_length must be at least 1, got {max_length}")
    pieces = (counts + (max_length - 1)) // max_length
    behind = pieces.cumsum(-1, dtype=torch.int32)  # blocks up to and with each cluster
    block = torch.arange(clusters + tokens // max_length, dtype=torch.int32, device=counts.device)
    block = block.expand(batch, heads, -1).contiguous()
    found = torch.searchsorted(behind, block, right=True)  # clusters where the block is spare
    owner = found.clamp(max=clusters - 1)
    skip = (block - (behind - pieces).gather(-1, owner)) * max_length
    length = (counts.gather(-1, owner) - skip).clamp(0, max_length)
    spare = found == clusters
    start = torch.where(spare, 0, starts.gather(-1, owner) + skip)
    layout = BlockLayout(start, length.masked_fill(spare, 0), tokens, max_length)
    return permutation, layout, owner


def expand_clusters(mask: Tensor, q_owner: Tensor, kv_owner: Tensor) -> Tensor:
    """Spell a mask over clusters out over the blocks of ``cluster_order``.

    Args:
        mask: bool ``[batch, heads, q_clusters, kv_clusters]``.
        q_owner: int64 ``[batch, heads, q_blocks]``.
        kv_owner: int64 ``[batch, heads, kv_blocks]``.

    Returns:
        bool ``[batch, heads, q_blocks, kv_blocks]``.
    """
    rows = mask.gather(2, q_owner[..., None].expand(-1, -1, -1, mask.shape[-1]))
    return rows.gather(3, kv_owner[:, :, None].expand(-1, -1, rows.shape[2], -1))


def _drawn(points: Tensor, clusters: int, seed: int, heads: Tensor | None) -> Tensor:
    batch, tokens, count, dim = points.shape
    rows = (1, count) if heads is None else heads[None]
    order = seeded_order(seed, rows, tokens, points.device)
    place = torch.arange(clusters, device=points.device) % tokens
    token = order[..., place]  # [1, heads, clusters]
    return points.transpose(1, 2).gather(2, token[..., None].expand(batch, -1, -1, dim))


def _argmax(x: Tensor) -> Tensor:
    """Find the largest of each row, the first of equals on a CPU."""
    if x.device.type == "cpu" and x.dtype in {torch.float32, torch.float64}:
        return torch.from_numpy(x.numpy().argmax(-1))  # vectorised, torch's is not
    return x.argmax(-1)


def _less_scores(constant: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Subtract ``constant [groups, 1, c]`` from the products of ``x`` and ``centre``."""
    if x.device.type == "cpu":  # in one pass
        return torch.baddbmm(constant, x, centre.transpose(1, 2), beta=-1)
    return scores(x, centre).sub_(constant)


def _lloyd(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assign ``x [groups, n, d]`` to the nearest of ``means [groups, c, d]``, take new means."""
    groups, tokens, _ = x.shape
    clusters = means.shape[1]
    centre = means.to(x.dtype)  # as it is multiplied: half on an accelerator
    half_norm = centre.to(means.dtype).square().sum(-1)[:, None] / 2
    step = max(1, budget(x.device) // (groups * clusters * means.element_size()))
    label = torch.empty(groups, tokens, dtype=torch.int64, device=x.device)
    for start in range(0, tokens, step):
        # |x - c|^2 is smallest where x c - |c|^2 / 2 is largest.
        near = _less_scores(half_norm, x[:, start : start + step], centre)
        label[:, start : start + step] = _argmax(near)
    count = label.new_zeros(groups, clusters).scatter_add_(1, label, torch.ones_like(label))
    mean = segment_sums(x, label, clusters) / count.clamp(min=1)[..., None]
    return label, torch.where(count[..., None] > 0, mean, means), count
