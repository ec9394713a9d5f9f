# SPDX-License-Identifier: Apache-2.0
"""Sparse attention that can be trained through: an attachment that keeps gradients.

The engine declines a call that wants gradients, as only some kernels have them. Here the kernels
do (``dispatch.py`` picks one that has a backward pass, or raises), what is chosen is not
differentiated (a top-k has no gradient), and a method compensates without writing in place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import SparseAttention
from dit_sparse.distill.errors import DistillError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.strategy import Strategy


class TrainableAttention(SparseAttention):
    """An attachment for a training loop around a bare transformer; see ``begin``."""

    # One run for all threads: autograd recomputes in a thread of its own on a GPU.
    LOCAL = SimpleNamespace

    def __init__(self, model: Any, strategy: Strategy, kernel: str | None = None) -> None:
        """Attach; a call that is not understood raises instead of staying dense in silence."""
        check_trainable(strategy)
        self.paused = False
        self._shape: Any = None
        super().__init__(model, strategy, kernel=kernel, strict=True)

    def begin(self, step: int, num_steps: int) -> None:
        """Tell the step of the pass that follows, and forget every pass before it.

        Recomputation within a backward pass (gradient checkpointing) counts as a pass.
        """
        self.end_generation()
        self.at(step, num_steps)

    def attention(self, site: Any, query: Tensor, *rest: Any) -> Tensor:
        """Compute one call; dense while paused."""
        key, value, mask, shape, scale, dense = rest
        if self.paused:
            plain: Tensor = dense(query, key, value)
            return plain
        # The shape is a thread's own.
        self._shape = shape = self._shape if shape is None else shape
        return super().attention(site, query, key, value, mask, shape, scale, dense)

    def _describe(self, *args: Any) -> Any:
        with torch.no_grad():  # nothing is computed there but counts of text
            return super()._describe(*args)


def check_trainable(strategy: Strategy) -> None:
    """Refuse a strategy whose methods live on what an earlier step left.

    A training step is one step alone.
    """
    for place, rule in enumerate(strategy.rules):
        method = rule.instance
        reason = method.untrainable
        if method.period is not None and not reason:
            reason = "its first call is dense, so only later steps are sparse"
        if reason:
            raise DistillError(
                f"{strategy.name}: rules[{place}]: {rule.method} does not support training: "
                f"{reason}; choose a method that plans each step independently, such as blade, "
                "pooled, radial or sliding windows"
            )
