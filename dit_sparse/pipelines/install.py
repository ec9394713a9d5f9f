# SPDX-License-Identifier: Apache-2.0
"""Give every Diffusers pipeline class its methods, at ``import dit_sparse``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline, ModularPipeline

if TYPE_CHECKING:
    from collections.abc import Callable


def install(
    enable: Callable[..., Any], disable: Callable[..., Any], current: Callable[..., Any]
) -> None:
    """Add ``enable_sparse_attention``, ``disable_sparse_attention`` and ``sparse_attention``."""
    for base in (DiffusionPipeline, ModularPipeline):
        base.enable_sparse_attention = enable
        base.disable_sparse_attention = disable
        base.sparse_attention = property(current, doc="What is attached, or None.")
