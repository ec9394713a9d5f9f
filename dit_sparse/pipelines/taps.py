# SPDX-License-Identifier: Apache-2.0
"""Stand before a few methods of a transformer, and tell what they were told.

Each is an attribute of the instance, so that taking it away leaves the class's own method; copied
or pickled, it is that method.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dit_sparse.errors import AttachError
from dit_sparse.pipelines import parallel
from dit_sparse.pipelines.hooks import ROOT, Root
from dit_sparse.pipelines.site import HERE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dit_sparse.pipelines.family import Family
    from dit_sparse.pipelines.hooks import Listener


class _Tap:
    """Hold listener and model weakly; ``name`` is the method's."""

    name = ""

    def __init__(self, listener: Listener, module: nn.Module, root: Root, heads: int) -> None:
        self._listener, self._module = weakref.ref(listener), weakref.ref(module)
        self._root, self._heads = root, heads

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module(), self.name)


class ContextTap(_Tap):
    """Notes the guidance branch, and the step where diffusers says it (from 0.41)."""

    name = "cache_context"

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Pass on to the stock context manager."""
        module: Any = self._module()
        listener = self._listener()
        self._root.settle(module)
        before = HERE.told
        if listener is not None:
            listener.adopt()  # here too: within a graph of the whole model nobody can look
            HERE.told = (listener, {"name": name, **kwargs})
        try:
            with type(module).cache_context(module, name, **kwargs):
                yield
        finally:
            HERE.told = before


class ResetTap(_Tap):
    """Hears that a pipeline run ended (``maybe_free_model_hooks``)."""

    name = "_reset_stateful_cache"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Free what belongs to the generation, and pass on."""
        listener = self._listener()
        if listener is not None:
            listener.end_generation()
        module: Any = self._module()
        type(module)._reset_stateful_cache(module, *args, **kwargs)  # noqa: SLF001


class ParallelTap(_Tap):
    """Refuses what sparse attention cannot run under before anything is changed.

    It also sees to it that a graph reads the inputs before they are split.
    """

    name = "enable_parallelism"

    def __call__(self, *, config: Any, cp_plan: Any = None) -> None:
        """Check, and pass on to the stock method."""
        module: Any = self._module()
        parallel.check(module, self._heads, config, cp_plan)
        outermost = self._root.unwrap(module)
        if not outermost and self._root.family.shape_inputs:
            raise AttachError(
                f"{type(module).__name__}: its forward was wrapped after sparse attention was "
                "enabled, so enable_parallelism must come first; disable sparse attention, "
                "enable parallelism, then enable sparse attention again"
            )
        try:
            type(module).enable_parallelism(module, config=config, cp_plan=cp_plan)
        finally:
            if outermost:
                self._root.wrap(module)
        listener = self._listener()
        if listener is not None:
            listener.remark_on_sharing()


TAPS = (ContextTap, ResetTap, ParallelTap)


def attach(module: nn.Module, listener: Listener, family: Family, heads: int) -> None:
    """Put the hooks on a transformer, and a tap before each of the methods that it has."""
    root = Root(listener, family, module)
    module.__dict__[ROOT] = root
    for tap in TAPS:
        if hasattr(module, tap.name):
            module.__dict__[tap.name] = tap(listener, module, root, heads)


def detach(module: nn.Module) -> None:
    """Take them off; where something wraps ``forward`` that hides ours, an inert one stays."""
    for tap in TAPS:
        module.__dict__.pop(tap.name, None)
    root = module.__dict__.pop(ROOT, None)
    if root is not None:
        root.remove(module)
