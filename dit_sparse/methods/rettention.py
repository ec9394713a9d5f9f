# SPDX-License-Identifier: Apache-2.0
"""Re-ttention: a frozen mask, rescaled to its share of the full softmax, plus what it dropped.

Source: Chen et al. 2025, "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical
Reshape", arXiv:2505.22918, written with log-sum-exps so that no score matrix is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from dit_sparse.core.call import Method
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import StrategyError
from dit_sparse.methods import METHODS
from dit_sparse.methods.lists import MAX_COUNT, check_count, check_share, identity
from dit_sparse.methods.params import build_method, params_of
from dit_sparse.methods.radial import Radial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dit_sparse.core.call import AttentionCall, Ops
    from dit_sparse.core.grid import LatentsGrid
    from dit_sparse.core.traits import Params

_FULL_BLOCKS = 128  # of the dense plan on refresh steps, where the block size does not matter
_SCRATCH = 64 * 2**20  # bytes of fp32 outputs held at a time


class MaskParams(dict[str, Any]):
    """The mask's params, hashable as a field of a frozen dataclass must be; never changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash the keys alone: equal params have equal keys."""
        return hash(tuple(sorted(self)))


@dataclass(frozen=True, slots=True)
class Rettention(Method):
    """Attend by a frozen mask and add what the dropped keys gave when dense was last computed.

    On a refresh step dense attention gives O_f and LSE_f, and the masked one O_s and LSE_s. Kept
    are rho = exp(LSE_s - LSE_f), the mask's share of the softmax, and R = O_f - rho * O_s, what
    all dropped keys contribute; the call returns O_f. The m-th sparse step after it (m from 0)
    gives min(rho + m * ramp, 1) * O_s + R. A refresh step costs about as much as dense: kept and
    dropped keys are attended to apart and merged.

    The first sparse call of a run refreshes; dense steps before it are the schedule's (the paper
    has 5 of 20 for PixArt, 15 of 50 for CogVideoX). On the last step, where nothing could use a
    refresh, the call is plainly dense. Text is exact by the mask, so only video rows are changed
    and remembered. Unlike the released code the ratio is clamped, and steps come from the
    pipeline. The published mask is ``window`` with its defaults: 1/32 of a frame's keys in raster
    order.

    Any method that chooses blocks can be the mask. A dynamic one chooses on refresh steps, by
    their queries and keys, and its plan is kept until the next refresh, as the ratio and the
    residual hold for that plan only; it has a memory of its own (centroids, an older choice), and
    a ``refresh`` of its own counts steps too. Refused are methods that make dense calls of
    their own, and methods that compensate for what they drop: the residual does so.

    Memory: one [batch, video tokens, heads, head_dim] residual for each layer and branch, 31 GB
    for Wan 14B at 720p in bf16: give the rule a subset of layers, or offload. A dynamic mask's
    plan comes on top.

    Args:
        mask: Name of the method that chooses the blocks.
        mask_params: Its params; those not given keep their defaults.
        refresh: Steps from one refresh to the next, >= 2; the paper has 5. Higher is faster and
            staler.
        ramp: Added to the ratio with each sparse step, 0 to 1; the paper has 0.04, the ratio
            drifts so. 0 freezes it.
        clamp: Whether the ratio stops at 1. The released code lets it pass.
        residual_dtype: What the residual is kept in; "same" as the model's.
        offload: Keep the residual in the CPU's memory: frees the device, costs a transfer of it
            in every sparse call.
    """

    summary: ClassVar[str] = (
        "compensation: a frozen mask with rescaled output, plus the contribution of dropped "
        "keys from the last dense step (Re-ttention, 2505.22918)"
    )
    everything: ClassVar[Params] = {"mask_params": {"decay_factor": 1e9}}
    example: ClassVar[Params] = {"mask_params": Radial.example, "refresh": 3}
    untrainable: ClassVar[str] = "it adds what an earlier step left"
    density_params: ClassVar[tuple[str, ...]] = ("mask", "mask_params")
    stays: ClassVar[str] = "refresh and ramp are counted in steps"

    mask: str = "radial"
    mask_params: dict[str, Any] = field(default_factory=dict)
    refresh: int = 5
    ramp: float = 0.04
    clamp: bool = True
    residual_dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    offload: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and the mask's params by the mask itself."""
        if self.mask not in METHODS:
            raise StrategyError(
                f"mask must be a method that chooses blocks, got {self.mask!r}; try 'window'"
            )
        try:
            inner = build_method(self.mask, self.mask_params)
        except StrategyError as error:
            raise StrategyError(f"mask_params: {error}") from error
        if reason := _unfit(inner):
            raise StrategyError(f"mask: {self.mask!r} cannot be Re-ttention's mask: {reason}")
        object.__setattr__(self, "mask_params", MaskParams(self.mask_params))
        check_count("refresh", self.refresh, (2, MAX_COUNT), 5)
        check_share("ramp", self.ramp, zero=True, hint=0.04)
        if self.residual_dtype not in {"same", "float32", "bfloat16", "float16"}:
            raise StrategyError(
                "residual_dtype must be 'same', 'float32', 'bfloat16' or 'float16', got "
                f"{self.residual_dtype!r}"
            )

    @classmethod
    def at_density(cls, density: float, grid: LatentsGrid, block_size: int) -> Params:
        """Give the default mask the params for this density."""
        return {"mask_params": Radial.at_density(density, grid, block_size)}

    @classmethod
    def knobs(cls, share: float, grid: LatentsGrid, block_size: int) -> tuple[Params, ...]:
        """Turn the knobs of the default mask."""
        masks = Radial.knobs(share, grid, block_size)
        return tuple({"mask_params": {**mask, "block_size": block_size}} for mask in masks)

    @property
    def inner(self) -> Method:
        """The mask, built from its params."""
        return build_method(self.mask, self.mask_params)

    @property
    def block_tokens(self) -> int:
        """Tokens in a block of the mask."""
        return self.inner.block_tokens

    @property
    def period(self) -> int:
        """Steps from one refresh to the next."""
        return self.refresh

    @property
    def names_heads(self) -> bool:
        """Whether the mask treats single heads differently."""
        return self.inner.names_heads

    def rescaled(self, old: LatentsGrid, new: LatentsGrid) -> Rettention:
        """Fit the mask; of its params only those that change are written out."""
        before, after = (params_of(m) for m in (self.inner, self.inner.rescaled(old, new)))
        changed = {key: value for key, value in after.items() if value != before[key]}
        return replace(self, mask_params={**self.mask_params, **changed})

    @property
    def heads_tied(self) -> str:
        """Why the mask of a head depends on other heads."""
        return self.inner.heads_tied

    def drifts(self, old: LatentsGrid, new: LatentsGrid) -> tuple[str, ...]:  # noqa: ARG002
        """Warn that the mask may keep another share."""
        return ("its mask may keep another fraction",)

    def plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Keep all where a refresh is due (None on the last step), else the mask's blocks."""
        state = call.state
        age = call.step - state["refreshed"] if state.get("for") == identity(call) else 0
        if 0 < age < self.refresh:
            return self._mask_plan(call, ops)
        of_mask = state.get("of mask")
        state.clear()
        if call.step >= call.num_steps - 1:
            return None
        if of_mask is not None:
            state["of mask"] = of_mask
        return BlockPlan.full(call.layout(_FULL_BLOCKS), call.key_layout(_FULL_BLOCKS))

    def attend(self, call: AttentionCall, plan: BlockPlan, ops: Ops) -> tuple[Tensor, Tensor]:
        """Compute a refresh in two parts, kept and dropped keys, and remember both."""
        mask = self._mask_plan(call, ops) if plan.complete else None
        if mask is None or mask.complete:
            return ops.attend(call.query, call.key, call.value, plan, call.scale)
        if self._mask(call).static:
            place = (self, "dropped", call.grid, call.query.device, mask.batch)
            rest = call.once(place, mask.complement).with_keys(mask.kv)
        else:
            rest = mask.complement()
        qkv = (call.query, call.key, call.value)
        output, kept_lse = ops.attend(*qkv, mask, call.scale)
        dropped, dropped_lse = ops.attend(*qkv, rest, call.scale)
        lse = torch.logaddexp(kept_lse, dropped_lse)
        ratio = (kept_lse - lse).exp().transpose(1, 2)[..., None]
        share = (dropped_lse - lse).exp().transpose(1, 2)[..., None]
        video, residual = _video(call), self._empty_residual(call)
        for heads in _chunks(output):
            part = share[:, :, heads] * dropped[:, :, heads].to(share.dtype)
            residual[:, :, heads] = part[:, video]
            whole = ratio[:, :, heads] * output[:, :, heads].to(ratio.dtype) + part
            output[:, :, heads] = whole.to(output.dtype)
        self._keep(call, ratio[:, video].contiguous(), residual)
        return output, lse

    def finish(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> Tensor:
        """Remember ratio and residual on a refresh step; elsewhere apply them."""
        if call.state.get("for") != identity(call):
            self._remember(call, output, lse, ops)
            return output
        if call.state["refreshed"] == call.step:  # by ``attend``
            return output
        state, video = call.state, _video(call)
        ratio = state["ratio"] + (call.step - state["refreshed"] - 1) * self.ramp
        if self.clamp:
            ratio = ratio.clamp(max=1)
        for heads in _chunks(output):
            kept = output[:, video, heads].to(ratio.dtype)
            dropped = state["residual"][:, :, heads].to(output.device, ratio.dtype)
            output[:, video, heads] = (ratio[:, :, heads] * kept + dropped).to(output.dtype)
        return output

    def _mask(self, call: AttentionCall) -> Method:
        return call.once((self, "mask"), lambda: self.inner)

    def _mask_plan(self, call: AttentionCall, ops: Ops) -> BlockPlan | None:
        """Look up the mask's plan; a dynamic mask chooses once for each refresh."""
        mask, state = self._mask(call), call.state
        if mask.static:
            return mask.plan(call, ops)
        if "mask" not in state:  # a refresh is due: ``plan`` has dropped the last one
            own = replace(call, state=state.setdefault("of mask", {}))
            state["mask"] = mask.plan(own, ops)
        found: BlockPlan | None = state["mask"]
        return found

    def _remember(self, call: AttentionCall, output: Tensor, lse: Tensor, ops: Ops) -> None:
        """Run the mask beside a dense result that is known, and keep ratio and residual."""
        plan = self._mask_plan(call, ops)
        if plan is None:  # the mask is dense here
            return
        kept, kept_lse = ops.attend(call.query, call.key, call.value, plan, call.scale)
        video = _video(call)
        ratio = (kept_lse[..., video] - lse[..., video]).exp().transpose(1, 2)[..., None]
        residual = self._empty_residual(call)
        for heads in _chunks(output):
            held = ratio[:, :, heads] * kept[:, video, heads].to(ratio.dtype)
            residual[:, :, heads] = output[:, video, heads].to(ratio.dtype) - held
        self._keep(call, ratio, residual)

    def _empty_residual(self, call: AttentionCall) -> Tensor:
        value = call.value[:, _video(call)]
        same = self.residual_dtype == "same"
        dtype = value.dtype if same else getattr(torch, self.residual_dtype)
        device = torch.device("cpu") if self.offload else value.device
        return torch.empty(value.shape, dtype=dtype, device=device)

    def _keep(self, call: AttentionCall, ratio: Tensor, residual: Tensor) -> None:
        if self.clamp:
            ratio = ratio.clamp(max=1)  # above it only by rounding
        call.state.update(ratio=ratio, residual=residual, refreshed=call.step)
        call.state["for"] = identity(call)


def _unfit(mask: Method) -> str:
    """Say why a method cannot be frozen as a mask; empty where it can."""
    if mask.keeps_all:
        return "it keeps everything"
    if mask.at_start:
        return "it searches with its own dense calls; try 'pooled' or 'xattention'"
    if mask.period is not None:
        return "it refreshes with its own dense calls; try 'pooled' or 'xattention'"
    if mask.compensates:
        return "it already compensates for dropped keys, as the residual does"
    return ""


def _video(call: AttentionCall) -> slice:
    return slice(call.grid.video_start, call.grid.video_start + call.grid.video_tokens)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Cut the heads of ``[batch, tokens, heads, head_dim]`` so that fp32 copies stay small."""
    batch, tokens, heads, dim = x.shape
    step = max(1, _SCRATCH // (4 * batch * tokens * dim))
    return (slice(first, min(first + step, heads)) for first in range(0, heads, step))
