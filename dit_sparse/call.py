# SPDX-License-Identifier: Apache-2.0
"""What a method is told about one attention call, and what a method is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor

    from dit_sparse.grid import BlockLayout, LatentsGrid
    from dit_sparse.plan import BlockPlan

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
        if key not in self.shared:
            self.shared[key] = build()
        found: T = self.shared[key]
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
    """The operations a method may use; ``backends.py`` decides which kernel answers."""

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


class Method(Protocol):
    """One published or own way to choose block pairs: a frozen dataclass, its fields the params.

    Two moments, both optional to use: ``plan`` before the attention, ``finish`` after it.
    """

    summary: ClassVar[str]
    """One line for ``dit-sparse methods``: what it does and its source."""

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Choose; None: dense (the model's own kernel runs, ``finish`` is not called)."""

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Compensate for what was dropped, or remember what was seen; returns the output."""
