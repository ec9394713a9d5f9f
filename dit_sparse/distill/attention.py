# SPDX-License-Identifier: Apache-2.0
"""Sparse attention that can be trained through: an attachment that keeps gradients.

The engine declines a call that wants gradients, as only some kernels have them. Here the kernels
do (``backends.py`` picks one that has a backward pass, or raises), what is chosen is not
differentiated (a top-k has no gradient), and compensation is done without writing in place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.apply import SparseAttention
from dit_sparse.distill.errors import DistillError
from dit_sparse.methods.blade import Blade

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.call import AttentionCall, Ops
    from dit_sparse.compute import Planned
    from dit_sparse.report import CallRecord
    from dit_sparse.strategy import Strategy

# What they take from step to step is no part of a training step, which is one step alone.
UNTRAINABLE = {
    "adaspa": "it chooses by the log-sum-exps of an earlier step",
    "rettention": "it adds what an earlier step left",
}


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

    def _finish(self, group: Planned, output: Tensor, lse: Tensor, record: CallRecord) -> Tensor:
        method = group.method
        if isinstance(method, Blade) and method.pooled and torch.is_grad_enabled():
            group = group._replace(method=_Apart(method))
        return super()._finish(group, output, lse, record)


class _Apart:
    """BLADE's pooled keys, merged into a tensor of their own.

    One softmax over kept and pooled keys (each with + ln n) is the mean of the two results
    weighted by exp of their log-sum-exps. Both kernels give gradients through output and LSE, so
    this has the gradient of that one softmax; in fp32, as the LSEs are.
    """

    def __init__(self, method: Blade) -> None:
        self.method = method

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        grid = call.grid
        first, last = grid.video_start, grid.video_start + grid.video_tokens
        zero = torch.zeros_like(output).detach()
        held = _Held(ops)
        # The stock code finds the plan, the order and the pooled keys; held.attend computes.
        self.method.finish(call, zero, lse.detach(), held)
        coarse, coarse_lse = held.result
        share = torch.sigmoid(coarse_lse - lse[..., first:last]).transpose(1, 2)[..., None]
        fine = output[:, first:last].to(share.dtype)
        video = torch.lerp(fine, coarse.to(share.dtype), share).to(output.dtype)
        return torch.cat([output[:, :first], video, output[:, last:]], 1)


class _Held:
    """Operations that remember the one attention they computed."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.result: Any = None

    def attend(self, *args: Any) -> tuple[Tensor, Tensor]:
        output, lse = self._ops.attend(*args)
        self.result = output, lse
        return output.detach(), lse.detach()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


def check_trainable(strategy: Strategy) -> None:
    """Refuse a strategy whose methods live on what an earlier step left."""
    for place, rule in enumerate(strategy.rules):
        if rule.method in UNTRAINABLE:
            raise DistillError(
                f"{strategy.name}: rules[{place}]: {rule.method} cannot be trained with: "
                f"{UNTRAINABLE[rule.method]}; choose a method that plans each step on its own, "
                "such as blade, pooled, radial or sliding windows"
            )
