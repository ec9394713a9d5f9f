# SPDX-License-Identifier: Apache-2.0
"""Attach sparse attention to a pipeline or a bare transformer, and take it off again.

Attaching is all or nothing; detaching leaves the model bit-identical, also after an exception in
the middle of a generation. Enabling or disabling from a step callback is allowed: it takes effect
at the next transformer pass, and the report says from which step on.

Past 300 lines, as it is the one place that knows pipeline, engine and hooks at once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_sparse.attach.describe import Stage
from dit_sparse.attach.engine import SparseEngine
from dit_sparse.attach.guarantee import Guarantee
from dit_sparse.attach.report import Report
from dit_sparse.errors import AttachError, StrategyError, UnsupportedError
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.pipelines import ALL, family_of, known_class, parallel, taps, unwrap
from dit_sparse.pipelines.attached import clear, sites_of
from dit_sparse.pipelines.clock import Clock
from dit_sparse.pipelines.family import Family, head_dim_of, heads_of
from dit_sparse.pipelines.processors import SITE, adopt, bearer, release
from dit_sparse.pipelines.shared_report import merged
from dit_sparse.pipelines.site import Site
from dit_sparse.pipelines.trained import trained_sparse
from dit_sparse.strategy import Strategy, config_hash

if TYPE_CHECKING:
    from typing_extensions import Self

Profile = Strategy | str | PathLike[str] | dict[str, Any]

HANDLE = "_dit_sparse_handle"
STAGES = ("transformer", "transformer_2")
# Weights of other dtypes are quantised, or stored narrower than they are computed with.
COMPUTED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class SparseAttention(SparseEngine):
    """The handle of one attachment: what ``pipe.sparse_attention`` gives.

    Also a context manager: leaving it detaches.
    """

    def __init__(
        self,
        target: Any,
        strategy: Strategy,
        *,
        scheduler: Any = None,
        kernel: str | None = None,
        strict: bool = False,
        probe: int = 0,
        guarantee: Guarantee | None = None,
    ) -> None:
        """Attach; see ``enable``."""
        bare = isinstance(target, nn.Module)
        models = transformers_of(target)
        # Weakly, like the sites: pipe.transformer = None frees the model.
        self._models = weakref.WeakValueDictionary(models)
        stages, places, heads = {}, [], {}
        for name, model in models.items():
            if attached := [p for p, site in sites_of(model) if site.alive]:
                raise AttachError(
                    f"{name}.{attached[0]} already has sparse attention, enabled through another "
                    "pipeline that shares this transformer; disable it on that pipeline first"
                )
            clear(model)  # what a pipeline that is gone left behind
            family = family_of(model)
            modules = family.attention_modules(model)
            stages[name] = Stage(name, family, len(modules))
            heads[name] = heads_of(modules[0][1])
            if (known := trained_sparse(model)) is not None:
                warnings.warn(known, stacklevel=4)
            parallel.check(model, heads[name], getattr(model, "_parallel_config", None))
            for layer, (path, module) in enumerate(modules):
                bearer(module)  # raises before anything is changed
                places.append((module, f"{name}.{path}", layer, name))
            for remark in strategy.validate_for(
                known_class(model),
                num_layers=len(modules),
                num_heads=heads[name],
                stages=tuple(self._models),
                config_hash=config_hash(model.config),
            ):
                warnings.warn(remark, stacklevel=4)
        clock = Clock(None if bare else target, scheduler)
        backends = Backends(kernel)
        for name, model in models.items():
            _settle(backends, target, model, stages[name].family)
        super().__init__(
            strategy, backends, clock, stages, strict=strict, probe=probe, guarantee=guarantee
        )
        self.target_name = type(unwrap(target) if bare else target).__name__
        self.removed = False
        self._schedule = getattr(clock.scheduler, "timesteps", None)
        self._sites: list[Site] = []
        self._derived: weakref.WeakSet[Any] = weakref.WeakSet()
        try:
            for module, path, layer, name in places:
                site = Site(self, module, path, layer, name)
                setattr(module, SITE, site)
                self._sites.append(site)
            self.adopt()
            for name, model in models.items():
                taps.attach(model, self, stages[name].family, heads[name])
            setattr(target, HANDLE, self)
        except BaseException:
            self.remove()
            raise
        self.remark_on_sharing()

    def adopt(self) -> None:
        """Give newly set processors their derived class (fused QKV, adapters set since)."""
        for site in self._sites:
            try:
                processor = adopt(site.module)
            except ReferenceError:  # one of two transformers may have been freed
                continue
            if processor is not None:
                self._derived.add(processor)

    def at(self, step: int, num_steps: int, branch: str = "cond") -> None:
        """Set the current step by hand, for a loop around a bare transformer in this thread.

        Args:
            step: 0-based step of the passes that follow; a smaller one than before starts a new
                generation.
            num_steps: Steps of the generation.
            branch: "cond", "uncond", or "both" where one batch holds both.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must lie in [0, num_steps = {num_steps}), got {step}")
        self.set_step(step, num_steps, branch)

    def remark_on_sharing(self) -> None:
        """Warn where the strategy does otherwise on several processes than on one."""
        shared = [getattr(m, "_parallel_config", None) for m in self._models.values()]
        if any(each is not None for each in shared):
            for remark in parallel.remarks(self.strategy):
                warnings.warn(remark, stacklevel=4)

    def merged_report(self) -> Report:
        """Report on all heads where several processes share them; all must call it together.

        In a generation's report each process tells of its own heads.
        """
        shared = [getattr(m, "_parallel_config", None) for m in self._models.values()]
        config = next((each for each in shared if each is not None), None)
        report: Report = self.report()
        return report if config is None else merged(report, config)

    def model(self, name: str) -> Any:
        """Give the attached transformer of that name, or None where there is none."""
        return self._models.get(name)

    def summary(self) -> str:
        """Say in a few lines what the newest generation did."""
        return self.report().summary()

    def remove(self) -> None:
        """Detach: the model is as it was before. Does nothing the second time."""
        if self.removed:
            return
        self.removed = True
        for model in self._models.values():
            taps.detach(model)
        for site in self._sites:
            with suppress(ReferenceError):
                release(site.module.processor)
                site.module.__dict__.pop(SITE, None)
        for processor in self._derived:  # those that fused QKV put aside, too
            release(processor)
        self.run.end()
        self._shared = {}

    def __enter__(self) -> Self:
        """Already attached."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach, also after an exception."""
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied pipeline is a plain one."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled pipeline is a plain one."""
        return type(None), ()

    def __repr__(self) -> str:
        """Name the strategy and the model."""
        state = "removed" if self.removed else "attached"
        return f"<SparseAttention {self.strategy.name!r} on {self.target_name}, {state}>"


