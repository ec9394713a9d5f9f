# SPDX-License-Identifier: Apache-2.0
"""K-means in Triton: nearest centroid and means, for every (sample, head) in one launch.

Lloyd's iterations, what ``kmeans.py`` does in torch: here neither the distances (tokens x
centroids) nor a copy of the tokens is ever in memory. The means are the same bits every time:
tokens are sorted by label, and runs of sorted tokens are added in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from dit_sparse.core.grid import BlockLayout
from dit_sparse.errors import KernelError
from dit_sparse.kernels.triton_attention import reasons_against_tensor
from dit_sparse.kernels.triton_blocks import (
    head_rows,
    load_rows,
    own_rows,
    row_mask,
    side_offsets,
)
from dit_sparse.kernels.triton_launch import (
    Launch,
    alignment,
    padded_dim,
    rows_of,
    tile_table,
    walked_side,
)
from dit_sparse.kernels.triton_target import Tiling, kmeans_tiling, precision, target_of

if TYPE_CHECKING:
    from torch import Tensor

RUN = 256  # sorted tokens that one program adds up
STEP = 32  # of them at a time


@triton.jit
def kmeans_assign_kernel(
    points,
    p_centres,
    p_half_norms,
    p_labels,
    tokens,
    clusters,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Find the nearest of ``clusters`` centroids for ``BLOCK_M`` tokens of one (sample, head).

    ``|x - c|^2`` is smallest where ``x c - |c|^2 / 2`` is largest. Each of the ``BLOCK_N`` columns
    keeps the best of its own centroids, and the first of equals; they are compared at the end.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group = i_batch * tl.num_programs(1) + i_head
    start = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = start + rows < tokens
    b_x = load_rows(
        head_rows(points, i_batch, i_head, ALIGN), points, None, 0, start, rows, m_rows,
        HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    dims = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    p_half_norms += i_group * clusters
    p_centres += i_group * clusters * HEAD_DIM
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_M, BLOCK_N], tl.int32) + columns[None, :]
    for first in range(0, clusters, BLOCK_N):
        m_columns = first + columns < clusters
        p_c = p_centres + (first + columns)[:, None] * HEAD_DIM + dims[None, :]
        b_c = tl.load(p_c, mask=row_mask(m_columns, HEAD_DIM, BLOCK_D), other=0.0)
        half_norm = tl.load(p_half_norms + first + columns, mask=m_columns, other=float("inf"))
        near = tl.dot(b_x, tl.trans(b_c), input_precision=PRECISION) - half_norm[None, :]
        better = near > best  # [BLOCK_M, BLOCK_N]
        best = tl.where(better, near, best)
        label = tl.where(better, first + columns[None, :], label)
    highest = tl.max(best, 1)  # [BLOCK_M]
    found = tl.min(tl.where(best == highest[:, None], label, clusters), 1)
    tl.store(p_labels + i_group * tokens + start + rows, found, mask=m_rows)


@triton.jit
def kmeans_sum_kernel(
    points,
    p_order,
    p_sums,
    runs,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
    STEP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Add up one run of at most ``RUN`` sorted tokens, all of one cluster."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_group = i_batch * tl.num_programs(1) + i_head
    at = side_offsets(runs, i_batch, i_head)
    _, start, length, first = own_rows(runs, at, i_batch, i_head, RUN)
    p_points = head_rows(points, i_batch, i_head, ALIGN)
    total = tl.zeros([BLOCK_D], tl.float32)
    end = tl.minimum(first + RUN, length)
    for done in tl.range(first, end, STEP):
        rows = done + tl.arange(0, STEP)  # [STEP]
        b_x = load_rows(
            p_points, points, p_order, i_group * tokens, start, rows, rows < end,
            HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip  # [STEP, BLOCK_D]
        total += tl.sum(b_x.to(tl.float32), 0)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    i_run = i_group * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_sums + i_run * HEAD_DIM + columns, total, mask=columns < HEAD_DIM)


@triton.jit
def kmeans_mean_kernel(
    p_sums,
    p_starts,
    p_counts,
    p_centroids,
    runs,
    clusters,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    """Add up the runs of one cluster and divide; an empty one keeps its centroid."""
    i_cluster = tl.program_id(0)
    i_group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    i_cluster = i_group * clusters + i_cluster
    count = tl.load(p_counts + i_cluster)
    first = tl.load(p_starts + i_cluster)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_columns = columns < HEAD_DIM
    p_sums += (i_group * runs + first) * HEAD_DIM + columns
    total = tl.zeros([BLOCK_D], tl.float32)
    for i_run in range((count + RUN - 1) // RUN):
        total += tl.load(p_sums + i_run * HEAD_DIM, mask=m_columns, other=0.0)
    written = tl.where(count > 0, HEAD_DIM, 0)
    tl.store(p_centroids + i_cluster * HEAD_DIM + columns, total / count, mask=columns < written)


def assign_launch(
    points: Tensor, centres: Tensor, half_norms: Tensor, labels: Tensor, tiling: Tiling
) -> Launch:
    """Say how ``labels`` are found.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides.
        centres: ``[batch, heads, clusters, head_dim]``, contiguous, the dtype of ``points``.
        half_norms: ``|c|^2 / 2`` of these, fp32 ``[batch, heads, clusters]``, contiguous.
        labels: int32 ``[batch, heads, seq_len]``, contiguous; written.
        tiling: Tile sizes and launch options.
    """
    batch, tokens, heads, head_dim = points.shape
    arguments = {
        "points": rows_of(points),
        "p_centres": centres,
        "p_half_norms": half_norms,
        "p_labels": labels,
        "tokens": tokens,
        "clusters": centres.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "PRECISION": precision(points.dtype),
        "ALIGN": alignment(points),
    }
    grid = (triton.cdiv(tokens, tiling.block_m), heads, batch)
    return Launch(kmeans_assign_kernel, grid, arguments, tiling.warps, tiling.stages)


def update_launches(points: Tensor, order: Tensor, counts: Tensor, out: Tensor) -> list[Launch]:
    """Say how the means of clusters with any token are written to ``out``.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides.
        order: Tokens sorted by cluster, int64 ``[batch, heads, seq_len]``, contiguous.
        counts: Tokens of every cluster, int32 ``[batch, heads, clusters]``, contiguous.
        out: fp32 ``[batch, heads, clusters, head_dim]``, contiguous.
    """
    batch, tokens, heads, head_dim = points.shape
    clusters = counts.shape[2]
    starts = counts.cumsum(-1, dtype=torch.int32) - counts
    layout = BlockLayout(starts, counts, tokens, tokens)
    table = tile_table(layout, RUN)
    runs = (counts + (RUN - 1)) // RUN
    sums = torch.empty(batch, heads, table.shape[2], head_dim, device=points.device)
    shared = {"HEAD_DIM": head_dim, "BLOCK_D": padded_dim(head_dim), "RUN": RUN}
    side = walked_side(layout)
    side = side._replace(tiles=table, tiles_batch=table.stride(0), tiles_head=table.stride(1))
    first = {
        "points": rows_of(points),
        "p_order": order,
        "p_sums": sums,
        "runs": side,
        "tokens": tokens,
        "STEP": STEP,
        "ALIGN": alignment(points),
        **shared,
    }
    second = {
        "p_sums": sums,
        "p_starts": runs.cumsum(-1, dtype=torch.int32) - runs,
        "p_counts": counts,
        "p_centroids": out,
        "runs": table.shape[2],
        "clusters": clusters,
        **shared,
    }
    return [
        Launch(kmeans_sum_kernel, (table.shape[2], heads, batch), first, 4, 2),
        Launch(kmeans_mean_kernel, (clusters, heads, batch), second, 1, 1),
    ]


def assign(points: Tensor, centroids: Tensor, tiling: Tiling | None = None) -> Tensor:
    """Give every token the number of its nearest centroid; of equals the lowest.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides; fp16, bf16 or fp32.
        centroids: fp32 ``[batch, heads, clusters, head_dim]``; rounded to the dtype of
            ``points`` first, as the tensor cores multiply them.
        tiling: Tile sizes; chosen by the device where None.

    Returns:
        int32 ``[batch, heads, seq_len]``.
    """
    batch, tokens, heads, head_dim = points.shape
    centres = centroids.to(points.dtype).contiguous()
    half_norms = centres.float().square().sum(-1) / 2
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=points.device)
    if tiling is None:
        tiling = kmeans_tiling(target_of(points.device), points.dtype, head_dim, centres.shape[2])
    assign_launch(points, centres, half_norms, labels, tiling).run()
    return labels


def update(points: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Take the mean of every cluster's tokens, in float32; an empty one keeps its centroid.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides; fp16, bf16 or fp32.
        labels: int32 ``[batch, heads, seq_len]``, each in ``[0, clusters)``.
        centroids: fp32 ``[batch, heads, clusters, head_dim]``; not changed.

    Returns:
        New centroids, and how many tokens each has, int32 ``[batch, heads, clusters]``.
    """
    ranked, order = labels.sort(dim=-1, stable=True)
    cluster = torch.arange(centroids.shape[2], dtype=labels.dtype, device=labels.device)
    cluster = cluster.expand(*labels.shape[:2], -1).contiguous()
    ends = torch.searchsorted(ranked, cluster, right=True, out_int32=True)
    counts = ends.diff(dim=-1, prepend=ends.new_zeros(*ends.shape[:2], 1))
    means = centroids.float().clone(memory_format=torch.contiguous_format)
    for launch in update_launches(points, order, counts.contiguous(), means):
        launch.run()
    return means, counts


