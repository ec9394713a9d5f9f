# SPDX-License-Identifier: Apache-2.0
"""Derived processors: a model's own attention processor with its attention call exchanged.

The derived class runs the very code of the stock class; only the attention call in it comes to us
(``calls.py``). Projections, norms, RoPE, LoRA, fused QKV, IP-adapters and quantised weights stay
the model's own. Swapping an object's ``__class__`` keeps its weights and is undone exactly.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from diffusers.hooks import _helpers

from dit_sparse.errors import UnsupportedError
from dit_sparse.pipelines.calls import DIRECT, DISPATCH, called, mentions, rerouted
from dit_sparse.pipelines.site import HERE, held, is_derived

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SITE = "_dit_sparse_site"
FUSED = (
    "use diffusers.models.attention_processor.AttnProcessor2_0 instead, which calls torch's "
    "fused attention: transformer.set_attn_processor(AttnProcessor2_0())"
)
# What to do about the processors of diffusers that compute attention in another way.
ADVICE = {
    "slice_size": "it computes attention in slices; call pipe.disable_attention_slicing()",
    "get_attention_scores": f"it computes the full score matrix; {FUSED}",
    "xformers": f"it calls xFormers; {FUSED}",
}


def derive(cls: Any) -> Any:
    """Make the derived class of a stock processor class, or find it.

    Raises:
        UnsupportedError: The processor makes no attention call that can be rerouted.
    """
    derived = _derive(cls, _calls(cls))
    if derived is None:
        raise UnsupportedError(_refusal(cls))
    return derived


def _calls(cls: Any) -> tuple[Any, ...]:
    """Give what ``cls.__call__`` may come from: another object where somebody patched it."""
    return tuple([vars(each).get("__call__") for each in cls.__mro__])


@functools.cache  # classes are made once per stock class; the cache is not state of any pipeline
def _derive(cls: Any, calls: tuple[Any, ...]) -> Any:
    above, own = _above(cls), called(cls.__call__)
    if above is None and own is None:
        return None

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:  # noqa: ARG001
        return cls.__new__, (cls,), self.__dict__  # pickles as the stock class

    body = {
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "stock": cls,
        "calls": calls,
    }
    if own is not None:
        name, find = own
        body["__call__"] = _call(cls.__call__, name)
        body["attention"] = staticmethod(find)
    # Where the class passes the call on, super() meets the derived class before the stock one.
    derived = type(cls.__name__, (cls,) if above is None else (cls, derive(above)), body)
    _make_known(cls, derived)
    return derived


def _call(source: Any, name: str) -> Callable[..., Any]:
    function = rerouted(source, name)

    @functools.wraps(source)  # Attention.forward filters its arguments by this signature
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = HERE.site
        HERE.site = getattr(attn, SITE, None)
        try:
            return function(self, attn, *args, **kwargs)
        finally:
            HERE.site = before

    return call


def _above(cls: Any) -> Any:
    """Find the class to whose ``__call__`` this one's passes the call on, or None."""
    owners = [each for each in cls.__mro__ if "__call__" in vars(each)]
    passes_on = mentions(cls.__call__, "super", "__call__")
    return owners[1] if passes_on and len(owners) > 1 else None


def _refusal(cls: Any) -> str:
    """Say why a processor class cannot be derived, and what to do."""
    advice = next((ADVICE[name] for name in ADVICE if mentions(cls.__call__, name)), None)
    return f"attention processor {cls.__name__} is not supported: " + (
        advice
        or f"its __call__ calls neither {DISPATCH} nor F.{DIRECT}, and passes the call on to no "
        "class or object that does: call one of them there, or super().__call__(...), or a "
        "processor that is an attribute of it"
    )


def _make_known(cls: Any, derived: Any) -> None:
    """Let diffusers skip the derived class's layers like the stock one's (guiders)."""
    registry = getattr(_helpers, "AttentionProcessorRegistry", None)
    with suppress(ValueError):  # it cannot skip these
        if registry is not None:
            registry.register(derived, registry.get(cls))


def _stock(cls: Any) -> Any:
    return vars(cls).get("stock", cls)


def bearer(module: Any) -> Any:
    """Find the object in whose code attention is called: a module's processor, or one it holds.

    Raises:
        UnsupportedError: There is none whose call can be rerouted.
    """
    processor = module.processor
    cls, refusal = _stock(type(processor)), None
    try:
        derive(cls)
    except UnsupportedError as error:
        refusal = error
    if refusal is None:
        return processor
    for name, inner in held(processor).items():
        if callable(inner) and mentions(cls.__call__, name):
            with suppress(UnsupportedError):
                derive(_stock(type(inner)))
                return inner
    raise refusal


def adopt(module: Any) -> Any:
    """Give ``module``'s processor its derived class; return the object, or None where it has it.

    A shared processor object (fused QKV) serves several modules: it is derived once, and finds
    its site through the module it is called with.
    """
    now = type(module.processor)
    if "calls" in now.__dict__ and now.calls == _calls(now.stock):
        return None
    processor = bearer(module)
    derived = derive(_stock(type(processor)))
    if type(processor) is derived:
        return None
    processor.__class__ = derived
    return processor


def release(processor: Any) -> None:
    """Put the stock class of a processor, and of one that it holds, back."""
    for each in (processor, *held(processor).values()):
        if is_derived(each):
            each.__class__ = _stock(type(each))
