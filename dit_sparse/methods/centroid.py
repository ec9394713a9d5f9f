# SPDX-License-Identifier: Apache-2.0
"""Centroid attention: near keys one by one, the rest by the centroids of their clusters.

Our own composition of published pieces; no paper that we know has it. Keys are clustered (SVG2,
arXiv:2505.18875), pairs of groups are chosen by centroid under one budget a head, and every
dropped cluster is read as its centroid (BLADE, arXiv:2508.10774; SVG-EAR, arXiv:2603.08982), so
that no key is ever lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from dit_sparse.core.call import Method
from dit_sparse.errors import StrategyError
from dit_sparse.methods.composed import Composed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.core.traits import Params


@dataclass(frozen=True, slots=True)
class Centroid(Method):
    """Read the clusters of keys that matter key by key, every other one as its centroid.

    K-means (Lloyd, Euclidean) groups the video's keys and, separately, its queries. A query group
    weighs a key cluster of n keys by n exp(c_i . c_j * scale) (centroids c, fp32). The pairs of a
    head where a mean would make the largest error per key (``selection.error_of_means``) are
    computed exactly, until ``density`` of its pairs are used up; every other cluster is one key,
    its mean key and mean value with + ln n. Queries with broad attention therefore get more exact
    keys than those with narrow attention.

    It is ``composed`` with clusters, centroid scores, a budget and means. Each choice starts from
    the previous centroids, so few iterations suffice. Means are of every step's own keys, also
    while a choice is reused.

    Text queries and text keys are kept whole; padding takes no part. Samples, heads and CFG
    branches have clusters of their own.

    Memory: centroids, 0.7 GB for Wan 14B at 720p and each branch. With ``refresh`` above 1 the
    choice too, for each head 8 bytes a token and a byte for each pair of clusters: 2.7 GB in all.

    Args:
        density: Share of the video's pairs that is computed, centroids included, in (0, 1]; on
            top comes the text. Higher is closer to dense and slower. Centroids are always read:
            where a given number of them exceeds it, nothing is read exactly.
        queries: "clusters", or "tiles": boxes of ``tile``, cheaper by the queries' clustering and
            a little less exact.
        query_clusters: 1 to 4096; 0: twice the square root of the video's tokens.
        key_clusters: 1 to 4096; 0: 4 times the square root, but at most half of a query's budget
            of density * tokens keys. More choose finer; each takes one key of that budget.
        first_iterations: Of k-means on the first sparse call of a run, 1 to 1000.
        iterations: On every later choice, 1 to 1000. For S tokens each takes
            (query_clusters + key_clusters) / (2 S) of a dense call's multiplications: 1.1 % for
            Wan at 720p.
        refresh: Steps for which a choice lives, >= 1. Higher is cheaper and staler; above 1 the
            choice is kept in memory.
        tile: Frames, rows and columns of a tile of queries; at most 1024 tokens.
        seed: For the draw of the first centroids, from 0.
        block_size: Tokens in a block at most, 1 to 1024; a longer cluster is cut.
    """

    summary: ClassVar[str] = (
        "dynamic: key clusters attended token by token or as their centroid, one budget per "
        "head (ours, from SVG2, 2505.18875, and SVG-EAR, 2603.08982)"
    )
    example: ClassVar[Params] = {"density": 0.5, "tile": [2, 2, 2], "block_size": 8}
    cheap_planning: ClassVar[Params] = {"refresh": 4}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ("", "queries=tiles")}
    stays: ClassVar[str] = "density is a fraction, and the number of clusters scales with the "
    "tokens unless it is set"

    density: float = 0.25
    queries: Literal["clusters", "tiles"] = "clusters"
    query_clusters: int = 0
    key_clusters: int = 0
    first_iterations: int = 3
    iterations: int = 1
    refresh: int = 1
    tile: tuple[int, int, int] = (4, 4, 4)
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.queries not in {"clusters", "tiles"}:
            raise StrategyError(f"queries must be 'clusters' or 'tiles', got {self.queries!r:.40}")
        self._pieces()

    @property
    def compensates(self) -> bool:
        """Every dropped cluster is read as its centroid."""
        return True

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> Centroid:
        """Let given numbers of clusters grow with the tokens."""
        grown = self._pieces().rescaled(old, new)
        return replace(self, query_clusters=grown.query_clusters, key_clusters=grown.key_clusters)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Cluster and choose, or reuse the last choice."""
        return call.once((self, "pieces"), self._pieces).plan(call, ops)

    def _pieces(self) -> Composed:
        return Composed(
            query_order=self.queries,
            key_order="clusters",
            score="centroid",
            density=self.density,
            query_clusters=self.query_clusters,
            key_clusters=self.key_clusters,
            first_iterations=self.first_iterations,
            iterations=self.iterations,
            refresh=self.refresh,
            tile=self.tile,
            seed=self.seed,
            block_size=self.block_size,
        )
