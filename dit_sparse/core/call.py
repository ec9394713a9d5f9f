# SPDX-License-Identifier: Apache-2.0
"""What a method is told about one attention call, and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.traits import Traits

T = TypeVar("T")


@dataclass(slots=True)
class AttentionCall:
    """One self-attention call of a model, for the heads that one rule of a strategy governs.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, after norms and RoPE, any strides.
        key: Like ``query``.
        value: Like ``query``.
        grid: Where the tokens stand.
        scale: Multiplies the scores before softmax.
        text_valid: Valid text tokens of each sample, int ``[batch]``; None: all of them.
        layer: Index of the transformer block among all main ones, 0-based.
        num_layers: How many there are.
        heads: Indices of the call's heads in the model's own numbering.
        step: 0-based index of the denoising step.
        num_steps: Steps of this generation.
        stage: Name of the transformer within the pipeline ("transformer", "transformer_2").
        branch: "cond", "uncond", or "both" where one batch holds both.
        state: This (stage, layer, branch, rule)'s own memory: empty when a generation starts,
            freed when it ends.
        shared: Memory of all calls of this attachment, for what depends on geometry alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grid: LatentsGrid
    scale: float
    text_valid: Tensor | None = None
    layer: int = 0
    num_layers: int = 1
    heads: tuple[int, ...] = ()
    step: int = 0
    num_steps: int = 1
    stage: str = "transformer"
    branch: str = "cond"
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, build: Callable[[], T]) -> T:
        """Return what ``build`` made the first time that this attachment asked for ``key``.

        ``key`` must hold everything that the result depends on, e.g. (self, grid, device).
        """
        found: T | None = self.shared.get(key)
        if found is None:  # another thread may build it too, or clear the dict meanwhile
            found = self.shared[key] = build()
        return found

    def layout(self, block_size: int) -> BlockLayout:
        """Lay uniform blocks over the tokens in their own order, padding included (queries)."""
        device = self.query.device
        return self.once(
            ("layout", self.grid, block_size, device),
            lambda: self.grid.layout(block_size, device),
        )

    def key_layout(self, block_size: int) -> BlockLayout:
        """Lay the same blocks with padded text left out (keys)."""
        if self.text_valid is None:
            return self.layout(block_size)
        # One layout for all layers of a pass: they get the very same text_valid.
        slot = ("key_layout", self.grid, block_size, self.query.device)
        known = self.shared.get(slot)
        if known is None or known[0] is not self.text_valid:
            made = self.grid.layout(block_size, self.query.device, self.text_valid)
            known = self.shared[slot] = (self.text_valid, made)
        found: BlockLayout = known[1]
        return found


class Ops(Protocol):
    """The operations a method may use; ``dispatch.py`` decides which kernel answers."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend by a plan: output like ``query``, LSE fp32 ``[batch, heads, seq_len]``."""

    def block_mass(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        scale: float,
    ) -> Tensor:
        """Sum exp(score - lse) over block pairs: fp32 ``[batch, heads, q_blocks, kv_blocks]``."""

    # Planning: torch alone, any device, scores in fp32, no wait for the device. What the arguments
    # mean in full stands beside each in kernels/<pool, antidiagonal, ...>.py; scores are
    # [batch, heads, q_blocks, kv_blocks], slots are tokens, keys in no block take no part.

    def pool(self, x: Tensor, layout: BlockLayout, permutation: Tensor | None = None) -> Tensor:
        """Average each block, 0 where it is empty: ``[batch, heads, blocks, head_dim]``."""

    def moments(
        self,
        x: Tensor,
        layout: BlockLayout,
        permutation: Tensor | None = None,
        weight: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Average each block, and sum its channels' variances: ``[batch, heads, blocks]``."""

    def pooled_scores(
        self, query: Tensor, key: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
    ) -> Tensor:
        """Score block pairs by mean query and mean key, -inf for an empty key block."""

    def antidiagonal(
        self,
        query: Tensor,
        key: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        stride: int,
        scale: float,
    ) -> Tensor:
        """Estimate block mass from the antidiagonals of stride x stride cells (XAttention)."""

    def tile_maximum(
        self,
        query: Tensor,
        key: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        samples: int,
        scale: float,
        *,
        seed: int = 0,
        form: str = "code",
        heads: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score block pairs by the largest weight among sampled tokens (BLADE), in [0, 1].

        The mean over the sampled queries comes second: it breaks ties of the first.
        """

    def kmeans(
        self,
        points: Tensor,
        clusters: int,
        iterations: int,
        *,
        init: Tensor | None = None,
        seed: int = 0,
        heads: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cluster the tokens of each (sample, head): centroids, labels, counts."""

    def cluster_order(
        self, labels: Tensor, counts: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, BlockLayout, Tensor]:
        """Order tokens by cluster: permutation, blocks of one cluster each, cluster of a block."""

    def expand_clusters(self, mask: Tensor, q_owner: Tensor, kv_owner: Tensor) -> Tensor:
        """Spell a mask over clusters out over the blocks of ``cluster_order``."""

    def select_top_k(
        self,
        scores: Tensor,
        counts: int | Tensor,
        keep: Tensor | None = None,
        *,
        keep_inside: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the best blocks of each row: block_mask, kv_indices, kv_num_blocks."""

    def select_top_p(
        self,
        scores: Tensor,
        p: float,
        floor: int = 0,
        keep: Tensor | None = None,
        *,
        ceiling: int | None = None,
        keep_inside: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the fewest blocks that hold the share ``p`` of each row's weight: likewise."""

    def select_budget(self, value: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
        """Keep the best blocks of a head while their costs fit its budget: block_mask."""

    def gather_tokens(self, x: Tensor, permutation: Tensor, *, padding: bool = True) -> Tensor:
        """Put tokens into slots, 0 where ``permutation`` is -1."""

    def scatter_tokens(self, x: Tensor, permutation: Tensor, tokens: int) -> Tensor:
        """Put slots back to their tokens, 0 where a token has none."""


class Method(Traits, Protocol):
    """One published or own way to choose block pairs: a frozen dataclass, its fields the params.

    Three moments of a call: ``plan`` before the attention, ``attend`` for it, ``finish`` after
    it. Only ``plan`` has to be written; what else the method states about itself is in ``Traits``.
    """

    __slots__ = ()

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Choose; None: dense (the model's own kernel runs, ``finish`` is not called)."""

    def attend(self, call: AttentionCall, plan: BlockPlan, ops: Ops) -> tuple[Tensor, Tensor]:
        """Attend by the plan: output like ``query``, LSE fp32 ``[batch, heads, seq_len]``.

        Overridden only by methods that want more from the pass over a *complete* plan (a search
        or a refresh) than its result. Other plans may be computed together with other heads'.
        """
        return ops.attend(call.query, call.key, call.value, plan, call.scale)

    def finish(
        self,
        call: AttentionCall,  # noqa: ARG002
        output: Tensor,
        lse: Tensor,  # noqa: ARG002
        ops: Ops,  # noqa: ARG002
    ) -> Tensor:
        """Compensate for what was dropped, or remember what was seen; returns the output."""
        return output

    @property
    def inner(self) -> Method | None:
        """The method whose plan this one computes between its dense refreshes."""
        return None

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> Method:  # noqa: ARG002
        """Fit the params to another grid."""
        return self


def overrides_attend(method: Method, plan: BlockPlan) -> bool:
    """Whether the method wants more from the pass over this plan than its result."""
    return plan.complete and type(method).attend is not Method.attend
