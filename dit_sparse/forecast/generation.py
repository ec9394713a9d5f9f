# SPDX-License-Identifier: Apache-2.0
"""Say before anything runs what sparse attention could gain: no weights, no device, seconds.

With the share a of a forward pass that is self-attention, the share w of calls that stay dense,
density rho and kernel efficiency eta (see ``bench``), a generation takes

    1 - a + a (w + (1 - w) (rho / eta + planning))

of its dense time (Amdahl's law). The share a is by floating-point operations, at the rates below.
Text encoders and the VAE are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import MAX_TOKENS
from dit_sparse.core.sizes import nbytes
from dit_sparse.errors import GeometryError
from dit_sparse.kernels.planning import Planning

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from dit_sparse.core.call import Method
    from dit_sparse.core.grid import BlockLayout, LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.pipelines.size import ModelSize
    from dit_sparse.strategy import Strategy

# What attention and everything else reach on one card, in any unit: only their ratio counts. As a
# data-centre card does it, 600 and 650 TFLOP/s of 990: assumed, not measured here.
ATTENTION_RATE, OTHER_RATE = 600.0, 650.0
DENSITY, EFFICIENCY, PLANNING = 0.25, 0.9, 0.01  # assumed where nothing better is known
WORTH_A_TRY = 1.1  # below this gain nothing is worth a picture's change
FEWEST_TOKENS = 8192  # below it launches, planning and half-filled blocks take what is saved


@dataclass(frozen=True, slots=True)
class MethodForecast:
    """What is known of one method at a size before it runs.

    Args:
        method: Its name.
        density: Kept share of all pairs on its sparse calls; None: it depends on the content.
        exact: ``density`` was counted from plans; otherwise it is what the params ask for.
        state_bytes: What one layer remembers for one pass over one sample, at most.
        shared_bytes: Plans and tables of a geometry, for all layers.
    """

    method: str
    density: float | None
    exact: bool
    state_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect of a strategy on a model at a size.

    Args:
        size: What the model computes.
        share: Share of self-attention in a dense forward pass, by time.
        cap: Gain if self-attention took no time at all.
        sparse_share: Share of (step, layer, head) calls that the strategy makes sparse.
        density: Assumed or known kept share of these calls.
        density_from: Where ``density`` comes from, for people.
        efficiency: Assumed kernel efficiency.
        planning: Assumed planning, as a share of dense attention.
        gain: Expected dense time / sparse time of the denoising loop.
        methods: What is known of the strategy's methods.
        state_bytes: What all layers remember at most, one sample in one pass at a time.
        warnings: Why this may not be worth it, or may turn out otherwise.
    """

    size: ModelSize
    share: float
    cap: float
    sparse_share: float
    density: float
    density_from: str
    efficiency: float
    planning: float
    gain: float
    methods: tuple[MethodForecast, ...]
    state_bytes: int
    warnings: tuple[str, ...]

    @property
    def worth_it(self) -> bool:
        """Nothing speaks plainly against it."""
        return self.gain >= WORTH_A_TRY and self.size.grid.tokens >= FEWEST_TOKENS


def attention_share(size: ModelSize) -> float:
    """Share of self-attention in the time of a forward pass."""
    attention, other = size.attention_flops / ATTENTION_RATE, size.other_flops / OTHER_RATE
    return attention / (attention + other)


def expected_gain(
    share: float, sparse_share: float, density: float, efficiency: float, planning: float = 0.0
) -> float:
    """Dense time / sparse time (the formula at the top of this file)."""
    sparse = density / efficiency + planning
    return 1 / (1 - share + share * (1 - sparse_share + sparse_share * sparse))


