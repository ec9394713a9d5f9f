# SPDX-License-Identifier: Apache-2.0
"""Propagate choices within the generation that measures: each layer passes on what it chose.

Sparse-vDiT's search does so (Chen et al. 2025, arXiv:2506.03065, section 4 and its algorithm):
at every step and layer each head takes the best pattern for the inputs that it gets, and what it
gives is what later layers and steps are judged on. Here a layer decides on the first captured call
of a band, again on every further one, and follows its newest choice in between, in both branches.
With one prompt and a band for each step this is the paper's search.

These choices only serve to make the inputs: of several prompts each makes its own. What becomes
the strategy is chosen in the end from all that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PrivateAttr

from dit_sparse.attach.head_groups import head_index, select_heads
from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.profiler.choose import choose
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.table import cells_of, sum_up
from dit_sparse.strategy import Choice, Rule, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.profiler.capture import Capture
    from dit_sparse.profiler.wish import Wish

_BLOCK = 128


@dataclass(eq=False)
class Greedy(Method):
    """A method for all heads that measures, chooses, and computes what it chose.

    Args:
        capture: Measures; sees every call first.
        wish: Chooses, each layer by itself, with the assumed time model.
    """

    summary: ClassVar[str] = "measures and chooses for every layer in turn (profile --sequential)"

    capture: Capture
    wish: Wish
    chosen: dict[tuple[str, int, int], tuple[int, ...]] = field(default_factory=dict)
    _states: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    _band: int = -1
    _output: Tensor | None = None

    def strategy(self) -> Strategy:
        """Give the strategy that puts this method everywhere."""
        made = _Everywhere(name="greedy", rules=(Rule(method="dense"),))
        made._method = self  # noqa: SLF001
        return made

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Measure, choose, and compute; None: every head is dense."""
        known = len(self.capture.calls)
        self.capture(call, None, "greedy")
        band = self._band_of(call)
        if band != self._band:
            self._states.clear()
            self._band = band
        place = (call.stage, call.layer, band)
        if len(self.capture.calls) > known:
            self.chosen[place] = self._choose(place, call.num_steps)
        chosen = self.chosen.get(place)
        if chosen is None or not any(chosen):
            return None
        self._output = self._compute(call, chosen, ops)
        layout = call.layout(_BLOCK)
        nothing = torch.zeros((1, 1, layout.blocks, 1), dtype=torch.int32, device=layout.device)
        return BlockPlan(layout, layout, nothing, nothing[..., 0])

    def finish(
        self,
        call: AttentionCall,  # noqa: ARG002
        output: Tensor,
        lse: Tensor,  # noqa: ARG002
        ops: Ops,  # noqa: ARG002
    ) -> Tensor:
        """Return what ``plan`` computed."""
        made, self._output = self._output, None
        return output if made is None else made

    def _band_of(self, call: AttentionCall) -> int:
        steps = self.capture.how.bands.steps(call.num_steps)
        return next(i for i, each in enumerate(steps) if call.step in each)

    def _choose(self, place: tuple[str, int, int], num_steps: int) -> tuple[int, ...]:
        """Choose for one layer by what this generation has measured of it in the band."""
        capture = self.capture
        assert capture.meter is not None
        candidates, bands = tuple(capture.meter.candidates), capture.how.bands
        calls = [c for c in capture.calls if (c["stage"], c["layer"], c["band"]) == place]
        unit = {
            "about": capture.about,
            "steps": {place[0]: list(bands.steps(num_steps)[place[2]])},
            "calls": calls,
        }
        rows = sum_up([unit], candidates, bands)
        costs = CostModel.assumed(candidates, capture.about["heads"])
        (found,) = choose(cells_of(rows, candidates, costs), rows, self.wish)
        return found

    def _compute(self, call: AttentionCall, chosen: tuple[int, ...], ops: Ops) -> Tensor:
        """Compute each head by its candidate, as the engine would."""
        assert self.capture.meter is not None
        candidates = self.capture.meter.candidates
        output = torch.empty_like(call.value)
        for number in sorted(set(chosen)):
            heads = tuple(i for i, c in enumerate(chosen) if c == number)
            part = select_heads(call, heads)
            plan = method = None
            if number:
                method = candidates[number - 1].instance
                place = (call.stage, call.layer, call.branch, number, heads)
                part.state = self._states.setdefault(place, {})
                plan = method.plan(part, ops)
            if plan is None:
                everything = BlockPlan.full(part.layout(_BLOCK), part.key_layout(_BLOCK))
                own, _ = ops.attend(part.query, part.key, part.value, everything, part.scale)
            else:
                own, lse = ops.attend(part.query, part.key, part.value, plan, part.scale)
                if method is not None:
                    own = method.finish(part, own, lse, ops)
            output[:, :, head_index(heads, output.device)] = own
        return output


class _Everywhere(Strategy):
    """A strategy of one method that no file names."""

    _method: Any = PrivateAttr(default=None)

    def assign(
        self,
        layer: int,  # noqa: ARG002
        step: int,  # noqa: ARG002
        num_steps: int,  # noqa: ARG002
        stage: str,  # noqa: ARG002
        num_heads: int,
        num_layers: int,  # noqa: ARG002
    ) -> tuple[Choice, ...]:
        """Give all heads to the method."""
        return (Choice(0, self._method, tuple(range(num_heads))),)
