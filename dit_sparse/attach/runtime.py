# SPDX-License-Identifier: Apache-2.0
"""Run a strategy where Diffusers is not: in another program's attention, call by call.

Diffusers pipelines need none of this (``enable_sparse_attention``). A program with models and
loops of its own hands over each self-attention call and says where it stands: which layer, which
step, which grid. ``samples/vllm_omni`` and ``samples/comfyui`` are made of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.attach.describe import Stage
from dit_sparse.attach.engine import SparseEngine
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.errors import GeometryError, UnsupportedError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.pipelines.clock import Clock
from dit_sparse.pipelines.family import Family
from dit_sparse.strategy import Rule, Strategy


class Runtime(SparseEngine):
    """Computes the self-attention calls of one transformer as a strategy says."""

    def __init__(
        self,
        strategy: Strategy,
        *,
        num_layers: int,
        num_heads: int,
        model_class: str | None = None,
        stage: str = "transformer",
        text_first: bool = False,
        kernel: str | None = None,
        strict: bool = False,
    ) -> None:
        """Check that the strategy fits the model.

        Args:
            strategy: Which method where.
            num_layers: Layers of the transformer.
            num_heads: Heads of each, all of them, also where several GPUs share them.
            model_class: The transformer's class name in Diffusers; None: not known, not checked.
            stage: Which of two transformers this is ("transformer", "transformer_2").
            text_first: Text stands before the video.
            kernel: See ``apply.enable``.
            strict: Raise where a call would stay dense because it is not understood.

        Raises:
            StrategyError: The strategy does not fit.
        """
        known = strategy.model.classes[0] if strategy.model is not None else ""
        strategy.validate_for(
            known if model_class is None else model_class,
            num_layers,
            num_heads,
            stages=("transformer", "transformer_2"),
        )
        family = Family("runtime", attention="", shape=_no_shape, text_first=text_first)
        super().__init__(
            strategy,
            Backends(kernel),
            Clock(),
            {stage: Stage(stage, family, num_layers)},
            strict=strict,
        )
        self.stage, self.num_layers, self.num_heads = stage, num_layers, num_heads
        self._names_heads = any(map(_names_heads, strategy.rules))
        self._told: set[str] = set()

    def find_caller(self) -> None:
        """Nothing to find: another program's loop."""

    def restart(self) -> None:
        """Start a new generation with the next call; one that steps backwards does so too."""
        self.end_generation()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grid: LatentsGrid | None,
        layer: int,
        step: int | None,
        num_steps: int,
        branch: str = "cond",
        scale: float | None = None,
        dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute one call; where it is not understood, dense, with a warning that says why.

        Args:
            query: ``[batch, seq_len, heads, head_dim]``, after norms and RoPE.
            key: Like ``query``.
            value: Like ``query``.
            grid: Where the tokens stand; None: not known.
            layer: Index of the layer, 0-based.
            step: Index of the denoising step, 0-based; None: not known.
            num_steps: Steps of the generation.
            branch: "cond", "uncond", or "both" where one batch holds both; any name that tells
                passes of one step apart.
            scale: Multiplies the scores before softmax; ``head_dim ** -0.5`` where None.
            dense: The program's own attention, for some of the heads; None: torch's.

        Returns:
            Like ``query``.
        """
        if not 0 <= layer < self.num_layers:
            raise GeometryError(f"layer must lie in [0, {self.num_layers}), got {layer}")
        if query.shape != key.shape or key.shape[:3] != value.shape[:3]:
            raise GeometryError(
                "self-attention requires the same number of tokens and heads in query, key and "
                f"value, got query {tuple(query.shape)}, key {tuple(key.shape)}, value "
                f"{tuple(value.shape)}; compute cross-attention without dit_sparse"
            )
        if query.shape[2] != self.num_heads and self._names_heads:
            raise GeometryError(
                f"{self.strategy.name} has rules for individual heads of {self.num_heads}, but "
                f"this call has {query.shape[2]} heads (split across GPUs); use a strategy whose "
                "rules apply to all heads"
            )
        if dense is None:
            dense = _dense(scale)
        # A step out of range is no step: the strategy could not be asked about it.
        known = step is not None and 0 <= step < num_steps
        self.set_step(step if known else None, num_steps, branch)
        site: Any = SimpleNamespace(
            stage=self.stage,
            layer=layer,
            path=f"{self.stage}, layer {layer}",
            dense_name="model's own",
        )
        shape = (
            None
            if grid is None or not known
            else (grid.frames, grid.height, grid.width, grid.text_length)
        )
        if shape is None:
            what = "grid of tokens" if known else "step"
            self._decline(f"{site.path}: the {what} of this call is unknown")
            return dense(query, key, value)
        output = self.attention(site, query, key, value, None, shape, scale, dense)
        if reason := self.records[-1].reason:
            self._decline(f"{site.path}: {reason}")
        return output

    def _decline(self, reason: str) -> None:
        """Say once why calls stay dense, or raise."""
        if self.strict:
            raise GeometryError(f"{reason}; strict=True forbids dense fallback")
        _, _, cause = reason.partition(": ")
        if cause not in self._told:
            self._told.add(cause)
            warnings.warn(f"{self.strategy.name}: dense from now on: {reason}", stacklevel=3)


def _no_shape(*_: Any) -> tuple[int, int, int, int]:
    raise UnsupportedError("a runtime is told its grid")


def _names_heads(rule: Rule) -> bool:
    """Say whether a rule means single heads, by its own list or by its method's."""
    return rule.heads != "all" or rule.instance.names_heads


def _dense(scale: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return attend
