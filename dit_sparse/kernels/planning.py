# SPDX-License-Identifier: Apache-2.0
"""The planning operations by name, as methods use them (``call.Ops``).

They are written in torch alone and run on any device, so no kernel has to be chosen. Each is
documented where it is defined. None reads device memory back, but for the longest cluster on the
CPU (``cluster_order``).
"""

from __future__ import annotations

from dit_sparse.kernels.antidiagonal import antidiagonal
from dit_sparse.kernels.kmeans import cluster_order, expand_clusters, kmeans
from dit_sparse.kernels.permute import gather_tokens, scatter_tokens
from dit_sparse.kernels.pool import moments, pool, pooled_scores
from dit_sparse.kernels.select import select_budget, select_top_k, select_top_p
from dit_sparse.kernels.tile_maximum import tile_maximum


class Planning:
    """What a method needs to choose blocks, beside the exact block mass."""

    pool = staticmethod(pool)
    moments = staticmethod(moments)
    pooled_scores = staticmethod(pooled_scores)
    antidiagonal = staticmethod(antidiagonal)
    tile_maximum = staticmethod(tile_maximum)
    kmeans = staticmethod(kmeans)
    cluster_order = staticmethod(cluster_order)
    expand_clusters = staticmethod(expand_clusters)
    select_budget = staticmethod(select_budget)
    select_top_k = staticmethod(select_top_k)
    select_top_p = staticmethod(select_top_p)
    gather_tokens = staticmethod(gather_tokens)
    scatter_tokens = staticmethod(scatter_tokens)
