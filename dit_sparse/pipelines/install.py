# SPDX-License-Identifier: Apache-2.0
"""Give a base class of Diffusers pipelines its methods; ``dit_sparse/__init__.py`` says when."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def install(
    base: Any,
    enable: Callable[..., Any],
    disable: Callable[..., Any],
    current: Callable[..., Any],
    check: Callable[[Any, str, Any], None],
) -> None:
    """Add ``enable_sparse_attention``, ``disable_sparse_attention`` and ``sparse_attention``.

    ``check`` is asked before an attribute of a pipeline is set, and may raise.
    """
    base.enable_sparse_attention = enable
    base.disable_sparse_attention = disable
    base.sparse_attention = property(current, doc="What is attached, or None.")
    _watch(base, check)


def _watch(base: Any, check: Callable[[Any, str, Any], None]) -> None:
    stock = getattr(base.__setattr__, "__wrapped__", base.__setattr__)  # a module may be reloaded

    @functools.wraps(stock)
    def setattr_checked(self: Any, name: str, value: Any) -> None:
        check(self, name, value)
        stock(self, name, value)

    base.__setattr__ = setattr_checked
