# SPDX-License-Identifier: Apache-2.0
"""Get the plans of one layer at one step: from a method alone, or from a running pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.attach.apply import enable
from dit_sparse.attach.head_groups import select_heads
from dit_sparse.core.call import AttentionCall
from dit_sparse.errors import StrategyError
from dit_sparse.forecast.counted import counted_density
from dit_sparse.inspect.view import MAP_SIDE, HeadView, views_of
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.synthetic import structured_inputs
from dit_sparse.methods.params import build_method

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.strategy import Strategy

Token = tuple[int, int, int]


def observe_synthetic(
    strategy: Strategy,
    grid: LatentsGrid,
    *,
    heads: int,
    head_dim: int,
    num_layers: int,
    layer: int = 0,
    step: int = 0,
    num_steps: int = 50,
    token: Token | None = None,
    seed: int = 0,
    side: int = MAP_SIDE,
    progress: Callable[[int, int], None] | None = None,
) -> list[HeadView]:
    """Play one layer up to a step on synthetic queries and keys (``synthetic.py``).

    What a static method keeps is exact; what a dynamic one keeps depends on the content, and
    this content is no model's.

    Args:
        strategy: Which method where.
        grid: Where the tokens stand.
        heads: Heads of the layer.
        head_dim: Width of one.
        num_layers: Layers of the model.
        layer: Which of them.
        step: Step whose plans are shown.
        num_steps: Steps of the generation.
        token: Query token (frame, row, column) whose keys are shown; None: the middle one.
        seed: Of queries and keys.
        side: Queries and bins of keys in a map, at most.
        progress: Called with (steps done, steps in all).

    Returns:
        One view per head that is sparse there, ascending; dense heads are left out.
    """
    query, key, value = structured_inputs(grid, heads, head_dim, seed=seed)
    ops = Backends()
    states: dict[int | None, dict[str, Any]] = {}
    shared: dict[Hashable, Any] = {}
    found: list[HeadView] = []
    with torch.no_grad():
        for now in range(step + 1):
            call = AttentionCall(
                query,
                key,
                value,
                grid,
                head_dim**-0.5,
                layer=layer,
                num_layers=num_layers,
                heads=tuple(range(heads)),
                step=now,
                num_steps=num_steps,
                shared=shared,
            )
            for rule, method, own in strategy.assign(
                layer=layer,
                step=now,
                num_steps=num_steps,
                stage="transformer",
                num_heads=heads,
                num_layers=num_layers,
            ):
                if method is None or rule is None:
                    continue
                part = select_heads(call, own)
                part.state = states.setdefault(rule, {})
                plan = method.plan(part, ops)
                if plan is None:
                    continue
                if now == step:
                    name = strategy.rules[rule].method
                    found += views_of(plan, own, name, grid, token, side)
                    continue
                output, lse = method.attend(part, plan, ops)
                method.finish(part, output, lse, ops)
            if progress is not None:
                progress(now + 1, step + 1)
    return sorted(found, key=lambda view: view.head)


def observe_static(
    name: str, params: dict[str, Any], grid: LatentsGrid, heads: int, side: int = MAP_SIDE
) -> list[HeadView] | None:
    """View what a static method keeps on a grid, exactly; None: it reads the content.

    Re-ttention is viewed by its mask, which is what it keeps between refreshes.

    Args:
        name: The method's.
        params: Its params.
        grid: Where the tokens stand.
        heads: Of the model.
        side: Queries and bins of keys in a map, at most.

    Returns:
        One view for each head, or a single one where all heads keep the same.
    """
    if not counted_density(name, params, grid, heads=heads).exact:
        return None
    method = build_method(name, params)
    blank = torch.zeros(1, grid.tokens, heads, 1)
    call = AttentionCall(blank, blank, blank, grid, 1.0, heads=tuple(range(heads)))
    plan = (method.inner or method).plan(call, Backends())
    if plan is None:
        return None
    alike = max(plan.kv_num_blocks.shape[1], plan.q.starts.shape[1]) == 1
    return views_of(plan, range(1 if alike else heads), name, grid, side=side)


def observe_run(
    pipe: Any,
    strategy: Strategy,
    arguments: dict[str, Any],
    steps: set[int],
    each: Callable[[AttentionCall, BlockPlan | None, str], None],
) -> int:
    """Run a pipeline with a strategy and show ``each`` group of heads at some steps.

    Args:
        pipe: A Diffusers pipeline with nothing attached; it is left as it was.
        strategy: Which method where.
        arguments: Of the pipeline's call.
        steps: Which ones, from 0; the conditional pass.
        each: Told of a call's heads, their plan (None: dense) and the method's name.

    Returns:
        Steps that the pipeline made.

    Raises:
        StrategyError: Nothing ran at these steps, or why it was declined.
    """
    count = 0

    def watch(call: AttentionCall, plan: BlockPlan | None, method: str) -> None:
        nonlocal count
        if call.step in steps and call.branch in {"cond", "both"}:
            count += 1
            each(call, plan, method)

    with enable(pipe, strategy) as handle, torch.no_grad():
        handle.watch = watch
        pipe(**arguments)
        made, reasons = handle.num_steps, handle.report().reasons
    if not count:
        why = "; ".join(reasons) or f"the pipeline made {made} steps"
        raise StrategyError(f"no attention call was observed at steps {sorted(steps)}: {why}")
    return made


def observe_pipeline(
    pipe: Any,
    strategy: Strategy,
    arguments: dict[str, Any],
    *,
    layer: int = 0,
    step: int = 0,
    token: Token | None = None,
) -> tuple[list[HeadView], LatentsGrid]:
    """Run a pipeline with a strategy and view one layer at one step, as it ran.

    Args:
        pipe: A Diffusers pipeline with nothing attached.
        strategy: Which method where.
        arguments: Of the pipeline's call.
        layer: Which layer.
        step: Which step.
        token: Query token (frame, row, column) whose keys are shown; None: the middle one.

    Returns:
        One view per head that was sparse there (conditional branch, first sample), and the grid.

    Raises:
        StrategyError: That layer was not called at that step.
    """
    found: list[HeadView] = []
    grids: list[LatentsGrid] = []

    def watch(call: AttentionCall, plan: BlockPlan | None, method: str) -> None:
        if call.layer != layer or call.step != step or call.branch == "uncond":
            return
        grids.append(call.grid)
        if plan is not None:
            found.extend(views_of(plan, call.heads, method, call.grid, token))

    with enable(pipe, strategy) as handle, torch.no_grad():
        handle.watch = watch
        pipe(**arguments)
    if not grids:
        raise StrategyError(
            f"layer {layer} was not called at step {step}: the pipeline made "
            f"{handle.num_steps} steps, its transformers have "
            f"{max(stage.num_layers for stage in handle.stages.values())} layers"
        )
    return sorted(found, key=lambda view: view.head), grids[0]