def lloyd(points: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assign and update ``iterations`` times, as ``kmeans.kmeans`` does in torch.

    Args:
        points: ``[batch, seq_len, heads, head_dim]``, any strides; fp16, bf16 or fp32.
        centroids: To start from, ``[batch, heads, clusters, head_dim]``.
        iterations: At least 1.

    Returns:
        Centroids fp32, labels and counts int32, as ``kmeans.kmeans`` returns them.
    """
    if reasons := reasons_against_tensor(points):
        raise KernelError("triton cannot run this k-means:\n" + "\n".join(reasons))
    batch, _, heads, head_dim = points.shape
    if centroids.ndim != 4 or (*centroids.shape[:2], centroids.shape[3]) != (
        batch, heads, head_dim,
    ):  # fmt: skip
        raise KernelError(
            f"centroids must be [batch, heads, clusters, head_dim] = ({batch}, {heads}, ..., "
            f"{head_dim}) like points, got {tuple(centroids.shape)}"
        )
    if centroids.device != points.device or iterations < 1:
        raise KernelError(
            f"k-means needs iterations >= 1, got {iterations}, and centroids on {points.device} "
            f"like points, got {centroids.device}"
        )
    centroids = centroids.float()
    labels = counts = torch.empty(0)
    for _ in range(iterations):
        labels = assign(points, centroids)
        centroids, counts = update(points, labels, centroids)
    return centroids, labels, counts
