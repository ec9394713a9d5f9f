# SPDX-License-Identifier: Apache-2.0
"""Run a transformer on tensors without data, and watch its main self-attention."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

COPY = torch.ops.aten._to_copy.default  # noqa: SLF001
MOST = 2**22  # elements of a tensor that keeps its data
SETTING = (bool, int, float, str, tuple, type(None))
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class Mixed(TorchDispatchMode):
    """Let tensors with and without data meet: the result has none.

    What is small and read (a prompt's mask, positions) keeps its data that way, so models whose
    forward asks for values run all the same.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        del types
        kwargs = {} if kwargs is None else kwargs
        if func is COPY and args[0].is_meta:
            kwargs = {**kwargs, "device": args[0].device}  # what has no data gets none elsewhere
        held = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if len({each.is_meta for each in held}) > 1:
            if func._schema.is_mutable and not args[0].is_meta:  # noqa: SLF001
                raise ValueError(f"{func} writes what has no data over what has")
            if func in INDEXED:
                args = (args[0], [i for each in args[1] for i in _indices(each)], *args[2:])
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        elif held and not held[0].is_meta and _is_large(func, args, kwargs):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _is_large(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a result is too large to be made: a mask of every token by every token, say."""
    try:
        made = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
    except (NotImplementedError, RuntimeError):
        return False  # its size is known from values only
    sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
    return max(sizes, default=0) > MOST


def _indices(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Turn a mask with data, whose length would be lost, into indices."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return (index,)
    return index.nonzero(as_tuple=True)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class Attended(TorchFunctionMode):
    """Note the sizes of every attention that is called within some modules.

    Args:
        modules: The main self-attention modules.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.modules = modules
        self.calls: list[tuple[int, int, int, int, int]] = []  # batch, heads, queries, keys, width
        self._inside = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass on, and look at attention."""
        del types
        kwargs = {} if kwargs is None else kwargs
        if self._inside and func is torch.nn.functional.scaled_dot_product_attention:
            query, key = (
                args[i] if len(args) > i else kwargs[name]
                for i, name in enumerate(("query", "key"))
            )
            batch, heads, queries, width = query.shape
            self.calls.append((batch, heads, queries, key.shape[2], width))
        return func(*args, **kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until left."""

        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(*_: Any) -> None:
            self._inside -= 1

        hooks = [
            hook
            for module in self.modules
            for hook in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            )
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


class Repeated:
    """Run one of several identical layers, and count its work for each of them.

    Two layers are identical if they print the same (class, submodules and their sizes), have the
    same settings, and are called with the same values and tensor shapes. Without data they do the
    same work and return tensors of the same shapes.

    Args:
        model: Its layers are those in module lists.
        counter: Counts the operations of the layers that run.
        attended: Notes their attention.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode, attended: Attended) -> None:
        self.counter, self.attended = counter, attended
        self.flops = 0  # of the layers that did not run
        self._seen: dict[Any, tuple[Any, int, list[tuple[int, int, int, int, int]]]] = {}
        self._held: list[Any] = []  # kept alive: an id is unique only while its object lives
        for layers in [each for each in model.modules() if isinstance(each, torch.nn.ModuleList)]:
            for layer in layers:
                layer.forward = functools.partial(
                    self._run, layer.forward, (repr(layer), _settings(layer))
                )

    def _run(self, forward: Callable[..., Any], layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        self._held.append(leaves)
        key = (layer, str(form), tuple(_signature(leaf) for leaf in leaves))
        if key not in self._seen:
            flops, calls = self.counter.get_total_flops() + self.flops, len(self.attended.calls)
            result = forward(*args, **kwargs)
            flops = self.counter.get_total_flops() + self.flops - flops
            self._seen[key] = result, flops, self.attended.calls[calls:]
            return result
        result, flops, found = self._seen[key]
        self.flops += flops
        self.attended.calls += found
        return result


def _settings(layer: nn.Module) -> str:
    """Describe all that modules hold but weights and submodules: values, classes of the rest."""
    return repr(
        [
            sorted((k, repr(v if isinstance(v, SETTING) else type(v))) for k, v in held.items())
            for held in map(vars, layer.modules())
        ]
    )


def _signature(leaf: Any) -> Any:
    """Give what a layer without data can see of an argument."""
    if isinstance(leaf, torch.Tensor) and leaf.is_meta:
        return leaf.shape, leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, SETTING) else id(leaf)
