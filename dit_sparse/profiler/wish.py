# SPDX-License-Identifier: Apache-2.0
"""What a search is to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_sparse.profiler.errors import ProfileError

TARGET = 0.1


@dataclass(frozen=True)
class Wish:
    """What to search for.

    Args:
        rule: "time": least predicted time under ``target``, or least error under ``budget`` or
            ``density``. "sparse-vdit": the paper's rule, per head and band, on ``loss``.
        target: Largest root-mean-square relative error of heads' outputs, in [0, 1]; None with a
            budget or a density.
        budget: Largest predicted attention time as a share of dense, in (0, 1].
        density: Largest mean density, searching steps counted as 1, in (0, 1]: the same choice on
            every device, to compare methods by what they keep.
        loss: For the paper's rule: "relative" L2 error or "mse".
        weight: Its lambda, >= 0.
        epsilon: Its threshold, > 0.
    """

    rule: Literal["time", "sparse-vdit"] = "time"
    target: float | None = None
    budget: float | None = None
    density: float | None = None
    loss: Literal["relative", "mse"] = "relative"
    weight: float = 0.5
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges; without a wish the target is ``TARGET``."""
        if self.rule not in {"time", "sparse-vdit"} or self.loss not in {"relative", "mse"}:
            raise ProfileError(f"unknown rule {self.rule!r} with loss {self.loss!r}")
        limits = [each for each in (self.target, self.budget, self.density) if each is not None]
        if len(limits) > 1:
            raise ProfileError("target, budget and density cannot be combined; give one")
        if self.target is not None and not 0 <= self.target <= 1:
            raise ProfileError(f"target must be an error in [0, 1], got {self.target}; try 0.1")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ProfileError(f"budget must be a share in (0, 1], got {self.budget}; try 0.6")
        if self.density is not None and not 0 < self.density <= 1:
            raise ProfileError(f"density must be in (0, 1], got {self.density}; try 0.5")
        if not 0 <= self.weight < float("inf") or not 0 < self.epsilon < float("inf"):
            raise ProfileError(
                f"lambda must be >= 0 and epsilon > 0, got {self.weight} and {self.epsilon}"
            )
        if not limits:
            object.__setattr__(self, "target", TARGET)

    def __str__(self) -> str:
        """Say it in one line."""
        if self.rule == "sparse-vdit":
            return f"Sparse-vDiT's rule, {self.loss} error, {self.weight:g}, {self.epsilon:g}"
        if self.budget is not None:
            return f"least error in {self.budget:g} of the dense attention's time"
        if self.density is not None:
            return f"least error at a density of at most {self.density:g}"
        return f"least time with a relative error of at most {self.target:g}"
