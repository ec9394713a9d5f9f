# SPDX-License-Identifier: Apache-2.0
"""Time a method as a generation uses it: planning when its own schedule asks, and the ordering.

One layer's calls of a whole generation are played through. Queries and keys are synthetic
(``synthetic.py``): structured, so that a top-p rule has something to choose, and the same at every
step. Densities are therefore the method's on such data, not on a model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.bench.result import MethodMeasurement
from dit_sparse.bench.timing import Clock, alternate, dense_calls
from dit_sparse.core.call import AttentionCall
from dit_sparse.core.sizes import nbytes
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.synthetic import structured_inputs
from dit_sparse.methods.params import build_method

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from dit_sparse.bench.shapes import Shape
    from dit_sparse.core.plan import BlockPlan

MIB = 2**20


def measure_method(
    device: torch.device,
    name: str,
    params: dict[str, Any],
    shape: Shape,
    dtype: torch.dtype,
    num_steps: int,
    repeats: int,
) -> MethodMeasurement:
    """Measure one method on one shape."""
    inputs = structured_inputs(shape.grid, shape.heads, shape.head_dim, device=device, dtype=dtype)
    clock = Clock.of(device)
    scale = shape.head_dim**-0.5
    with torch.no_grad():
        calls, _ = dense_calls(*inputs, scale)
        dense = alternate(calls, repeats, clock)
        best = min(dense, key=dense.__getitem__)
        layer = _Layer(build_method(name, params), inputs, shape, num_steps, repeats, clock)
        layer.play(stop_at_first_plan=True)  # tables, static plans, first use of every kernel
        cold = layer.first_plan_ms
        layer.play()
    return MethodMeasurement(
        method=name,
        params=params,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        clock=clock.kind,
        num_steps=num_steps,
        sparse_steps=len(layer.densities),
        density=sum(layer.densities) / max(len(layer.densities), 1),
        build_ms=max(0.0, cold - layer.first_plan_ms),
        planning_ms=sum(layer.planning) / num_steps,
        worst_planning_ms=max(layer.planning),
        attend_ms=sum(layer.attending) / max(len(layer.attending), 1),
        dense_ms=dense[best],
        state_mib=layer.peak_state / MIB,
        kernel=layer.ops.last_kernel,
        dense_kernel=best,
    )


class _Layer:
    """One layer of a model that does nothing but attend."""

    def __init__(
        self,
        method: Any,
        inputs: tuple[Tensor, Tensor, Tensor],
        shape: Shape,
        num_steps: int,
        repeats: int,
        clock: Clock,
    ) -> None:
        self.method, self.inputs, self.shape = method, inputs, shape
        self.num_steps, self.repeats, self.clock = num_steps, repeats, clock
        self.ops = Backends()
        self.shared: dict[Hashable, Any] = {}

    def play(self, *, stop_at_first_plan: bool = False) -> None:
        """Play a generation; what is kept for a geometry stays from the one before."""
        state: dict[str, Any] = {}
        self.planning: list[float] = []
        self.attending: list[float] = []
        self.densities: list[float] = []
        self.first_plan_ms = 0.0
        self.peak_state = 0
        known: tuple[Tensor, Tensor] | None = None
        for step in range(self.num_steps):
            call = self._call(step, state)
            start = self.clock.now()
            plan = self.method.plan(call, self.ops)
            spent = self.clock.now() - start
            if plan is None:
                self.planning.append(spent)
                continue
            first = not self.first_plan_ms
            self.first_plan_ms = self.first_plan_ms or spent
            density = float(plan.density().mean())
            if density < 1:
                self.densities.append(density)
            # The first and the last sparse attention stand for all; a call that keeps everything
            # (to search, or to refresh) is a dense one.
            if density < 1 and (not self.attending or step == self.num_steps - 1):
                known = self._timed(call, plan)
            elif first or known is None:
                known = self.ops.attend(call.query, call.key, call.value, plan, call.scale)
            start = self.clock.now()
            self.method.finish(call, *known, self.ops)
            self.planning.append(spent + self.clock.now() - start)
            self.peak_state = max(self.peak_state, nbytes(state))
            if stop_at_first_plan:
                return

    def _call(self, step: int, state: dict[str, Any]) -> AttentionCall:
        query, key, value = self.inputs
        return AttentionCall(
            query,
            key,
            value,
            self.shape.grid,
            self.shape.head_dim**-0.5,
            heads=tuple(range(self.shape.heads)),
            step=step,
            num_steps=self.num_steps,
            state=state,
            shared=self.shared,
        )

    def _timed(self, call: AttentionCall, plan: BlockPlan) -> tuple[Tensor, Tensor]:
        results: list[tuple[Tensor, Tensor]] = []

        def attend() -> None:
            results[:] = [self.ops.attend(call.query, call.key, call.value, plan, call.scale)]

        self.attending.append(alternate({"sparse": attend}, self.repeats, self.clock)["sparse"])
        return results[0]
