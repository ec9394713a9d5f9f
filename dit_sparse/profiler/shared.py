# SPDX-License-Identifier: Apache-2.0
"""The kernels' operations for candidates that are tried on one and the same call.

What several candidates ask for in the same words is computed once: dense attention for those that
search, the exact block mass of the searches, the clusters of one number whatever share of them is
kept, scores of block pairs. Each gets a copy of its own, so results are what they would be alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.sizes import nbytes
from dit_sparse.kernels.dispatch import Backends

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.plan import BlockPlan


class SharedOps(Backends):
    """``Backends`` that remembers while candidates are tried on one call.

    Only results of the call's own query, key and value (and of the log-sum-exps lent here) are
    shared, told apart by storage, offset, shape and strides; all other tensors are computed with
    as ever. What is kept takes at most as many bytes as the dense output does.
    """

    def __init__(self, kernel: str | None = None) -> None:
        super().__init__(kernel)
        self.asked = self.answered = 0
        """How often a sharable operation was asked for, and was known."""
        self._call: AttentionCall | None = None
        self._exact: tuple[Tensor, Tensor] | None = None
        self._roots: dict[int, int | str] = {}
        self._lent: list[Tensor] = []
        self._known: dict[Any, list[tuple[Any, Any]]] = {}
        self._room = 0

    def begin(self, call: AttentionCall, exact: Tensor, lse: Tensor) -> None:
        """Start with a call and its dense result."""
        self.end()
        self._call, self._exact = call, (exact, lse)
        for tensor in (call.query, call.key, call.value):
            self._roots[_storage(tensor)] = _storage(tensor)
        self._room = exact.numel() * exact.element_size()

    def end(self) -> None:
        """Forget everything."""
        self._call = self._exact = None
        self._known.clear()
        self._roots.clear()
        self._lent.clear()
        self._room = 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend; the call's own dense attention is known."""
        call = self._call
        if call is None or self._exact is None or not plan.complete or scale != call.scale:
            return super().attend(query, key, value, plan, scale)
        mine = (call.query, call.key, call.value)
        if any(a is not b for a, b in zip((query, key, value), mine, strict=True)):
            return super().attend(query, key, value, plan, scale)
        output, lse = (x.clone() for x in self._exact)
        self._lent.append(lse)  # held, so that its storage is nobody else's in this call
        self._roots[_storage(lse)] = "lse"
        return output, lse

    def block_mass(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        scale: float,
    ) -> Tensor:
        """Sum the exact mass of block pairs."""
        found: Tensor = self._once(super().block_mass, query, key, lse, q, kv, scale)
        return found

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
        """Cluster tokens; the same start gives the same clusters."""

        def run(points: Tensor, clusters: int, iterations: int, seed: int) -> Any:
            return super(SharedOps, self).kmeans(
                points, clusters, iterations, init=init, seed=seed, heads=heads
            )

        found: tuple[Tensor, Tensor, Tensor] = self._once(
            run, points, clusters, iterations, seed, name="kmeans", start=init
        )
        return found

    def pooled_scores(
        self, query: Tensor, key: Tensor, q: BlockLayout, kv: BlockLayout, scale: float
    ) -> Tensor:
        """Score block pairs by their means."""
        found: Tensor = self._once(super().pooled_scores, query, key, q, kv, scale)
        return found

    def antidiagonal(
        self,
        query: Tensor,
        key: Tensor,
        q: BlockLayout,
        kv: BlockLayout,
        stride: int,
        scale: float,
    ) -> Tensor:
        """Estimate the mass of block pairs."""
        found: Tensor = self._once(super().antidiagonal, query, key, q, kv, stride, scale)
        return found

    def _once(
        self,
        operation: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        start: Tensor | None = None,
    ) -> Any:
        """Compute, or copy what is known; ``start`` is one more argument, compared by value."""
        key = self._key(name or operation.__name__, args)
        if key is None:
            return operation(*args)
        self.asked += 1
        for (held, known_start), result in self._known.get(key, ()):
            del held  # kept so that the ids in the key stay its own
            if _equal(start, known_start):
                self.answered += 1
                return _copy(result)
        result = operation(*args)
        size = nbytes([result, start])
        if size <= self._room:
            self._room -= size
            kept = ((args, None if start is None else start.clone()), _copy(result))
            self._known.setdefault(key, []).append(kept)
        return result

    def _key(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Name a question; None: it is not about the call's own tensors."""
        if self._call is None:
            return None
        parts: list[Any] = [name]
        for each in args:
            if isinstance(each, Tensor):
                root = self._roots.get(_storage(each))
                if root is None:
                    return None
                place = (each.storage_offset(), tuple(each.shape), each.stride(), each.dtype)
                parts.append((root, *place))
            else:
                parts.append(id(each) if isinstance(each, BlockLayout) else each)
        return tuple(parts)


def _storage(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata  # noqa: SLF001
    return found


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


def _copy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    return tuple(each.clone() for each in result)
