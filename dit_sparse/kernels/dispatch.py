# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a call, why each of the others cannot, and whether it can be trusted.

A kernel is one module: ``reasons_against(query, plan)`` (one reason a line; empty: it can run),
``attend(query, key, value, plan, scale)``, optionally ``block_mass``, and ``HAS_BACKWARD``.
To add one, write the file and add its line to ``KERNELS``.
"""

from __future__ import annotations

import importlib
import math
import platform
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.machine import check_torch
from dit_sparse.core.merge import merge
from dit_sparse.core.plan import BlockPlan
from dit_sparse.errors import KernelError, PlanError
from dit_sparse.kernels import native
from dit_sparse.kernels.canary import (
    Kind,
    check_lloyd,
    check_once,
    small_plan,
    torch_is_faster,
)
from dit_sparse.kernels.kmeans import kmeans
from dit_sparse.kernels.means import add_means, block_means, means_plan
from dit_sparse.kernels.planning import Planning

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

# Name -> module, best first. Nothing is imported before it is asked for.
KERNELS = {
    "native": "dit_sparse.kernels.native",  # the CPU's come first: they refuse a GPU at once
    "cpu": "dit_sparse.kernels.cpu",
    "triton": "dit_sparse.kernels.triton_attention",
    "cudnn": "dit_sparse.kernels.cudnn",
    "flashinfer": "dit_sparse.kernels.flashinfer",
    "flex": "dit_sparse.kernels.flex",
    "portable": "dit_sparse.kernels.portable",  # torch alone, on any device
    "reference": "dit_sparse.kernels.reference",
}
KMEANS = "dit_sparse.kernels.triton_kmeans"
# Never chosen unless asked for: the reference is slow, the others have not run on a GPU yet.
BY_NAME_ONLY = {"reference", "cudnn", "flashinfer", "flex"}

Key = tuple[str, torch.device, torch.dtype, int, Kind]


class Backends(Planning):
    """The operations that methods use, answered by the first kernel that can (``call.Ops``).

    Args:
        kernel: Name of the one kernel to use; where it cannot run, ``KernelError`` says why and
            nothing else is tried. None: the first of ``KERNELS`` that can.
    """

    def __init__(self, kernel: str | None = None) -> None:
        if kernel is not None and kernel not in KERNELS:
            raise KernelError(f"unknown kernel {kernel!r}; available: {', '.join(KERNELS)}")
        self.kernel = kernel
        self.last_kernel: str | None = None
        """Name of the kernel that answered the last call."""
        self.native_missing = ""
        """Why the native CPU kernel did not run where it would have been the first choice."""
        self._modules: dict[str, ModuleType | str] = {}
        self._trusted: set[Key] = set()
        self._small: dict[torch.device, BlockPlan] = {}  # the plan that a block mass is like
        self._measured: _Measured | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend each query to the keys that the plan keeps.

        Args:
            query: ``[batch, seq_len, heads, head_dim]``, any strides.
            key: ``[batch, kv_seq_len, heads, head_dim]``, same dtype and device.
            value: Like ``key``.
            plan: Which blocks each query block reads, on the same device.
            scale: Multiplies the scores before softmax; finite.

        Returns:
            Output like ``query``, LSE fp32 ``[batch, heads, seq_len]``; 0 and -inf where a query
            keeps nothing.
        """
        _check_inputs(query, key, value, scale)
        _check_plan(query, key, plan)
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        name, module = self._choose(query, plan, "attend", needs_grad=needs_grad)
        self._canary(name, module, query, plan)
        self._measured, result = None, None
        if plan.measured and hasattr(module, "attend_with_mass"):
            found = module.attend_with_mass(query, key, value, plan, scale)
            if found is not None:
                result = found[:2]
                self._measured = _Measured(query, key, found[1], plan.q, plan.kv, scale, found[2])
        else:
            result = module.attend(query, key, value, plan, scale)
        if result is None:
            name, module = self._torch_on_cpu(query, plan)
            result = module.attend(query, key, value, plan, scale)
        if name == "reference":
            result = _rounded(result, query.dtype)
        if plan.means and not plan.complete:
            fused = None if needs_grad or plan.measured else getattr(module, "add_means", None)
            result = self._with_means(query, key, value, plan, scale, result, fused)
        self.last_kernel = name
        return result

    def _with_means(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        scale: float,
        kept: tuple[Tensor, Tensor],
        fused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Let each row read the blocks that it drops as their means, on top of the kept ones.

        ``fused`` is the kernel's own way to do so, in place; None: it has none.
        """
        keys, values = (block_means(x, plan) for x in (key, value))
        if fused is not None:
            merged: tuple[Tensor, Tensor] = fused(query, keys, values, plan, scale, *kept)
            return merged
        if query.device.type != "cpu":
            return add_means(query, keys, values, plan, scale, *kept)
        means, lse = self.attend(query, keys, values, means_plan(plan), scale)
        return merge(*kept, means, lse), torch.logaddexp(kept[1], lse)

    def block_mass(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        scale: float,
    ) -> Tensor:
        """Sum ``exp(scale * q k^T - lse)`` over each block pair.

        Args:
            query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
            key: ``[batch, kv_seq_len, heads, head_dim]``.
            lse: Of the dense attention, fp32 ``[batch, heads, seq_len]``.
            q: Query blocks.
            kv: Key blocks; keys in no block count nowhere.
            scale: Multiplies the scores; finite.

        Returns:
            fp32 ``[batch, heads, q_blocks, kv_blocks]``.
        """
        _check_inputs(query, key, key, scale)
        batch, tokens, heads, _ = query.shape
        if tuple(lse.shape) != (batch, heads, tokens):
            raise KernelError(
                f"lse must be [batch, heads, seq_len] = {(batch, heads, tokens)}, got "
                f"{tuple(lse.shape)}"
            )
        for side, layout, length in (("query", q, tokens), ("key", kv, key.shape[1])):
            if layout.slots != length:
                raise KernelError(
                    f"the {side} layout is for {layout.slots} tokens, {side} has {length}"
                )
            for size, wanted in zip(layout.starts.shape[:2], (batch, heads), strict=True):
                if size not in {1, wanted}:
                    raise KernelError(
                        f"the {side} layout is for {tuple(layout.starts.shape[:2])} (batch, "
                        f"heads), {side} has {(batch, heads)}"
                    )
        if self._measured is not None:
            known = self._measured.of(query, key, lse, q, kv, scale)
            if known is not None:
                return known
        if query.device not in self._small:
            self._small[query.device] = small_plan(query.device)
        name, module = self._choose(query, self._small[query.device], "block_mass")
        self._canary(name, module, query, self._small[query.device])
        result: Tensor | None = module.block_mass(query, key, lse, q, kv, scale)
        if result is None:
            name, module = self._torch_on_cpu(query, self._small[query.device])
            result = module.block_mass(query, key, lse, q, kv, scale)
        self.last_kernel = name
        return result.float()

    def kmeans(  # type: ignore[override]
        self,
        points: Tensor,
        clusters: int,
        iterations: int,
        *,
        init: Tensor | None = None,
        seed: int = 0,
        heads: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cluster tokens as ``kernels.kmeans.kmeans`` says; by Triton where Triton attends."""
        lloyd = self._lloyd(points)
        return kmeans(points, clusters, iterations, init=init, seed=seed, heads=heads, lloyd=lloyd)

    def _lloyd(self, points: Tensor) -> Any:
        """Choose what runs k-means' iterations; None: torch."""
        if points.device.type != "cuda" or self.kernel not in {None, "triton"}:
            return None
        module = self._module("triton")
        if isinstance(module, str) or module.reasons_against_tensor(points):
            return None
        found = importlib.import_module(KMEANS)
        key = (KMEANS, points.device, points.dtype, points.shape[-1], Kind())
        if key not in self._trusted:
            error = check_lloyd(found.lloyd, points.device, points.dtype, points.shape[-1])
            if error is not None:
                raise KernelError(
                    f"k-means in Triton failed its check, head_dim {points.shape[-1]}, "
                    f"{points.dtype} on {describe_device(points.device)}: {error}. {versions()}. "
                    "Choose another kernel by name, and please report this."
                )
            self._trusted.add(key)
        return found.lloyd

    def explain(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        head_dim: int = 64,
    ) -> list[tuple[str, list[str]]]:
        """List every kernel with the reasons why it cannot run there; no reasons: it can."""
        return self._explain(list(KERNELS), device, dtype, head_dim)

    def settle(self, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
        """Name the kernel that will run calls of this kind, before there is any.

        Warns where that is the portable one. A plan may still ask for what a kernel that was
        chosen by name does not have; that call raises.

        Raises:
            KernelError: None can; gives the reasons of each.
        """
        check_torch()
        names = self._names()
        found = self._explain(names, device, dtype, head_dim)
        against = [f"{name}: {reason}" for name, reasons in found for reason in reasons]
        chosen = next((name for name, reasons in found if not reasons), None)
        about = f"{dtype}, head_dim {head_dim}, on {device}"
        if chosen is None:
            others = ", ".join(name for name in KERNELS if name not in names)
            raise KernelError(
                f"no kernel can run this model's attention ({about}):\n  "
                + "\n  ".join(against)
                + "\nMove the model to the device that it will run on before sparse attention is "
                f"enabled, or choose another kernel by name ({others})"
            )
        if chosen == "portable" and self.kernel is None:
            warnings.warn(
                f"sparse attention runs in the kernel 'portable' ({about}), which may be slower "
                "than dense attention: compare the two; faster kernels cannot run here:\n  "
                + "\n  ".join(against),
                stacklevel=2,
            )
        return chosen

    def _names(self) -> list[str]:
        """Names of the kernels that may answer, best first."""
        if self.kernel is not None:
            return [self.kernel]
        return [name for name in KERNELS if name not in BY_NAME_ONLY]

    def _explain(
        self, names: list[str], device: torch.device | str, dtype: torch.dtype, head_dim: int
    ) -> list[tuple[str, list[str]]]:
        try:
            query = torch.zeros(1, 1, 1, head_dim, device=device, dtype=dtype)
            plan = small_plan(query.device)
        except (RuntimeError, AssertionError) as error:  # torch without that device
            reason = (
                f"this torch ({torch.__version__}) does not support {device}: "
                f"{str(error).splitlines()[0]}"
            )
            return [(name, [reason]) for name in names]
        return [(name, self._reasons(name, query, plan, "attend")) for name in names]

    def _module(self, name: str) -> ModuleType | str:
        """Import a kernel; where one of its packages is missing, say which."""
        if name not in self._modules:
            try:
                self._modules[name] = importlib.import_module(KERNELS[name])
            except ModuleNotFoundError as error:
                if error.name is None or error.name.split(".")[0] == "dit_sparse":
                    raise  # ours is missing: a bug, not an absent option
                self._modules[name] = f"needs the package {error.name}, which is not installed"
        return self._modules[name]

    def _reasons(
        self,
        name: str,
        query: Tensor,
        plan: BlockPlan,
        operation: str,
        *,
        needs_grad: bool = False,
    ) -> list[str]:
        module = self._module(name)
        if isinstance(module, str):
            return [module]
        reasons = list(module.reasons_against(query, plan))
        if not hasattr(module, operation):
            reasons.append(f"does not implement {operation}")
        if needs_grad and not getattr(module, "HAS_BACKWARD", False):
            reasons.append("does not compute gradients; call it under torch.no_grad()")
        return reasons

    def _choose(
        self, query: Tensor, plan: BlockPlan, operation: str, *, needs_grad: bool = False
    ) -> tuple[str, ModuleType]:
        against: list[str] = []
        for name in self._names():
            reasons = self._reasons(name, query, plan, operation, needs_grad=needs_grad)
            module = self._module(name)
            if not reasons and not isinstance(module, str):
                if name == "native" and self.kernel is None:
                    return self._faster_on_cpu(query)
                if name == "cpu" and self.kernel is None and not self.native_missing:
                    self._warn_without_native()
                return name, module
            against += [f"{name}: {reason}" for reason in reasons]
        raise KernelError(
            f"no kernel can {operation} {query.dtype} {tuple(query.shape)} on {query.device}:\n  "
            + "\n  ".join(against)
        )

    def _warn_without_native(self) -> None:
        self.native_missing = native.missing()
        if self.native_missing:
            warnings.warn(
                "sparse attention uses the slower torch kernel, because the native CPU kernel "
                f"cannot run: {self.native_missing}",
                stacklevel=2,
            )

    def _torch_on_cpu(self, query: Tensor, plan: BlockPlan) -> tuple[str, ModuleType]:
        """Give the kernel for numbers that the native one does not compute with, e.g. NaN."""
        module = importlib.import_module(KERNELS["cpu"])
        self._canary("cpu", module, query, plan)
        return "cpu", module

    def _faster_on_cpu(self, query: Tensor) -> tuple[str, ModuleType]:
        """Choose between the CPU's two kernels by a race, once for each dtype and head_dim."""
        slower = torch_is_faster(query.dtype, query.shape[-1])
        name = "cpu" if slower else "native"
        return name, importlib.import_module(KERNELS[name])

    def _canary(self, name: str, module: ModuleType, query: Tensor, plan: BlockPlan) -> None:
        """Compare a kernel with the reference before its first use on plans of this kind."""
        if name == "reference":
            return
        kind = plan.once("kind", lambda: Kind.of(plan))
        key = (name, query.device, query.dtype, query.shape[-1], kind)
        if key in self._trusted:
            return
        error = check_once(module, module.attend, *key[1:])
        if error is not None:
            raise KernelError(
                f"kernel {name!r} failed its check against the reference, head_dim "
                f"{query.shape[-1]}, {query.dtype} on {describe_device(query.device)}, {kind}: "
                f"{error}. "
                f"{versions()}. Choose another kernel by name, and please report this."
            )
        self._trusted.add(key)


@dataclass(frozen=True, slots=True)
class _Measured:
    """The block mass that the newest call summed on the way, until the next call."""

    query: Tensor
    key: Tensor
    lse: Tensor
    q: BlockLayout
    kv: BlockLayout
    scale: float
    mass: Tensor

    def of(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        scale: float,
    ) -> Tensor | None:
        """Give the mass where the question is about this very call, or a run of its heads."""
        if q is not self.q or kv is not self.kv or scale != self.scale:
            return None
        first = (lse.data_ptr() - self.lse.data_ptr()) // (self.lse.element_size() * lse.shape[-1])
        heads = slice(first, first + lse.shape[1])
        if first < 0 or heads.stop > self.lse.shape[1]:
            return None
        mine = (self.query[:, :, heads], self.key[:, :, heads], self.lse[:, heads])
        same = all(_is_view(a, b) for a, b in zip(mine, (query, key, lse), strict=True))
        return self.mass[:, heads] if same else None


def _is_view(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory; both are alive."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def exp_error(kernel: str) -> float:
    """Relative error of a kernel's exponentials, 0 where they are right to the last place."""
    return float(getattr(importlib.import_module(KERNELS[kernel]), "EXP_ERROR", 0.0))


def versions() -> str:
    """Name the versions that a kernel's result depends on."""
    found = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.version.cuda is not None:
        found.append(f"CUDA {torch.version.cuda}")
    return ", ".join(found)


def describe_device(device: torch.device) -> str:
    """Name a device as its maker does."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device} ({platform.machine()})"


def _rounded(result: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return result[0].to(dtype), result[1].float()


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise KernelError(f"inputs must be [batch, seq_len, heads, head_dim], got {shapes}")
    if key.shape != value.shape:
        raise KernelError(f"key and value must have the same shape, got {shapes}")
    batch, _, heads, head_dim = query.shape
    if (key.shape[0], key.shape[2], key.shape[3]) != (batch, heads, head_dim):
        raise KernelError(f"query and key must agree on batch, heads and head_dim, got {shapes}")
    if min(*query.shape, *key.shape) < 1:
        raise KernelError(f"no dimension may be 0, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise KernelError(
            f"query, key, value must have the same dtype, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise KernelError(
            f"query, key, value must be on the same device, got {query.device}, {key.device}, "
            f"{value.device}"
        )
    if not math.isfinite(scale):
        raise KernelError(f"scale must be finite, got {scale}")


def _check_plan(query: Tensor, key: Tensor, plan: BlockPlan) -> None:
    batch, tokens, heads, _ = query.shape
    if plan.device != query.device:
        raise PlanError(f"the plan is on {plan.device}, query on {query.device}; use plan.to()")
    if (plan.query_length, plan.key_length) != (tokens, key.shape[1]):
        raise PlanError(
            f"the plan is for {plan.query_length} query and {plan.key_length} key tokens, query "
            f"{tuple(query.shape)} has {tokens}, key {key.shape[1]}; make it from this call's grid"
        )
    if plan.batch not in {1, batch} or plan.heads not in {1, heads}:
        raise PlanError(
            f"the plan has batch size {plan.batch} and {plan.heads} heads, query "
            f"{tuple(query.shape)} has {batch} and {heads}"
        )
