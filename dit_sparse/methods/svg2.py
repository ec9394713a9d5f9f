# SPDX-License-Identifier: Apache-2.0
"""SVG2: tokens grouped by k-means, clusters chosen by their centroids.

Source: Yang et al. 2025, "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via
Semantic-Aware Permutation", arXiv:2505.18875; compensation by means after Zhou et al.
2026, "SVG-EAR", arXiv:2603.08982.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.methods.composed import Composed, grown
from dit_sparse.methods.levels import threshold_at
from dit_sparse.methods.lists import (
    check_block_size,
    check_compensate,
    check_count,
    check_refresh,
    check_seed,
    check_share,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class SVG2(Method):
    """Cluster queries and keys, keep for every query cluster the key clusters with most weight.

    K-means (Lloyd, Euclidean) groups the video's queries and, apart, its keys; values follow keys.
    Query cluster i weighs key cluster j of n_j keys by n_j exp(c_i . c_j * scale) over the sum of
    this over all j (centroids c, fp32). Clusters are kept heaviest first while the weight before
    them is below ``top_p``, and at least int(``floor`` * key clusters) of them; empty ones never.
    Tokens are reordered so that a cluster's stand side by side; each is cut into blocks of at most
    ``block_size``. Text queries and text keys are kept whole in blocks of their own and are not
    clustered; padding takes no part.

    The first sparse call of a run draws its centroids among the tokens (seeded) and runs
    ``first_iterations``; later ones start from the last centroids and run ``iterations``. Samples,
    heads, layers and CFG branches each have their own, and a new run starts anew. (The released
    code shares them between branches, keeps them from one video to the next, and holds a batch to
    one.) No iteration is spent on dense steps.

    Small grids: there is no more than one query cluster for each block_size / 2 video tokens and
    one key cluster for each block_size / 4, rounded up, so that blocks do not fray; at block size
    128 the published counts stand from 32k tokens on.

    Memory: (query_clusters + key_clusters) * head_dim numbers a head, in the model's dtype: 0.53
    GB for Wan 14B at 720p and each branch.

    Args:
        query_clusters: Clusters of queries, 1 to 4096. The released scripts have 300 (Wan 720p),
            400 (HunyuanVideo 720p) and 200 (480p), the paper 100. More choose finer; blocks get
            shorter and the kernel slower.
        key_clusters: Clusters of keys, 1 to 4096; the scripts have 1000, the paper 500.
        top_p: Share of the weight to hold, in (0, 1]; 0.9 in the scripts. 1 keeps everything.
        floor: Share of key clusters that a query cluster keeps at least, in [0, 1]; 0.1 in the
            scripts, which bounds the density from below.
        first_iterations: Of k-means on the first sparse call, 1 to 1000; 50 in the scripts. For S
            tokens they take 25 * (query_clusters + key_clusters) / S of a dense call's
            multiplications, once: 0.43 for Wan at 720p.
        iterations: On every later choice, 1 to 1000; 2 in the scripts (1.7 % of dense there).
        compensate: "none", or "means": each block of a dropped cluster is read as one key, its
            mean key and mean value with weight n (+ ln n); the density counts it. SVG-EAR's
            compensation, without its choice of clusters by error and cost, and with means of a
            long cluster's blocks instead of the whole.
        refresh: Steps for which clusters and choice live, >= 1; 1 in the scripts. Higher is
            cheaper and staler, and keeps the plan in memory.
        seed: For the draw of the first centroids, from 0.
        block_size: Tokens in a block at most, 1 to 1024.
    """

    summary: ClassVar[str] = (
        "dynamic: k-means clusters of queries and keys, selected by centroid (SVG2, "
        "2505.18875), optional means for dropped clusters (SVG-EAR, 2603.08982)"
    )
    everything: ClassVar[Params] = {"top_p": 1.0}
    example: ClassVar[Params] = {
        "top_p": 0.5, "first_iterations": 5, "compensate": "means", "block_size": 8,
    }  # fmt: skip
    cheap_planning: ClassVar[Params] = {"refresh": 4, "first_iterations": 10}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "compensate=means")}
    density_params: ClassVar[tuple[str, ...]] = ("top_p",)
    stays: ClassVar[str] = "top_p and floor are fractions"

    query_clusters: int = 300
    key_clusters: int = 1000
    top_p: float = 0.9
    floor: float = 0.1
    first_iterations: int = 50
    iterations: int = 2
    compensate: Literal["none", "means"] = "none"
    refresh: int = 1
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check ranges."""
        check_count("query_clusters", self.query_clusters, (1, 4096), 300)
        check_count("key_clusters", self.key_clusters, (1, 4096), 1000)
        check_count("first_iterations", self.first_iterations, (1, 1000), 50)
        check_count("iterations", self.iterations, (1, 1000), 2)
        check_share("top_p", self.top_p, zero=False, hint=0.9)
        check_share("floor", self.floor, zero=True, hint=0.1)
        check_compensate(self.compensate)
        check_refresh(self.refresh)
        check_seed(self.seed)
        check_block_size(self.block_size)

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:  # noqa: ARG003
        """Guess ``top_p``; a search needs no more than ten first iterations."""
        floor = min(0.1, density)
        return {"top_p": threshold_at(density), "floor": floor, "first_iterations": 10}

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:  # noqa: ARG003
        """Turn ``top_p``."""
        return ({"top_p": share},)

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> SVG2:
        """Let the clusters grow with the tokens."""
        q, k = (grown(n, old, new) for n in (self.query_clusters, self.key_clusters))
        return replace(self, query_clusters=q, key_clusters=k)

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn that the number of clusters changes."""
        return ("the number of clusters was scaled in proportion to the tokens",)

    def clusters(self, video_tokens: int) -> tuple[int, int]:
        """Give the query and key clusters that are used for so many video tokens."""
        most_q, most_k = (
            min(-(-parts * video_tokens // self.block_size), video_tokens) for parts in (2, 4)
        )
        return min(self.query_clusters, most_q), min(self.key_clusters, most_k)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Cluster and choose, or reuse the last choice."""
        tokens = call.grid.video_tokens
        pieces = call.once((self, "pieces", tokens), lambda: self._pieces(tokens))
        return pieces.plan(call, ops)

    def _pieces(self, video_tokens: int) -> Composed:
        query_clusters, key_clusters = self.clusters(video_tokens)
        return Composed(
            query_order="clusters",
            key_order="clusters",
            score="centroid",
            select="top_p",
            compensate=self.compensate,
            top_p=self.top_p,
            floor=self.floor,
            query_clusters=query_clusters,
            key_clusters=key_clusters,
            first_iterations=self.first_iterations,
            iterations=self.iterations,
            refresh=self.refresh,
            seed=self.seed,
            block_size=self.block_size,
        )
