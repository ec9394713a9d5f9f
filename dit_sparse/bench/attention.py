# SPDX-License-Identifier: Apache-2.0
"""Time the kernels on given plans, each in alternation with dense attention.

The figure of merit is ``efficiency = dense time x density / sparse time``: 1 where every dropped
block saves its whole share of the dense time. A configuration whose result is wrong gets no time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from dit_sparse.bench.result import Measurement
from dit_sparse.bench.timing import Clock, alternate, dense_calls
from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError
from dit_sparse.kernels.canary import compare
from dit_sparse.kernels.dispatch import Backends, exp_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dit_sparse.bench.shapes import Shape

Pattern = Literal["random", "local"]
PATTERNS: tuple[Pattern, ...] = ("random", "local")
CHECKED_BLOCKS = 2  # query blocks whose result is compared with the reference before timing


def measure_kernels(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    block_size: int,
    densities: Sequence[float],
    patterns: Sequence[Pattern],
    repeats: int,
    kernels: Sequence[str | None],
) -> tuple[list[Measurement], dict[str, str]]:
    """Measure one shape and block size: all kernels and densities in one alternation.

    Returns:
        The measurements, and the dense backends that could not run with the reason.
    """
    random = torch.Generator().manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    query, key, value = (torch.randn(size, generator=random).to(device, dtype) for _ in range(3))
    scale = shape.head_dim**-0.5
    clock = Clock.of(device)
    results: list[Measurement] = []
    with torch.no_grad():
        calls, against = dense_calls(query, key, value, scale)
        dense_names = list(calls)
        for pattern in patterns:
            for density in densities:
                plan = make_plan(shape, block_size, density, pattern, random).to(device)
                for kernel in kernels:
                    backends = Backends(kernel)
                    try:
                        output, lse = backends.attend(query, key, value, plan, scale)
                        error = exp_error(backends.last_kernel or "")
                        fault = _check(query, key, value, plan, scale, output, lse, error)
                    except KernelError as error:
                        fault = str(error)
                    if fault is None:
                        calls[str(len(results))] = _call(backends, query, key, value, plan, scale)
                    results.append(
                        Measurement(
                            shape=shape,
                            dtype=str(dtype).removeprefix("torch."),
                            block_size=block_size,
                            pattern=pattern,
                            density=float(plan.density().mean()),
                            threads=torch.get_num_threads(),
                            clock=clock.kind,
                            kernel=backends.last_kernel or kernel,
                            fault=fault,
                        )
                    )
        times = alternate(calls, repeats, clock)
    dense = min(dense_names, key=times.__getitem__)
    found = [
        result
        if result.fault is not None
        else replace(result, dense_kernel=dense, dense_ms=times[dense], sparse_ms=times[str(i)])
        for i, result in enumerate(results)
    ]
    return found, against


def _call(
    backends: Backends, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> Callable[[], object]:
    return lambda: backends.attend(query, key, value, plan, scale)


def make_plan(
    shape: Shape, block_size: int, density: float, pattern: Pattern, random: torch.Generator
) -> BlockPlan:
    """Keep the same number of key blocks in every row: random ones, or the nearest ones."""
    layout = shape.grid.layout(block_size)
    blocks = layout.blocks
    kept = max(1, round(blocks * density))
    if pattern == "random":
        score = torch.rand(1, shape.heads, blocks, blocks, generator=random)
    else:
        place = torch.arange(blocks, dtype=torch.float32)
        score = -(place[:, None] - place).abs().expand(1, shape.heads, -1, -1)
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.scatter_(-1, score.topk(kept, dim=-1).indices, value=True)
    return BlockPlan.from_block_mask(mask, layout, layout)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
    error: float,
) -> str | None:
    """Compare some query blocks, over all their keys, with the reference."""
    for i_q in torch.linspace(0, plan.q.blocks - 1, CHECKED_BLOCKS).long().tolist():
        start, length = int(plan.q.starts[0, 0, i_q]), int(plan.q.lengths[0, 0, i_q])
        rows = slice(start, start + length)
        part = BlockPlan(
            BlockLayout.from_lengths([length], plan.device),
            plan.kv,
            plan.kv_indices[:, :, i_q : i_q + 1],
            plan.kv_num_blocks[:, :, i_q : i_q + 1],
        )
        o, e = output[:, rows], lse[:, :, rows]
        fault = compare(query[:, rows], key, value, part, scale, o, e, error)
        if fault is not None:
            return f"query block {i_q}: {fault}"
    return None