def forecast(
    size: ModelSize,
    strategy: Strategy | None = None,
    *,
    num_steps: int = 50,
    density: float | None = None,
    efficiency: float = EFFICIENCY,
    planning: float = PLANNING,
    batch: int = 1,
) -> Forecast:
    """Forecast a strategy's gain and memory.

    Args:
        size: The model at its resolution, from ``pipelines.size.model_size``.
        strategy: What would run; None: any method at ``density`` with a tenth of the steps dense.
        num_steps: Denoising steps.
        density: Kept share of pairs on sparse calls, in (0, 1]; None: the strategy's, where it
            can be known.
        efficiency: Kernel efficiency, from a benchmark of the device or assumed.
        planning: Planning as a share of dense attention.
        batch: Samples in one pass, guidance branches included.
    """
    calls = _calls(strategy, size, num_steps)
    sparse_share = sum(calls.values()) / (size.layers * size.heads * num_steps)
    if strategy is None:
        sparse_share = 0.9
    methods = tuple(
        forecast_method(name, method, size, num_steps, batch)
        for (name, method), count in calls.items()
        if count
    )
    known = [(m, n) for m, n in zip(methods, filter(None, calls.values()), strict=True)]
    if density is not None:
        source = "given"
    elif strategy is not None and known and all(m.density is not None for m, _ in known):
        total = sum(count for _, count in known)
        density = sum((m.density or 0.0) * count for m, count in known) / total
        source = "counted from plans" if all(m.exact for m, _ in known) else "from params"
    else:
        density = DENSITY
        source = "assumed, as it depends on the content" if strategy else "assumed"
    share = attention_share(size)
    gain = expected_gain(share, sparse_share, density, efficiency, planning)
    return Forecast(
        size=size,
        share=share,
        cap=1 / (1 - share),
        sparse_share=sparse_share,
        density=density,
        density_from=source,
        efficiency=efficiency,
        planning=planning,
        gain=gain,
        methods=methods,
        state_bytes=size.layers * sum(m.state_bytes for m in methods)
        + sum(m.shared_bytes for m in methods),
        warnings=_warnings(size.grid, share, gain, sparse_share),
    )


def _calls(
    strategy: Strategy | None, size: ModelSize, num_steps: int
) -> dict[tuple[str, Method], int]:
    """Count (step, layer, head) calls of each rule's method that is not dense."""
    found: dict[tuple[str, Method], int] = {}
    if strategy is None:
        return found
    for step in range(num_steps):
        for layer in range(size.layers):
            for choice in strategy.assign(
                layer=layer,
                step=step,
                num_steps=num_steps,
                stage="transformer",
                num_heads=size.heads,
                num_layers=size.layers,
            ):
                if choice.method is None or choice.rule is None:
                    continue
                key = (strategy.rules[choice.rule].method, choice.method)
                found[key] = found.get(key, 0) + len(choice.heads)
    return {key: count for key, count in found.items() if key[0] != "dense"}


def _warnings(
    grid: LatentsGrid, share: float, gain: float, sparse_share: float
) -> tuple[str, ...]:
    """Say plainly what speaks against it."""
    found = []
    if grid.tokens < FEWEST_TOKENS:
        found.append(
            f"not worth it here: {grid.tokens:,} tokens are fewer than {FEWEST_TOKENS:,}, so "
            "launch overhead, planning and partially filled blocks cancel the savings"
        )
    elif gain < WORTH_A_TRY:
        found.append(
            f"not worth it here: {gain:.2f} x is expected; self-attention takes {share:.0%} of "
            "the time, which limits the speed-up"
        )
    if sparse_share == 0:
        found.append("nothing would be sparse: the schedule keeps every step of the run dense")
    return tuple(found)


