# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for Diffusers video and image transformers.

Importing this package gives every Diffusers pipeline ``enable_sparse_attention(profile)``,
``disable_sparse_attention()`` and ``sparse_attention``.
"""

from dit_sparse._version import __version__
from dit_sparse.apply import SparseAttention, current, disable, enable, report, sparse_attention
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
from dit_sparse.pipelines.install import install as _install
from dit_sparse.plan import BlockPlan
from dit_sparse.strategy import Strategy

__all__ = [
    "AttachError",
    "BlockLayout",
    "BlockPlan",
    "DitSparseError",
    "GeometryError",
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
    "report",
    "sparse_attention",
]

_install(enable, disable, current)
