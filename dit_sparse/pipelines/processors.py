# SPDX-License-Identifier: Apache-2.0
"""Derived processors: a model's own attention processor with one global name exchanged.

The derived class runs the very code of the stock class; only the name by which that code calls
attention (``dispatch_attention_fn`` or ``F``) means ours. Projections, norms, RoPE, LoRA, fused
QKV, IP-adapters and quantised weights stay the model's own. Swapping an object's ``__class__``
keeps its weights and puts it back exactly.
"""

from __future__ import annotations

import functools
import sys
import types
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import _helpers
from torch import Tensor

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines.site import HERE, attend_operator, compute

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SITE = "_dit_sparse_site"
DISPATCH, DIRECT = "dispatch_attention_fn", "scaled_dot_product_attention"


def _reroute(original: Callable[..., Tensor], seq_axis: int) -> Callable[..., Tensor]:
    """Wrap the model's attention call: ours where a site is set, the original everywhere else."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        site = HERE.site
        # Calls that are not one plain self-attention: IP-adapter and cross keys, KV caches,
        # FlexAttention's BlockMask, causal or grouped heads.
        other = (
            bool(args)
            or kwargs.get("is_causal")
            or kwargs.get("enable_gqa")
            or not (attn_mask is None or isinstance(attn_mask, Tensor))
            or query.shape != key.shape
        )
        if site is None or other:
            stock: Tensor = original(query, key, value, attn_mask, *args, **kwargs)
            return stock
        scale = kwargs.get("scale")
        if torch.compiler.is_compiling():
            shape = list(HERE.shape or (0, 0, 0, 0))
            compiled: Tensor = attend_operator(
                query, key, value, attn_mask, site.id, shape, scale, seq_axis
            )
            return compiled

        def dense(q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Tensor:
            return original(q, k, v, **{"attn_mask": attn_mask, **kwargs, **changed})

        HERE.declined = _watched()
        try:
            return compute(site, query, key, value, attn_mask, HERE.shape, scale, seq_axis, dense)
        finally:
            HERE.declined = None

    return call


def _watched() -> str | None:
    """Say who waits for torch's own attention call, if anybody does.

    Perturbed-attention guidance puts a function mode over it and answers it otherwise.
    """
    for mode in torch.overrides._get_current_function_mode_stack():  # noqa: SLF001
        name = type(mode).__name__
        if name != "DeviceContext":  # torch.set_default_device, with torch.device(...)
            return f"{name} stands over attention and answers the model's own call (guidance)"
    return None


@functools.cache  # classes are made once per stock class; the cache is not state of any pipeline
def derive(cls: Any) -> Any:
    """Make the derived class of a stock processor class.

    Raises:
        UnsupportedError: The processor makes no attention call that can be rerouted.
    """
    source = cls.__call__
    code = getattr(source, "__code__", None)
    names = code.co_names if code is not None else ()
    # The copy needs a name of its own: Dynamo resolves a function's globals through
    # sys.modules[__name__], and under the stock name it would find the stock globals.
    name = f"dit_sparse_{cls.__module__.replace('.', '_')}_{cls.__name__}"
    module = types.ModuleType(name)
    module.__dict__.update(getattr(source, "__globals__", {}))
    module.__dict__.update(__name__=name, __spec__=None)
    if DISPATCH in names:
        dense = module.__dict__[DISPATCH]
        module.__dict__[DISPATCH] = _reroute(dense, seq_axis=1)
    elif DIRECT in names:
        functional = module.__dict__["F"]
        dense = functional.scaled_dot_product_attention
        replaced = {**vars(functional), DIRECT: _reroute(dense, seq_axis=2)}
        module.__dict__["F"] = types.SimpleNamespace(**replaced)
    else:
        raise UnsupportedError(
            f"attention processor {cls.__name__} makes no call that dit_sparse can take over; "
            "it is an old or sliced kind: put the model's default back first "
            "(pipe.disable_attention_slicing(), or set_attn_processor with the stock class)"
        )
    sys.modules[name] = module
    function = types.FunctionType(
        _own_code(source.__code__),
        module.__dict__,
        source.__name__,
        source.__defaults__,
        source.__closure__,
    )
    function.__kwdefaults__ = source.__kwdefaults__

    @functools.wraps(source)  # Attention.forward filters its arguments by this signature
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        HERE.site = getattr(attn, SITE, None)
        try:
            return function(self, attn, *args, **kwargs)
        finally:
            HERE.site = None

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:  # noqa: ARG001
        return cls.__new__, (cls,), self.__dict__  # pickles as the stock class

    body = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "stock": cls,
        "dense": staticmethod(dense),
    }
    derived = type(cls.__name__, (cls,), body)
    _make_known(cls, derived)
    return derived


def _own_code(code: types.CodeType) -> types.CodeType:
    """Copy a code object and those within it.

    Dynamo files what it compiled under the code object, and leaves it in that function's globals:
    of two functions with one code object, one would look for it in the wrong globals.
    """
    inner = (_own_code(x) if isinstance(x, types.CodeType) else x for x in code.co_consts)
    return code.replace(co_consts=tuple(inner))


def _make_known(cls: Any, derived: Any) -> None:
    """Let diffusers skip the derived class's layers like the stock one's (guiders)."""
    registry = getattr(_helpers, "AttentionProcessorRegistry", None)
    with suppress(ValueError):  # it cannot skip these
        if registry is not None:
            registry.register(derived, registry.get(cls))


def stock_class(module: Any) -> Any:
    """Name the class of a module's processor, whether derived or not."""
    cls = type(module.processor)
    return cls.__dict__.get("stock", cls)


def adopt(module: Any) -> bool:
    """Give ``module``'s processor its derived class; False where it has it already.

    A shared processor object (fused QKV) serves several modules: it is derived once, and finds
    its site through the module it is called with.
    """
    stock = stock_class(module)
    if "stock" in vars(type(module.processor)):
        return False
    module.processor.__class__ = derive(stock)
    return True


def release(processor: Any) -> None:
    """Put the stock class of a processor back; does nothing where it has it."""
    processor.__class__ = vars(type(processor)).get("stock", type(processor))
