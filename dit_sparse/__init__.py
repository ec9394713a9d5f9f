# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for Diffusers video and image transformers.

Importing this package gives every Diffusers pipeline ``enable_sparse_attention(profile)``,
``disable_sparse_attention()`` and ``sparse_attention``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse._version import __version__
from dit_sparse.apply import (
    SparseAttention,
    current,
    disable,
    enable,
    refuse_exchange,
    report,
    sparse_attention,
)
from dit_sparse.errors import (
    AttachError,
    DitSparseError,
    GeometryError,
    KernelError,
    PlanError,
    StrategyError,
    UnsupportedError,
)
from dit_sparse.grid import BlockLayout, LatentsGrid
from dit_sparse.guarantee import Guarantee
from dit_sparse.methods import register_method
from dit_sparse.pipelines.install import install as _install
from dit_sparse.plan import BlockPlan
from dit_sparse.strategy import Strategy

__all__ = [
    "AttachError",
    "BlockLayout",
    "BlockPlan",
    "DitSparseError",
    "GeometryError",
    "Guarantee",
    "KernelError",
    "LatentsGrid",
    "PlanError",
    "SparseAttention",
    "Strategy",
    "StrategyError",
    "UnsupportedError",
    "__version__",
    "current",
    "disable",
    "enable",
    "profile",
    "register_method",
    "report",
    "sparse_attention",
]

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dit_sparse.profiler import Profile


def profile(
    pipe: Any, prompts: Sequence[str | Mapping[str, Any]], **options: Any
) -> Profile | None:
    """Search a strategy for a pipeline by measuring; see ``dit_sparse.profiler.profile``.

    The profiler is imported when this is called.

    Args:
        pipe: A Diffusers pipeline with nothing attached; it is left as it was.
        prompts: Texts, or arguments of a call that stand for one.
        **options: ``arguments``, ``seeds``, ``candidates``, ``wish``, ``bands``, ... of
            ``dit_sparse.profiler.profile``.

    Returns:
        What was found; ``.strategy`` is what ``enable_sparse_attention`` takes.
    """
    from dit_sparse.profiler import profile as search

    return search(pipe, prompts, **options)


_install(enable, disable, current, refuse_exchange)