def transformers_of(target: Any) -> dict[str, Any]:
    """Find the transformers of a pipeline, or take a bare one; unwrapped from torch.compile.

    Raises:
        UnsupportedError: None of a known family; says which there are.
    """
    if isinstance(target, nn.Module):
        return {"transformer": unwrap(target)}
    found = {name: getattr(target, name, None) for name in STAGES}
    models = {name: unwrap(m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not models:
        raise UnsupportedError(
            f"{type(target).__name__} has no supported transformer; supported: {ALL}"
        )
    return models


def _settle(backends: Backends, target: Any, model: Any, family: Family) -> None:
    """Raise where no kernel can run a transformer's attention; see ``Backends.settle``."""
    width = head_dim_of(family.attention_modules(model)[0][1], model.config)
    # A pipeline that offloads runs on another device than its weights lie on.
    device = getattr(target, "_execution_device", None) or model.device
    if width is not None and device.type != "meta" and model.dtype in COMPUTED:
        backends.settle(device, model.dtype, width)


def own_strategy(target: Any) -> Strategy:
    """Read the strategy in the folder or repository that a pipeline or model was loaded from."""
    name = dict(getattr(target, "config", None) or {}).get("_name_or_path")
    hint = "; pass one, e.g. enable_sparse_attention(\"radial\"): 'dit-sparse methods' lists them"
    if not name:
        raise StrategyError(
            f"no strategy given, and this {type(target).__name__} was not loaded from a folder "
            f"or repository that could contain one{hint}"
        )
    try:
        return Strategy.from_pretrained(name)
    except StrategyError as error:
        raise StrategyError(
            f"no strategy given, and none found with the model: {error}{hint}"
        ) from error


def current(target: Any) -> SparseAttention | None:
    """Return the handle of what is attached to ``target``, or None."""
    handle: SparseAttention | None = getattr(target, HANDLE, None)
    return None if handle is None or handle.removed else handle


def refuse_exchange(target: Any, name: str, value: Any) -> None:
    """Raise where another transformer is put into a pipeline while sparse attention is enabled.

    It would run dense, and nobody would know. None, and wrappers of the attached one, may come.
    """
    handle = current(target) if name in STAGES and value is not None else None
    if handle is None:
        return
    attached = handle.model(name)
    parts = value.modules() if isinstance(value, nn.Module) else ()
    if attached is None or not any(part is attached for part in parts):
        raise AttachError(
            f"{type(target).__name__}.{name} cannot be replaced while sparse attention is "
            "enabled on it; call disable_sparse_attention() first, then enable it again"
        )


def enable(
    target: Any,
    profile: Profile | None = None,
    *,
    scheduler: Any = None,
    kernel: str | None = None,
    strict: bool = False,
    probe: int = 0,
    guarantee: Guarantee | float | str | None = None,
    **options: Any,
) -> SparseAttention:
    """Let ``target`` compute only part of its self-attention.

    Args:
        target: A Diffusers pipeline, or a bare transformer of a known family.
        profile: A shipped name, a path, a Hub repository (``owner/name``,
            ``owner/name@revision:place``), a method's name, or a ``Strategy``. None: the
            ``sparse_strategy.json`` beside the model, in the folder or repository that the target
            was loaded from.
        scheduler: For a bare transformer: where its step is read. Without one, call
            ``handle.at(step, num_steps)`` before each pass.
        kernel: Name of the kernel to use; None: the best that can run here. A kernel that cannot
            run raises, it is never replaced.
        strict: Raise where a call would stay dense because its geometry or mask is not
            understood; by default it stays dense and the report says why.
        probe: Query rows per call on which recall is measured, >= 0 (0: not measured).
        guarantee: Largest relative error of a head's output, in (0, 1]: heads are probed during
            the generation, and one that is farther off goes back to dense for the rest of it.
            "receipt": three times the error that the strategy's receipt has measured. A
            ``guarantee.Guarantee`` says more, such as rows of a probe and how often. None: no
            probing.
        **options: Override the strategy's schedule, or its method's parameters where it has one.

    Returns:
        The handle; ``handle.remove()``, or leaving it as a context manager, detaches.

    Raises:
        AttachError: Something is attached already.
        UnsupportedError: Not a pipeline or model that dit_sparse knows.
        KernelError: No kernel can run this model's head_dim and dtype on its device, or the one
            asked for cannot; gives the reasons.
        StrategyError: The profile cannot be found, read, or does not fit this model; or the
            guarantee is none, or asks for a figure that the receipt has not.
    """
    if (active := current(target)) is not None:
        raise AttachError(
            f"sparse attention {active.strategy.name!r} is already enabled on "
            f"{active.target_name}; call disable_sparse_attention() first"
        )
    if probe < 0:
        raise ValueError(f"probe must be a number of rows >= 0, got {probe}")
    promised = None if guarantee is None else Guarantee.coerce(guarantee)
    wanted = own_strategy(target) if profile is None else profile
    strategy = Strategy.coerce(wanted, **options)
    return SparseAttention(
        target,
        strategy,
        scheduler=scheduler,
        kernel=kernel,
        strict=strict,
        probe=probe,
        guarantee=promised,
    )


def disable(target: Any) -> None:
    """Detach from ``target``; warns where nothing is attached."""
    handle = current(target)
    if handle is None:
        here = [target] if isinstance(target, nn.Module) else [vars(target).get(x) for x in STAGES]
        for model in (unwrap(each) for each in here if isinstance(each, nn.Module)):
            if left := [path for path, site in sites_of(model) if site.alive]:
                raise AttachError(
                    f"{left[0]} has sparse attention, enabled through another pipeline that "
                    "shares this transformer; disable it on that pipeline"
                )
            if clear(model):
                return
        warnings.warn(
            f"sparse attention is not enabled on {type(target).__name__}, so it cannot be "
            "disabled",
            stacklevel=2,
        )
        return
    handle.remove()
    if hasattr(target, HANDLE):
        delattr(target, HANDLE)


@contextmanager
def sparse_attention(
    target: Any,
    profile: Profile | None = None,
    **options: Any,
) -> Iterator[SparseAttention]:
    """Enable for the length of a ``with`` block; takes what ``enable`` takes."""
    handle = enable(target, profile, **options)
    try:
        yield handle
    finally:
        if not handle.removed:
            disable(target)


def report(target: Any) -> Report:
    """Report on what is attached to ``target``; ``AttachError`` where nothing is."""
    handle = current(target)
    if handle is None:
        raise AttachError(f"sparse attention is not enabled on {type(target).__name__}")
    return handle.report()