def better_size(
    size: ModelSize, height: int, width: int, block_size: int = 128
) -> tuple[int, int] | None:
    """Find the nearest height and width whose frames are whole blocks; None: these are.

    Frames that end inside a block cost a part of the next one wherever a pattern follows frames.
    Searched within a quarter of each side; the least relative change of both sides wins.
    """
    unit_h, unit_w = height // size.grid.height, width // size.grid.width
    if size.grid.frame_tokens % block_size == 0:
        return None
    rows, columns = size.grid.height, size.grid.width
    fits = [
        (abs(h / rows - 1) + abs(w / columns - 1), h * unit_h, w * unit_w)
        for h in range(max(1, rows * 3 // 4), rows * 5 // 4 + 1)
        for w in range(max(1, columns * 3 // 4), columns * 5 // 4 + 1)
        if h * w % block_size == 0
    ]
    return min(fits)[1:] if fits else None


def forecast_method(
    name: str, method: Method, size: ModelSize, num_steps: int, batch: int = 1
) -> MethodForecast:
    """Play a method's calls on tensors without data; a static mask is counted exactly."""
    if size.grid.tokens > MAX_TOKENS:
        raise GeometryError(
            f"{size.grid} has {size.grid.tokens:,} tokens; the maximum is {MAX_TOKENS:,}, so "
            "choose a smaller size"
        )
    state, shared, reads_content = _play(method, size, num_steps, batch)
    density: float | None = None
    exact = not reads_content
    if exact:
        density = _count(method, size, num_steps)
    elif (kept := method.asked_density) is not None:
        video, text = size.grid.video_tokens, size.grid.text_length
        pairs = kept * video**2 + 2 * video * text + text**2
        density = pairs / size.grid.tokens**2
    return MethodForecast(name, density, exact, state, shared)


class _ShapesOnly(Planning):
    """Operations on tensors without data."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,  # noqa: ARG002
        value: Tensor,  # noqa: ARG002
        plan: BlockPlan,  # noqa: ARG002
        scale: float,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = query.shape
        output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        return output, torch.zeros(batch, heads, tokens, device=query.device)

    def block_mass(
        self,
        query: Tensor,
        key: Tensor,  # noqa: ARG002
        lse: Tensor,  # noqa: ARG002
        q: BlockLayout,
        kv: BlockLayout,
        scale: float,  # noqa: ARG002
    ) -> Tensor:
        batch, _, heads, _ = query.shape
        return query.new_zeros((batch, heads, q.blocks, kv.blocks), dtype=torch.float32)


class _Watch(TorchDispatchMode):
    """Notices whether anything but a view is made of one tensor."""

    def __init__(self, watched: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage = watched.untyped_storage()._cdata  # noqa: SLF001
        self.read = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if self._holds((args, kwargs)) and not self._holds(result):
            self.read = True
        return result

    def _holds(self, tree: Any) -> bool:
        return any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == self.storage  # noqa: SLF001
            for leaf in tree_leaves(tree)
        )


def _play(method: Method, size: ModelSize, num_steps: int, batch: int) -> tuple[int, int, bool]:
    """Play the steps at which methods change what they remember.

    Returns:
        Most bytes of state, bytes of what layers share, and whether queries were read.
    """
    shape = (batch, size.grid.tokens, size.heads, size.head_dim)
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    output = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    lse = torch.empty((batch, size.heads, size.grid.tokens), device="meta")
    ops = _ShapesOnly()
    state: dict[str, Any] = {}
    shared: dict[Hashable, Any] = {}
    peak = 0
    with _Watch(tensor) as watch:
        for step in sorted({0, 1, num_steps // 5, num_steps // 2, num_steps - 1}):
            call = _call(tensor, size, step, num_steps, state, shared)
            if method.plan(call, ops) is not None:
                method.finish(call, output, lse, ops)
            peak = max(peak, nbytes(state))
    return peak, nbytes(shared), watch.read


def _count(method: Method, size: ModelSize, num_steps: int) -> float:
    """Mean density of a static method over its sparse calls, on tensors of head_dim 1."""
    tensor = torch.zeros(1, size.grid.tokens, size.heads, 1)
    ops = _ShapesOnly()
    state: dict[str, Any] = {}
    shared: dict[Hashable, Any] = {}
    found: list[float] = []
    known: dict[int, tuple[BlockPlan, float]] = {}
    for step in range(min(num_steps, 12)):
        call = _call(tensor, size, step, num_steps, state, shared)
        plan = method.plan(call, ops)
        if plan is None:
            continue
        if id(plan) not in known:
            known[id(plan)] = (plan, float(plan.density().mean()))
        found.append(known[id(plan)][1])
        output, lse = ops.attend(tensor, tensor, tensor, plan, 1.0)
        method.finish(call, output, lse, ops)
    return sum(found) / len(found) if found else 1.0


def _call(
    tensor: Tensor,
    size: ModelSize,
    step: int,
    num_steps: int,
    state: dict[str, Any],
    shared: dict[Hashable, Any],
) -> AttentionCall:
    return AttentionCall(
        tensor,
        tensor,
        tensor,
        size.grid,
        size.head_dim**-0.5,
        num_layers=size.layers,
        heads=tuple(range(size.heads)),
        step=step,
        num_steps=num_steps,
        state=state,
        shared=shared,
    )
