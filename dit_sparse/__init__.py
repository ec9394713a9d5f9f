# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for Diffusers video and image transformers.

Importing this package gives every Diffusers pipeline ``enable_sparse_attention(profile)``,
``disable_sparse_attention()`` and ``sparse_attention``. It loads neither torch nor diffusers by
itself: names are loaded when they are used, and pipelines get their methods when diffusers is
imported, before or after.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit_sparse._version import __version__
from dit_sparse.core.moved import MovedModules
from dit_sparse.core.on_import import on_import

if TYPE_CHECKING:
    from types import ModuleType

    from dit_sparse.attach.apply import (
        SparseAttention,
        current,
        disable,
        enable,
        report,
        sparse_attention,
    )
    from dit_sparse.attach.guarantee import Guarantee
    from dit_sparse.attach.report import Report
    from dit_sparse.attach.runtime import Runtime
    from dit_sparse.core.call import AttentionCall
    from dit_sparse.core.grid import BlockLayout, LatentsGrid
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.errors import (
        AttachError,
        DitSparseError,
        GeometryError,
        KernelError,
        PlanError,
        StrategyError,
        UnsupportedError,
    )
    from dit_sparse.methods import register_method
    from dit_sparse.profiler import profile
    from dit_sparse.strategy import Rule, Schedule, Strategy

__all__ = [
    "AttachError",
    "AttentionCall",
    "BlockLayout",
    "BlockPlan",
    "DitSparseError",
    "GeometryError",
    "Guarantee",
    "KernelError",
    "LatentsGrid",
    "PlanError",
    "Report",
    "Rule",
    "Runtime",
    "Schedule",
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

_NAMES_OF = {
    "attach.apply": "SparseAttention current disable enable report sparse_attention",
    "attach.guarantee": "Guarantee",
    "attach.report": "Report",
    "attach.runtime": "Runtime",
    "core.call": "AttentionCall",
    "core.grid": "BlockLayout LatentsGrid",
    "core.plan": "BlockPlan",
    "errors": "AttachError DitSparseError GeometryError KernelError PlanError StrategyError "
    "UnsupportedError",
    "methods": "register_method",
    "profiler": "profile",
    "strategy": "Rule Schedule Strategy",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _install(module: ModuleType) -> None:
    from dit_sparse.attach.apply import current, disable, enable, refuse_exchange
    from dit_sparse.pipelines.caller import PIPELINES
    from dit_sparse.pipelines.install import install

    base = getattr(module, PIPELINES[module.__name__])
    install(base, enable, disable, current, refuse_exchange)


sys.meta_path.append(MovedModules())
on_import("diffusers.pipelines.pipeline_utils", _install)
on_import("diffusers.modular_pipelines.modular_pipeline", _install)
