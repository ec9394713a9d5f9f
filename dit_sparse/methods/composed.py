# SPDX-License-Identifier: Apache-2.0
"""A method put together from pieces: order, score, selection and compensation by name.

Each piece is described where it stands in the literature: 3-D tiles (STA, arXiv:2502.04507; GNA,
arXiv:2504.16922), the Hilbert curve and sampled maxima (BLADE, arXiv:2508.10774), k-means
and centroids (SVG2, arXiv:2505.18875), antidiagonals (XAttention, arXiv:2503.16428), exact
mass (AdaSpa, arXiv:2502.21079), thresholds in units of a row's spread (Sol-Attn,
arXiv:2607.24027), means of what is dropped (BLADE; SVG-EAR, arXiv:2603.08982).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.grid import LatentsGrid, cut
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods.gilbert import gilbert_order
from dit_sparse.methods.lists import (
    check_block_size,
    check_count,
    check_refresh,
    check_seed,
    check_share,
    compensated,
    head_numbers,
    identity,
    select_by_two,
    share_of,
)
from dit_sparse.methods.order import morton_order, tile_order
from dit_sparse.methods.selection import above_spread, best, within_budget, worst_means
from dit_sparse.methods.sides import Side, cluster_side, fixed_side, plan_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.traits import Params

Order = Literal["raster", "tiles", "hilbert", "morton", "clusters"]
Score = Literal["mean", "centroid", "maximum", "antidiagonal", "mass"]
Select = Literal["budget", "top_k", "top_p", "threshold"]
Compensate = Literal["none", "means"]
MAX_CLUSTERS = 4096
_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary


@dataclass(frozen=True, slots=True)
class Composed(Method):
    """Choose pairs of token groups by pieces that are named.

    The video's tokens stand in groups, queries and keys in orders of their own. Each pair of a
    query group and a key group gets a score, a selection keeps some pairs, and dropped ones may be
    read as their means. Text queries and text keys are kept whole; padding takes no part. Samples,
    heads and CFG branches choose independently. The defaults need no clustering: 3-D tiles by
    their means, with means of what is dropped.

    Without compensation every query group keeps its best key group, whatever the selection says.

    Args:
        query_order: How query tokens are grouped. "raster": runs of ``block_size`` tokens as they
            stand. "tiles": boxes of ``tile``. "hilbert", "morton": runs of ``block_size`` along
            the curve. "clusters": k-means (Lloyd, Euclidean), each cluster cut into blocks of at
            most ``block_size``.
        key_order: The same for keys.
        score: "mean": mean query . mean key * scale. "centroid": the same, + ln n for n keys in
            the group, as a softmax over groups of unequal size wants it. "maximum": BLADE's
            largest sampled weight, not for a budget. "antidiagonal": XAttention's estimate of the
            mass. "mass": the exact softmax mass; the call that chooses is then dense. The last
            three do not support clusters.
        select: "budget": the best pairs of a head, until ``density`` is used up, so that query
            groups differ in what they keep. Best are, without compensation, those with most
            weight per key; with means, those where a mean would make the largest error per key
            (``selection.error_of_means``). "top_k": a fixed share of key
            groups for every query group. "top_p": the fewest key groups that hold ``top_p`` of
            its weight. "threshold": scores above the row's mean by ``threshold`` of its standard
            deviations.
        compensate: "none", or "means": each dropped key block is read as one key, its mean key and
            mean value with + ln n, in one softmax with the kept keys. (For the dropped keys' part
            at the last dense step, use ``rettention`` with a mask of this method.)
        density: For budget and top_k, in (0, 1]. Budget: share of the video's pairs, means
            included. top_k: share of key groups, rounded half up; means come on top.
        top_p: For top_p: share of the weight to hold, in (0, 1].
        floor: For top_p: share of key groups that a query group keeps at least, in [0, 1].
        threshold: For threshold, from -10 to 10; Sol-Attn has 0.8 to 1.5. Higher keeps less.
        tile: Frames, rows and columns of a tile, at most 1024 tokens. On an axis shorter than
            the tile its other sides are doubled while it holds no more tokens.
        query_clusters: For clusters, 1 to 4096; 0: twice the square root of the video's tokens,
            550 for Wan at 720p.
        key_clusters: The same; 0: 4 times the square root, for a budget with means at most so
            many that their means take half of it.
        first_iterations: Of k-means on the first sparse call of a run, 1 to 1000; it starts from
            a seeded draw of tokens.
        iterations: On every later choice, which starts from the last centroids, 1 to 1000.
        samples: For maximum: tokens drawn of each block, 1 to 1024.
        stride: For antidiagonal: tokens in a run, 1 to 1024.
        refresh: Steps for which a choice lives, >= 1, for mass >= 2. Higher is cheaper and staler,
            and keeps the choice in memory. Means are of every step's own keys.
        seed: For draws, from 0.
        block_size: Tokens in a block at most, 1 to 1024; a tile is a block.
    """

    summary: ClassVar[str] = (
        "dynamic: order, score, selection and compensation chosen by name; by default 3-D tiles "
        "with means for dropped tiles (pieces of GNA, 2504.16922, and BLADE, 2508.10774)"
    )
    example: ClassVar[Params] = {"density": 0.5, "tile": [2, 2, 2], "block_size": 8}
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "default": ("", "score=maximum:select=top_k", "query_order=hilbert:key_order=hilbert"),
        "quick": ("",),
    }
    stays: ClassVar[str] = "density, top_p and floor are fractions, and a tile has the same "
    "number of tokens"

    query_order: Order = "tiles"
    key_order: Order = "tiles"
    score: Score = "mean"
    select: Select = "budget"
    compensate: Compensate = "means"
    density: float = 0.25
    top_p: float = 0.9
    floor: float = 0.0
    threshold: float = 1.0
    tile: tuple[int, int, int] = (4, 4, 4)
    query_clusters: int = 0
    key_clusters: int = 0
    first_iterations: int = 3
    iterations: int = 1
    samples: int = 32
    stride: int = 8
    refresh: int = 1
    seed: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check ranges, and that the pieces fit each other."""
        for name, kinds in (
            ("query_order", Order), ("key_order", Order), ("score", Score), ("select", Select),
            ("compensate", Compensate),
        ):  # fmt: skip
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise StrategyError(f"{name} must be one of {', '.join(known)}, got {value!r:.40}")
        check_share("density", self.density, zero=False, hint=0.25)
        check_share("top_p", self.top_p, zero=False, hint=0.9)
        check_share("floor", self.floor, zero=True, hint=0.0)
        if not -10 <= self.threshold <= 10:
            raise StrategyError(
                f"threshold must lie in [-10, 10] standard deviations, got {self.threshold}; try 1"
            )
        check_tile(self.tile)
        check_count("query_clusters", self.query_clusters, (0, MAX_CLUSTERS), 0)
        check_count("key_clusters", self.key_clusters, (0, MAX_CLUSTERS), 0)
        check_count("first_iterations", self.first_iterations, (1, 1000), 3)
        check_count("iterations", self.iterations, (1, 1000), 1)
        check_count("samples", self.samples, (1, 1024), 32)
        check_count("stride", self.stride, (1, 1024), 8)
        check_refresh(self.refresh)
        check_seed(self.seed)
        check_block_size(self.block_size)
        if self.clustered and self.score not in {"mean", "centroid"}:
            raise StrategyError(
                f"score {self.score!r} requires a fixed order, got clusters; try score "
                "'centroid', or tiles for both orders"
            )
        if self.score == "maximum" and self.select == "budget":
            raise StrategyError(
                "score 'maximum' only ranks blocks within a row, so it cannot be used with select "
                "'budget'; try 'top_k'"
            )
        if self.score == "mass" and self.refresh < 2:
            raise StrategyError(
                "refresh must be at least 2 with score 'mass', because a call that chooses is "
                f"dense and later steps must reuse the choice; got {self.refresh}; try 4"
            )

    @property
    def clustered(self) -> bool:
        """Whether a side is ordered by k-means."""
        return "clusters" in {self.query_order, self.key_order}

    @property
    def period(self) -> int | None:
        """Steps from one dense call, which gives the exact mass, to the next."""
        return self.refresh if self.score == "mass" else None

    @property
    def asked_density(self) -> float | None:
        """The density of a budget; what other selections keep depends on the content or grid."""
        return self.density if self.select == "budget" else None

    @property
    def block_tokens(self) -> int:
        """Tokens in a block, at most."""
        only_tiles = {self.query_order, self.key_order} == {"tiles"}
        return prod(self.tile) if only_tiles else max(self.block_size, prod(self.tile))

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:  # noqa: ARG003
        """Give the budget."""
        return {"density": density}

    @classmethod
    def choices(cls, params: Params) -> list[tuple[Params, bool]]:
        """Try several densities where the selection goes by density."""
        by_density = params.get("select", "budget") in {"budget", "top_k"}
        return [(params, by_density and "density" not in params)]

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> Composed:
        """Let given numbers of clusters grow with the tokens."""
        q, k = (grown(n, old, new) for n in (self.query_clusters, self.key_clusters))
        return replace(self, query_clusters=q, key_clusters=k)

    def clusters(self, video_tokens: int) -> tuple[int, int]:
        """Give the query and key clusters that are used for so many video tokens."""
        usual = [2 * sqrt(video_tokens), 4 * sqrt(video_tokens)]
        if self.select == "budget" and self.compensate == "means":
            usual[1] = max(1, min(usual[1], self.density * video_tokens / 2))
        given = (self.query_clusters, self.key_clusters)
        q, k = (
            min(n or ceil(m), video_tokens, MAX_CLUSTERS)
            for n, m in zip(given, usual, strict=True)
        )
        return q, k

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Group and choose, or reuse the last choice."""
        everything = call.layout(self.block_size), call.key_layout(self.block_size)
        if self._keeps_all:
            return BlockPlan.full(*everything)
        call.grid.check_blocks(self.block_size)
        state = call.state
        if state.get("for") != identity(call) or call.step < state["made"]:
            state.clear()
        if "mask" not in state or call.step - state["made"] >= self.refresh:
            if self.score == "mass":
                state.clear()
                return BlockPlan.full(*everything)
            self._choose(call, ops, None)
        plan = plan_groups(call, state["q"], state["kv"], state["mask"], ops)
        if self.refresh == 1:  # nobody will ask for them again
            for name in ("q", "kv", "mask"):
                state.pop(name)
        if self.query_order == "raster":
            plan = replace(plan, q_permutation=None)
        if self.key_order == "raster":
            plan = replace(plan, kv_permutation=None)
        return compensated(plan, self.compensate)

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Choose by mass after the dense call; returns ``output`` as it is."""
        if self.score == "mass" and "mask" not in call.state and not self._keeps_all:
            self._choose(call, ops, lse)
        return output

    @property
    def _keeps_all(self) -> bool:
        if self.select == "top_p":
            return self.top_p == 1 or self.floor == 1
        return self.select != "threshold" and self.density == 1

    def _choose(self, call: AttentionCall, ops: Ops, lse: Tensor | None) -> None:
        """Put both sides and the kept pairs of their groups into the state."""
        state, grid = call.state, call.grid
        video = slice(grid.video_start, grid.video_start + grid.video_tokens)
        sides: list[Side] = []
        means: list[Tensor] = []
        for i_side, (name, order, x, clusters) in enumerate(
            zip(
                ("q", "kv"),
                (self.query_order, self.key_order),
                (call.query[:, video], call.key[:, video]),
                self.clusters(grid.video_tokens),
                strict=True,
            )
        ):
            if order == "clusters":
                last = state.get(f"{name}_centroids")
                side, mean = cluster_side(
                    x,
                    clusters,
                    self.first_iterations if last is None else self.iterations,
                    self.block_size,
                    ops,
                    init=last,
                    seed=(self.seed * 1009 + call.layer) * 2 + i_side,
                    heads=head_numbers(call),
                )
                state[f"{name}_centroids"] = mean.to(x.dtype)
                means.append(mean)
            else:
                side = self._fixed(call, order)
                if self.score in {"mean", "centroid"}:
                    means.append(ops.pool(x, side.layout, side.order).float())
            sides.append(side)
        q, kv = sides
        ties = None
        if means:
            score = means[0] @ means[1].transpose(-1, -2) * call.scale
            if self.score == "centroid":
                score = score + kv.counts.float().log()[:, :, None]
        else:
            score, ties = self._weights(call, q, kv, video, ops, lse)
        if self.select == "budget" and self.compensate == "means":
            shares = self._shares(score, kv, weights=not means)
            centres = means[1] if means else None
            state["mask"] = worst_means(call, shares, centres, q, kv, self.density, ops)
        else:
            state["mask"] = self._kept(score, ties, q, kv, ops, weights=not means)
        state.update(q=q, kv=kv, made=call.step)
        state["for"] = identity(call)

    def _fixed(self, call: AttentionCall, order: Order) -> Side:
        """Look up (or make, once per geometry) a side in a fixed order."""
        grid = LatentsGrid(call.grid.frames, call.grid.height, call.grid.width)

        def make() -> Side:
            if order == "tiles":
                return fixed_side(call, *tile_order(grid, self.tile))
            found = {
                "raster": lambda: torch.arange(grid.video_tokens),
                "hilbert": lambda: gilbert_order(grid)[0, 0],
                "morton": lambda: morton_order(grid),
            }[order]()
            return fixed_side(call, found, cut(grid.video_tokens, self.block_size))

        key = ("side", order, self.tile, self.block_size, grid, call.query.device)
        return call.once(key, make)

    def _weights(
        self,
        call: AttentionCall,
        q: Side,
        kv: Side,
        video: slice,
        ops: Ops,
        lse: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weigh pairs of blocks, ``[batch, heads, q_blocks, kv_blocks]``, and break ties."""
        query, key = (
            x[:, video] if order == "raster" else ops.gather_tokens(
                x[:, video], side.order.long(), padding=False
            )
            for x, side, order in (
                (call.query, q, self.query_order), (call.key, kv, self.key_order)
            )
        )  # fmt: skip
        ends = (query, key, q.layout, kv.layout)
        if self.score == "antidiagonal":
            stride = min(self.stride, self.block_size)
            return ops.antidiagonal(*ends, stride, call.scale), None
        if self.score == "maximum":
            draw = (self.seed * 1009 + call.layer) * 1009 + call.step
            heads = head_numbers(call)
            return ops.tile_maximum(*ends, self.samples, call.scale, seed=draw, heads=heads)
        assert lse is not None
        own = lse[..., video].float()
        if self.query_order != "raster":
            own = own.gather(-1, q.order.long().expand(*own.shape[:2], -1))
        return ops.block_mass(query, key, own.contiguous(), *ends[2:], call.scale), None

    def _kept(
        self,
        score: Tensor,
        ties: Tensor | None,
        q: Side,
        kv: Side,
        ops: Ops,
        *,
        weights: bool,
    ) -> Tensor:
        """Select key groups: bool ``[batch, heads, q_groups, kv_groups]``; never empty ones."""
        empty = (kv.counts == 0)[:, :, None]

        def ranked(
            score: Tensor, select: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
        ) -> Tensor:
            return select(score)[0] if ties is None else select_by_two(score, ties, select)[0]

        if self.select == "top_p":
            weight = score if weights else score.softmax(-1)
            floor = int(self.floor * score.shape[-1] + _SLACK)
            weight = weight.masked_fill(empty, -1)
            return ranked(weight, lambda x: ops.select_top_p(x, self.top_p, floor))
        if self.select == "top_k":
            count = share_of(self.density, score.shape[-1])
            living = score.masked_fill(empty, -torch.inf)
            return ranked(living, lambda x: ops.select_top_k(x, count))
        if self.select == "budget":
            value = self._per_key(score, kv, weights=weights)
            return within_budget(value, q, kv, self.density, ops, means=False)
        kept = above_spread(score, ~empty, self.threshold)
        return kept if self.compensate == "means" else kept | best(score, ~empty)

    def _shares(self, score: Tensor, kv: Side, *, weights: bool) -> Tensor:
        """Give the share of each key group in a query group's attention; rows sum to 1."""
        if weights:
            score = score.float()
            return score / score.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
        sizes = kv.counts[:, :, None].float().log()  # -inf for empty groups
        return (score if self.score == "centroid" else score + sizes).softmax(-1)

    def _per_key(self, score: Tensor, kv: Side, *, weights: bool) -> Tensor:
        """Spread the weight of a key group evenly over its keys; of scores its logarithm."""
        keys = kv.counts.clamp(min=1)[:, :, None]
        if weights:
            return score / keys.to(score.dtype)
        return score.log_softmax(-1) - (0 if self.score == "mean" else keys.float().log())


def grown(clusters: int, old: LatentsGrid, new: LatentsGrid) -> int:
    """Let a number of clusters grow with the tokens, up to the most that there may be; 0 stays."""
    if not clusters:
        return 0
    return min(max(1, round(clusters * new.video_tokens / old.video_tokens)), MAX_CLUSTERS)


def check_tile(tile: tuple[int, ...]) -> None:
    """Refuse tiles without tokens or above 1024."""
    if len(tile) != 3 or min(tile) < 1 or prod(tile) > 1024:
        raise StrategyError(
            "tile must contain three counts (frames, rows, columns) with a product of at most "
            f"1024 tokens, got {list(tile)!r:.80}; try [4, 4, 4]"
        )
