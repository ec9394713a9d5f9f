# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel can be trusted, and which of two is faster: both on a small problem."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import cpu, native, reference
from dit_sparse.kernels.kmeans import kmeans
from dit_sparse.kernels.means import block_means, dropped_blocks, log_lengths

if TYPE_CHECKING:
    from torch import Tensor

RACE_TOKENS, RACE_BLOCK = 512, 64
RACE_ROUNDS, RACE_MOST_ROUNDS = 3, 25
RACE_MARGIN = 1.25


def check_lloyd(lloyd: Any, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run k-means on small whole numbers, where nothing is rounded; say what is wrong, if so."""
    random = torch.Generator().manual_seed(0)
    points = torch.randint(-2, 3, (1, 70, 2, head_dim), generator=random).float()
    init = torch.randint(-2, 3, (1, 2, 9, head_dim), generator=random).float()
    wanted = kmeans(points, 9, 1, init=init)
    found = lloyd(points.to(device, dtype), init.to(device), 1)
    for name, got, right in zip(("centroids", "labels", "counts"), found, wanted, strict=True):
        if not torch.allclose(got.cpu().double(), right.double(), rtol=1e-6, atol=1e-6):
            return f"{name} differ from the torch implementation"
    return None


@lru_cache(maxsize=4096)
def check_once(
    module: Any,
    attend: Any,  # noqa: ARG001  (the module's: one that was exchanged is checked anew)
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kind: Kind,
) -> str | None:
    """Check a kernel as ``check_kernel`` does, once a process."""
    return check_kernel(module, device, dtype, head_dim, kind)


def check_kernel(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kind: Kind | None = None,
) -> str | None:
    """Run a kernel on a small problem with ragged and dropped blocks; say what is wrong, if so.

    Args:
        module: The kernel.
        device: Where.
        dtype: Of query, key and value.
        head_dim: Of query, key and value.
        kind: Of the plan; None: the plainest.
    """
    kinds = [Kind() if kind is None else kind._replace(means=False)]
    if kind is not None and kind.means and hasattr(module, "add_means"):
        kinds.append(kind._replace(weighted=False, cut=False))
    for each in kinds:
        error = _check_kind(module, device, dtype, head_dim, each)
        if error is not None:
            return error
    return None


@torch.no_grad()
def _check_kind(
    module: Any, device: torch.device, dtype: torch.dtype, head_dim: int, kind: Kind
) -> str | None:
    plan, scale = small_plan(device, kind), head_dim**-0.5
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, 2, head_dim, generator=random).to(device=device, dtype=dtype)
        for tokens in (plan.query_length, plan.key_length, plan.key_length)
    )
    output, lse = module.attend(query, key, value, plan, scale)
    if kind.means:
        means = [block_means(x, plan) for x in (key, value)]
        output, lse = module.add_means(query, *means, plan, scale, output, lse)
        key, value = torch.cat([key, means[0]], 1), torch.cat([value, means[1]], 1)
        plan = _means_as_keys(plan)
    error = getattr(module, "EXP_ERROR", 0.0)
    # On the CPU: not every device has the reference's float64.
    query, key, value, output, lse = (x.cpu() for x in (query, key, value, output, lse))
    found = compare(query, key, value, plan.to("cpu"), scale, output, lse, error)
    return f"with means, {found}" if kind.means and found is not None else found


def _means_as_keys(plan: BlockPlan) -> BlockPlan:
    """Plan over the keys with the means behind them, each a block of its own."""
    kv, device = plan.kv, plan.device
    lead = kv.lengths.shape[:2]
    behind = torch.arange(kv.slots, kv.slots + kv.blocks, dtype=torch.int32, device=device)
    behind = behind.expand(*lead, -1)
    layout = BlockLayout(
        torch.cat([kv.starts, behind], -1),
        torch.cat([kv.lengths, torch.ones_like(kv.lengths)], -1),
        kv.slots + kv.blocks,
        kv.max_length,
    )
    order = plan.kv_permutation
    if order is not None:
        order = torch.cat([order, behind[:1, :1].to(order.dtype)], -1)
    return BlockPlan.from_block_mask(
        torch.cat([plan.block_mask(), dropped_blocks(plan)], -1),
        plan.q,
        layout,
        q_permutation=plan.q_permutation,
        kv_permutation=order,
        kv_log_weight=torch.cat(
            [torch.zeros(*lead, kv.slots, device=device), log_lengths(plan)], -1
        ),
    )


@cache
@torch.no_grad()
def torch_is_faster(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's CPU kernel clearly beats the native one on this machine.

    Times a sparse call of 512 tokens and 2 heads with a quarter of its blocks kept, in some
    milliseconds; the best round counts. The answer is remembered for the process, and torch has to
    win by ``RACE_MARGIN`` over many rounds: the two kernels round differently, so a race that is
    decided by what else runs on the machine would make the same generation differ from run to run.
    """
    modules = {"native": native, "cpu": cpu}
    layout = BlockLayout.from_lengths([RACE_BLOCK] * (RACE_TOKENS // RACE_BLOCK))
    place = torch.arange(layout.blocks)
    mask = (place[:, None] * 5 + place * 3) % 4 == 0  # scattered, as a method would keep them
    plan = BlockPlan.from_block_mask(mask[None, None], layout, layout)
    random = torch.Generator().manual_seed(0)
    shape = (1, RACE_TOKENS, 2, head_dim)
    query, key, value = (torch.randn(shape, generator=random).to(dtype) for _ in range(3))
    best = dict.fromkeys(modules, float("inf"))
    for done in range(1, RACE_MOST_ROUNDS + 1):
        for name, module in modules.items():
            start = time.perf_counter()
            module.attend(query, key, value, plan, head_dim**-0.5)
            best[name] = min(best[name], time.perf_counter() - start)
        if done >= RACE_ROUNDS and best["cpu"] * RACE_MARGIN >= best["native"]:
            return False
    return True


def compare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
    exp_error: float = 0.0,
) -> str | None:
    """Compare a kernel's result with the float64 reference; say what is wrong, None if nothing.

    The error may be twice that of the plain computation in the kernel's own dtype, plus one
    rounding of the result (the LSE is an fp32 number, also for float64). ``exp_error`` is the
    relative error that a kernel's exponentials have where they are not rounded to the last place;
    in float64 there is none. It moves weights p and their sum, so an output by at most twice its
    share of the sum of p |v|, which may be far above |output|, and an LSE by itself.
    """
    if output.shape != query.shape or output.dtype != query.dtype:
        return (
            f"output is {output.dtype} {tuple(output.shape)}, query is {query.dtype} "
            f"{tuple(query.shape)}"
        )
    exact_o, exact_lse = reference.attend(query, key, value, plan, scale)
    plain_o, plain_lse = reference.attend(query, key, value, plan, scale, dtype=query.dtype)
    for name, got, exact, plain in (
        ("output", output, exact_o, plain_o),
        ("lse", lse, exact_lse, plain_lse),
    ):
        special = ~exact.isfinite()
        same = torch.where(exact.isnan(), got.isnan(), got.double() == exact)
        if bool((special & ~same).any()) or bool((~special & ~got.isfinite()).any()):
            return f"{name} has NaN or inf at other positions than the reference"
        zero = torch.zeros((), dtype=torch.float64, device=exact.device)
        error = float(torch.where(special, zero, got.double() - exact).abs().max())
        peak = float(torch.where(special, zero, exact).abs().max())
        own = float(torch.where(special, zero, plain.double() - exact).abs().nan_to_num().max())
        if query.dtype == torch.float64:  # that is the reference itself: take what theory allows
            own, exp_error = _error_bound(query, key, value, plan, scale), 0.0
        allowed = 2 * (own + torch.finfo(got.dtype).eps * peak)
        if exp_error and name == "output":
            allowed += 2 * exp_error * _largest_sum(query, key, value, plan, scale)
        elif exp_error:
            allowed += exp_error
        if not error <= allowed:
            return f"{name} differs by {error:.3g}, the limit is {allowed:.3g}"
    return None


def _largest_sum(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> float:
    """Give the largest sum of p |v| over the keys of a query, where it is finite."""
    sums, _ = reference.attend(query, key, value.abs(), plan, scale)
    return float(sums.nan_to_num(0.0, 0.0, 0.0).max())


def _error_bound(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
) -> float:
    """Bound the rounding error of attention in the inputs' dtype.

    A dot product of n terms errs by at most n roundings of its size (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", section 3.1); softmax passes a score's error on as the
    relative error of a weight, twice: in the numerator and in the sum.
    """

    def most(x: Tensor) -> float:
        return float(x.double().nan_to_num(posinf=0.0, neginf=0.0).norm(dim=-1).max())

    score = abs(scale) * most(query) * most(key)
    if plan.kv_log_weight is not None:
        score += most(plan.kv_log_weight[..., None])
    roundings = 2 * (query.shape[-1] + 1) * score + 2 * key.shape[1]
    return torch.finfo(query.dtype).eps * roundings * most(value[..., None])


class Kind(NamedTuple):
    """What of a plan decides how a kernel computes it: its tiling, and which of its code runs.

    Args:
        q_length: Longest query block, or one with the same tiles. This and the next three are the
            same for all plans on the CPU, whose kernels do not go by them.
        kv_length: The same of key blocks.
        q_spread: Query blocks start at equal distances.
        kv_spread: Key blocks do.
        own: Heads have layouts of their own.
        q_permuted: Queries are reordered.
        kv_permuted: Keys are.
        weighted: Keys have log weights.
        cut: Bit tiles cut blocks.
        means: Dropped blocks are read as their means.
    """

    q_length: int = 64
    kv_length: int = 64
    q_spread: bool = True
    kv_spread: bool = False
    own: bool = False
    q_permuted: bool = False
    kv_permuted: bool = False
    weighted: bool = False
    cut: bool = False
    means: bool = False

    @classmethod
    def of(cls, plan: BlockPlan) -> Kind:
        """Read the kind of a plan; no value is read from the device."""
        tiling = (64, 64, True, False)
        if plan.device.type != "cpu":
            longest = _like(plan.q.max_length), _like(plan.kv.max_length)
            tiling = (*longest, plan.q.spread, plan.kv.spread)
        return cls(
            *tiling,
            max(plan.q.lengths.shape[1], plan.kv.lengths.shape[1]) > 1,
            plan.q_permutation is not None,
            plan.kv_permutation is not None,
            plan.kv_log_weight is not None,
            plan.tiles is not None and len(plan.tiles) > 0,
            plan.means and not plan.complete,
        )


def _like(length: int) -> int:
    """Shorten a long block to one whose tiles of up to 128 are cut likewise, three or more."""
    return length if length <= 384 else 384 + length % 128


def small_plan(device: torch.device, kind: Kind | None = None) -> BlockPlan:
    """Make a plan of a kind: unequal blocks, a ragged tail and an empty row, 2 heads."""
    kind = Kind() if kind is None else kind
    random = torch.Generator().manual_seed(1)
    long, wide = kind.q_length, kind.kv_length
    rest = -(-long * 4 // 7)  # 37 of 64
    q = _layout([long, long if kind.q_spread else rest, rest], kind.q_spread)
    short = wide if kind.kv_spread else -(-wide // 2)
    kv = _layout([wide, short, wide, min(5, wide)], kind.kv_spread)
    rows = [[[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]]]
    kept = torch.tensor([rows], dtype=torch.bool)
    if kind.cut:
        mask = kept.repeat_interleave(q.lengths[0, 0], 2).repeat_interleave(kv.lengths[0, 0], 3)
        mask[:, :, long:] &= torch.rand(q.slots - long, kv.slots, generator=random) < 0.7
        plan = BlockPlan.from_token_mask(mask, q, kv)
    else:
        plan = BlockPlan.from_block_mask(kept, q, kv)
    if kind.own:
        plan = replace(plan, q=_of_each_head(q), kv=_of_each_head(kv))
    weight = torch.randn(1, 1, kv.slots, generator=random)
    weight[..., 3] = -torch.inf
    q_order, kv_order = (torch.randperm(x.slots, generator=random)[None, None] for x in (q, kv))
    plan = replace(
        plan,
        q_permutation=q_order if kind.q_permuted else None,
        kv_permutation=kv_order if kind.kv_permuted else None,
        kv_log_weight=weight if kind.weighted else None,
    ).to(device)
    return plan.with_means() if kind.means else plan


def _layout(lengths: list[int], spread: bool) -> BlockLayout:
    return replace(BlockLayout.from_lengths(lengths), spread=spread)


def _of_each_head(layout: BlockLayout) -> BlockLayout:
    starts, lengths = (x.repeat(1, 2, 1) for x in (layout.starts, layout.lengths))
    return replace(layout, starts=starts, lengths=lengths)
