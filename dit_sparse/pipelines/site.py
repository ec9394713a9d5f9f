# SPDX-License-Identifier: Apache-2.0
"""One attention module of one attached pipeline, and the way from a processor to its engine.

Which module is running is kept in a thread-local; shapes travel as arguments of one opaque
operator, so that a compiled graph stays one graph; layer, step and branch are looked up at run
time. The layer's id is a CPU tensor: a Python int would recompile for every layer.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from dit_sparse.core.machine import check_torch
from dit_sparse.errors import AttachError
from dit_sparse.pipelines import parallel

if TYPE_CHECKING:
    from torch import nn

    from dit_sparse.pipelines.family import Shape


class Engine(Protocol):
    """What computes attention for a site; ``apply.py`` has the one implementation."""

    def attention(
        self,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        shape: Shape | None,
        scale: float | None,
        dense: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Compute one call; every tensor and the result ``[batch, seq_len, heads, head_dim]``."""

    def begin_pass(self, timestep: Any) -> Any:
        """Find out whose pass it is and when; see ``run.Pass``."""


UNPLACED = "the token grid of this pass is unknown"


class _Here(threading.local):
    """What this thread is running now; a ContextVar's ``set`` would break fullgraph."""

    def __init__(self) -> None:
        self.site: Site | None = None
        self.shape: Shape | Tensor | None = None  # a tensor within a graph: see place_operator
        self.unplaced = UNPLACED  # why the shape is None
        self.share: parallel.Share | None = None  # the heads of this call, where it has not all
        self.declined: str | None = None  # why this call must stay the model's own
        self.passing: Any = None  # the transformer's pass: when, and whose run (``run.Pass``)
        self.noted = False  # a pre-hook saw this pass begin
        self.told: tuple[Any, dict[str, Any]] | None = None  # of ``cache_context``: to whom, what


HERE = _Here()
# The operator below can carry no Python object, only numbers: this is how it finds its site. The
# table holds weak references, so it neither keeps a pipeline alive nor needs clearing.
_SITES: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
_IDS = itertools.count()


