# SPDX-License-Identifier: Apache-2.0
"""Copy a function with its attention call exchanged for ours.

Only the name by which the code calls attention changes. The copy stays in the function's own
module: every other name, and the attention function that runs where a call stays dense, is looked
up when it is called, so that patches of them apply, and end, as in the function itself.
"""

from __future__ import annotations

import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.pipelines.site import HERE, attend_operator, compute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Attention = Callable[..., Tensor]
    Find = Callable[[], Attention]

DISPATCH, DIRECT = "dispatch_attention_fn", "scaled_dot_product_attention"
# The name that stands in a copy's code for each of the two.
OURS = {name: f"_dit_sparse_{name}" for name in (DISPATCH, DIRECT)}
HOMES = {DISPATCH: attention_dispatch, DIRECT: functional}
# Under which global names a function reaches an attribute of each home.
ROOTS = {DISPATCH: (attention_dispatch,), DIRECT: (functional, torch.nn, torch)}
SEQ_AXIS = {DISPATCH: 1, DIRECT: 2}

# What finds the attention function: as an attribute of its home, and as a global name. Each is
# one line of plain Python, as Dynamo reads it.
FIND_AT_HOME: dict[str, Find] = {
    DISPATCH: lambda: attention_dispatch.dispatch_attention_fn,
    DIRECT: lambda: functional.scaled_dot_product_attention,
}
FIND_GLOBAL: dict[str, Any] = {
    DISPATCH: lambda: dispatch_attention_fn,
    DIRECT: lambda: scaled_dot_product_attention,
}


def _reroute(find: Find, seq_axis: int) -> Attention:
    """Wrap the model's attention call: ours where a site is set, the original everywhere else."""

    def call(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        original = find()
        site = HERE.site
        mask = args[0] if args else kwargs.get("attn_mask")
        # Calls that are not one plain self-attention: IP-adapter and cross keys, KV caches,
        # FlexAttention's BlockMask, causal or grouped heads.
        other = (
            len(args) > 1
            or kwargs.get("is_causal")
            or kwargs.get("enable_gqa")
            or not (mask is None or isinstance(mask, Tensor))
            or query.shape != key.shape
        )
        if site is None or other:
            return original(query, key, value, *args, **kwargs)
        scale, shape = kwargs.get("scale"), HERE.shape
        placed, known = (shape, None) if isinstance(shape, Tensor) else (None, shape)
        if torch.compiler.is_compiling():
            compiled: Tensor = attend_operator(
                query, key, value, mask, site.id, known or [0] * 4, scale, seq_axis, placed
            )
            return compiled

        def dense(q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Tensor:
            positional = () if "attn_mask" in changed else args
            return original(q, k, v, *positional, **{**kwargs, **changed})

        HERE.declined = _watched()
        try:
            return compute(site, query, key, value, mask, known, scale, seq_axis, dense)
        finally:
            HERE.declined = None

    return call


def _watched() -> str | None:
    """Say who waits for torch's own attention call, if anybody does.

    Perturbed-attention guidance puts a function mode over it and answers it otherwise.
    """
    if not torch._C._len_torch_function_stack():  # noqa: SLF001
        return None
    for mode in torch.overrides._get_current_function_mode_stack():  # noqa: SLF001
        name = type(mode).__name__
        if name != "DeviceContext":  # torch.set_default_device, with torch.device(...)
            return f"{name} replaces the result of this attention call (guidance)"
    return None


for _name, _home in HOMES.items():
    setattr(_home, OURS[_name], _reroute(FIND_AT_HOME[_name], SEQ_AXIS[_name]))


def functions(function: Any) -> Iterator[types.FunctionType]:
    """Give a function, and those that it closes over: what a decorator wraps."""
    if isinstance(function, types.FunctionType):
        yield function
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # empty
                yield from functions(cell.cell_contents)


def mentions(function: Any, *names: str) -> bool:
    """Tell whether a function, or one that it closes over, uses all these names."""
    return any(_uses(each.__code__, names) for each in functions(function))


def _uses(code: types.CodeType, names: tuple[str, ...]) -> bool:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(names) <= set(code.co_names) or any(_uses(each, names) for each in inner)


def called(function: Any) -> tuple[str, Find] | None:
    """Tell by which name a function calls attention, and what finds that attention function."""
    for name, roots in ROOTS.items():
        for each in functions(function):
            if not _uses(each.__code__, (name,)):
                continue
            if name in each.__globals__:
                return name, _moved(FIND_GLOBAL[name], each.__globals__)
            known = [each.__globals__.get(root) for root in each.__code__.co_names]
            if any(root is module for root in known for module in roots):
                return name, FIND_AT_HOME[name]
    return None


def rerouted(function: types.FunctionType, name: str) -> types.FunctionType:
    """Copy a function, and those that it closes over: calls of ``name`` come to us."""
    namespace, cells = function.__globals__, []
    if name in namespace:
        find = _moved(FIND_GLOBAL[name], namespace)
        namespace[OURS[name]] = _reroute(find, SEQ_AXIS[name])
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            if mentions(cell.cell_contents, name):
                cell = types.CellType(rerouted(cell.cell_contents, name))  # noqa: PLW2901
        cells.append(cell)
    copied = types.FunctionType(
        _own_code(function.__code__, name),
        namespace,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _moved(find: Any, namespace: dict[str, Any]) -> Find:
    """Let ``find`` look its name up in another module."""
    return types.FunctionType(find.__code__.replace(), namespace)


def _own_code(code: types.CodeType, name: str) -> types.CodeType:
    """Copy a code object and those within it, with our name in the place of ``name``.

    A copy also where nothing changes: Dynamo files what it compiled under the code object.
    """
    inner = (_own_code(x, name) if isinstance(x, types.CodeType) else x for x in code.co_consts)
    names = tuple(OURS[x] if x == name else x for x in code.co_names)
    return code.replace(co_consts=tuple(inner), co_names=names)
