# SPDX-License-Identifier: Apache-2.0
"""What is put on a transformer: a root hook and a tap on ``cache_context``."""

from __future__ import annotations

import inspect
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook

from dit_sparse.pipelines.site import HERE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dit_sparse.pipelines.clock import Clock
    from dit_sparse.pipelines.family import Family, Shape

NAME = "dit_sparse"
REGISTRY = "_diffusers_hook"


class Listener(Protocol):
    """What the hook reports to; ``apply.py`` has the one implementation."""

    clock: Clock

    def adopt(self) -> None:
        """Look whether somebody exchanged processors since the last pass."""

    def end_generation(self) -> None:
        """Free what belongs to the generation that just ended."""


class RootHook(ModelHook):
    """Tells the token grid of every pass; diffusers resets it when a pipeline run ends."""

    _is_stateful = True

    def __init__(self, listener: Listener, family: Family, *, made_registry: bool) -> None:
        """Hold the listener weakly: the hook must not keep a pipeline alive."""
        super().__init__()
        self._listener = weakref.ref(listener)
        self.family = family
        self.made_registry = made_registry
        self.names: list[str] = []
        self._seen: tuple[Any, Shape | None] = (None, None)
        self.live = True

    def revive(self, listener: Listener) -> None:
        """Take part again, for another attachment."""
        self._listener, self.live = weakref.ref(listener), True

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Learn the names of positional arguments."""
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        return module

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the grid and the timestep of the pass that begins."""
        if not self.live:
            return args, kwargs
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        HERE.shape = self._shape(module, inputs)
        if not torch.compiler.is_compiling():
            listener = self._listener()
            if listener is not None:
                listener.clock.timestep = inputs.get("timestep")
                listener.adopt()
        return args, kwargs

    def _shape(self, module: nn.Module, inputs: dict[str, Any]) -> Shape:
        source = self.family.shape_input
        if source is None or torch.compiler.is_compiling():
            return self.family.shape(module.config, inputs)
        known, shape = self._seen
        text = inputs["encoder_hidden_states"].shape[1]
        if shape is None or known is None or known() is not inputs[source] or shape[3] != text:
            shape = self.family.shape(module.config, inputs)
            self._seen = (weakref.ref(inputs[source]), shape)
        return shape

    def reset_state(self, module: nn.Module) -> nn.Module:
        """End of a pipeline run (``maybe_free_model_hooks``)."""
        listener = self._listener()
        if self.live and listener is not None:
            listener.end_generation()
        return module


class ContextTap:
    """Stands before a transformer's ``cache_context`` and tells the clock what it says."""

    def __init__(self, clock: Clock, module: nn.Module) -> None:
        """Hold the model weakly; its class's own method does the work."""
        self.clock, self._module = clock, weakref.proxy(module)
        cls: Any = type(module)
        self._stock = cls.cache_context

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Pass on to the stock context manager."""
        self.clock.told = {"name": name, **kwargs}
        try:
            with self._stock(self._module, name, **kwargs):
                yield
        finally:
            self.clock.told = {}


def attach(module: nn.Module, listener: Listener, family: Family) -> None:
    """Put the root hook and the tap on a transformer."""
    fresh = not hasattr(module, REGISTRY)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if NAME in registry.hooks:  # left inert by an earlier detach, see there
        registry.hooks[NAME].revive(listener)
    else:
        registry.register_hook(RootHook(listener, family, made_registry=fresh), NAME)
    if hasattr(module, "cache_context"):
        module.__dict__["cache_context"] = ContextTap(listener.clock, module)


def detach(module: nn.Module) -> None:
    """Take both off; the model is as it was, unless somebody wrapped ``forward`` after us.

    diffusers puts back the forward it saw at registration. If accelerate wrapped it since, that
    would remove accelerate's hook too: then ours stays in place and does nothing.
    """
    module.__dict__.pop("cache_context", None)
    registry: Any = getattr(module, REGISTRY, None)
    hook = registry.hooks.get(NAME) if registry is not None else None
    if hook is None:
        return
    hook.live = False
    outermost = getattr(module.__dict__.get("forward"), "func", None)
    ours = outermost is not None and "HookRegistry.register_hook" in getattr(
        outermost, "__qualname__", ""
    )
    if not ours:
        return
    registry.remove_hook(NAME, recurse=False)
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # a bound method of the class itself: not an override
    if hook.made_registry and not registry.hooks:
        delattr(module, REGISTRY)