class Site:
    """One main self-attention module while sparse attention is attached."""

    def __init__(
        self, engine: Engine, module: nn.Module, path: str, layer: int, stage: str
    ) -> None:
        """Remember the place; nothing is changed in ``module``."""
        self._engine = weakref.ref(engine)
        self.module: Any = weakref.proxy(module)
        self.path, self.layer, self.stage = path, layer, stage
        number = next(_IDS)
        self.id = torch.tensor(number)
        _SITES[number] = self

    @property
    def engine(self) -> Engine:
        """The engine that attached this site."""
        engine = self._engine()
        if engine is None:
            raise AttachError(
                f"{self.path}: the pipeline on which sparse attention was enabled no longer "
                "exists, but its transformer is still in use (from_pipe shares it); call "
                "dit_sparse.disable(transformer), then enable it on the new pipeline"
            )
        return engine

    @property
    def processor(self) -> Any:
        """The object whose code calls attention: the module's processor, or one it holds."""
        processor = self.module.processor
        if is_derived(processor):
            return processor
        return next((each for each in held(processor).values() if is_derived(each)), processor)

    @property
    def alive(self) -> bool:
        """Whether the pipeline that attached this site still exists."""
        return self._engine() is not None

    @property
    def dense_name(self) -> str:
        """Name what computes a call that stays dense: the model's own, and its backend if set."""
        processor = self.processor
        backend = getattr(processor, "_attention_backend", None)
        if backend is None and hasattr(processor, "_attention_backend"):  # it dispatches
            backend = attention_dispatch._AttentionBackendRegistry._active_backend  # noqa: SLF001
            backend = None if backend == attention_dispatch.DIFFUSERS_ATTN_BACKEND else backend
        return (
            "model's own"
            if backend is None
            else f"model's own ({getattr(backend, 'value', backend)})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is a plain one: its modules carry no site."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model is a plain one."""
        return type(None), ()


def held(processor: Any) -> dict[str, Any]:
    """Name the attributes of a processor object, submodules included."""
    own = getattr(processor, "__dict__", {})
    return {**own, **own.get("_modules", {})}


def is_derived(processor: Any) -> bool:
    """Tell whether an object has a class that ``processors.derive`` made."""
    return "stock" in vars(type(processor))


def compute(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shape: Shape | None,
    scale: float | None,
    seq_axis: int,
    dense: Callable[..., Tensor],
) -> Tensor:
    """Hand a call to the site's engine in one layout, and give the result back in the caller's.

    Args:
        site: Where we are.
        query: ``[batch, seq_len, heads, head_dim]`` (``seq_axis`` 1) or heads first (2).
        key: Like ``query``.
        value: Like ``query``.
        mask: What the model passed, if anything.
        shape: (frames, height, width, text) of this pass.
        scale: What the model passed, if anything.
        seq_axis: 1 or 2.
        dense: The model's own attention call, taking and giving its own layout; keywords change
            what it passes on.
    """
    config = getattr(site.processor, "_parallel_config", None)
    if config is not None and seq_axis == 1:
        return _compute_share(site, query, key, value, mask, shape, scale, dense, config)

    if seq_axis == 1:
        return site.engine.attention(site, query, key, value, mask, shape, scale, dense)

    def dense_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return site.engine.attention(site, q, k, v, mask, shape, scale, dense_here).transpose(1, 2)


def _compute_share(
    site: Site,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shape: Shape | None,
    scale: float | None,
    dense: Callable[..., Tensor],
    config: Any,
) -> Tensor:
    """Compute a call whose tokens stand on several processes; see ``parallel.exchange``."""
    run = site.engine.attention
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        HERE.declined = "gradients are required under context parallelism; use torch.no_grad()"
        try:
            return run(site, query, key, value, mask, shape, scale, dense)
        finally:
            HERE.declined = None

    def alone(q: Tensor, k: Tensor, v: Tensor, given: Tensor | None) -> Tensor:
        return dense(q, k, v, attn_mask=given, parallel_config=None)

    def core(
        q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, plain: parallel.Plain
    ) -> Tensor:
        HERE.share = parallel.share_of(config, query.shape[2])
        try:
            return run(site, q, k, v, given, shape, scale, plain)
        finally:
            HERE.share = None

    return parallel.exchange(core, alone, query, key, value, mask, scale, config, shape)


def _stock_attention(seq_axis: int) -> Callable[..., Tensor]:
    """Look up what processors call; a user may have exchanged it."""
    if seq_axis == 1:
        return attention_dispatch.dispatch_attention_fn  # type: ignore[no-any-return]
    return torch.nn.functional.scaled_dot_product_attention


def _stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    seq_axis: int,
) -> Tensor:
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    result: Tensor = _stock_attention(seq_axis)(query, key, value, attn_mask=mask, **options)
    return result.contiguous()


check_torch()  # an older one fails in the next line, and does not say what to do


@torch.library.custom_op("dit_sparse::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    site: Tensor,
    shape: list[int],
    scale: float | None,
    seq_axis: int,
    placed: Tensor | None = None,
) -> Tensor:
    """Compute one call from within a compiled graph; opaque to the compiler.

    ``placed`` holds the shape where it was read from values, on the CPU.
    """
    here = _SITES.get(int(site))
    if here is None:  # another thread took sparse attention off in the middle of this pass
        return _stock(query, key, value, mask, scale, seq_axis)
    processor = here.processor

    def dense(q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Tensor:
        options: dict[str, Any] = {"attn_mask": mask}
        if scale is not None:
            options["scale"] = scale
        if seq_axis == 1:
            options["backend"] = getattr(processor, "_attention_backend", None)
            options["parallel_config"] = getattr(processor, "_parallel_config", None)
        # Another thread may have taken it off likewise.
        stock = processor.attention() if is_derived(processor) else _stock_attention(seq_axis)
        result: Tensor = stock(q, k, v, **options | changed)
        return result

    frames, height, width, text = shape if placed is None else placed.tolist()
    known = None if frames == 0 else (frames, height, width, text)
    engine, before = here.engine, HERE.passing
    if before is None or before.engine is not engine:  # the whole model is a graph
        HERE.passing = engine.begin_pass(None)
    try:
        result = compute(here, query, key, value, mask, known, scale, seq_axis, dense)
    finally:
        HERE.passing = before
    # An operator's result may not share memory with its arguments, and must be contiguous like
    # the fake one.
    return result.clone() if result.data_ptr() == query.data_ptr() else result.contiguous()


@attend_operator.register_fake
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,
    mask: Tensor | None,  # noqa: ARG001
    site: Tensor,  # noqa: ARG001
    shape: list[int],  # noqa: ARG001
    scale: float | None,  # noqa: ARG001
    seq_axis: int,  # noqa: ARG001
    placed: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
