# SPDX-License-Identifier: Apache-2.0
"""What is put on a transformer while sparse attention is attached; all of it comes off again.

Two places learn a pass's token grid. Run as it is, a pre-hook of ``torch.nn`` does: it sees the
whole inputs, whatever wraps ``forward`` (offloading, caches, context parallelism), and nobody
loses it. In a graph of the whole model, where such hooks may stand outside, a ``forward`` of ours
does. Neither goes through diffusers' ``HookRegistry``: taking an inner hook off there cuts the
outer one off (0.42.1, ``remove_hook``).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dit_sparse.errors import AttachError
from dit_sparse.pipelines.family import empty
from dit_sparse.pipelines.site import HERE, UNPLACED

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from dit_sparse.pipelines.family import Family, Shape

ROOT = "_dit_sparse_root"
REGISTRY = "_diffusers_hook"


class Listener(Protocol):
    """What the hooks report to; ``apply.py`` has the one implementation."""

    def begin_pass(self, timestep: Any) -> Any:
        """Find out whose pass begins and when; see ``run.Pass``."""

    def adopt(self) -> None:
        """Look whether somebody exchanged processors since the last pass."""

    def end_generation(self) -> None:
        """Free what belongs to the generation that just ended."""

    def remark_on_sharing(self) -> None:
        """Warn where the strategy does otherwise on several processes than on one."""


# The operator below can carry no Python object: this is how it finds its root. Weak, like _SITES.
_ROOTS: weakref.WeakValueDictionary[int, Root] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.library.custom_op("dit_sparse::place", mutates_args=())
def place_operator(values: list[torch.Tensor], text: int, root: int) -> torch.Tensor:
    """Read frames, height, width and text of a pass from values; zeros where they are no grid."""
    return torch.tensor(_ROOTS[root].place_values(values, text) or (0, 0, 0, 0))


@place_operator.register_fake
def _(values: list[torch.Tensor], text: int, root: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty(4, dtype=torch.int64, device="cpu")


class Forward:
    """Stands before a transformer's ``forward``, and notes the token grid within a graph."""

    def __init__(self, root: Root, module: nn.Module, inner: Any) -> None:
        """Look like ``inner``, which does the work."""
        functools.update_wrapper(self, inner)
        self.root, self.module, self.inner = root, module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pass; the grid is known until it ends."""
        root = self.root
        if torch.compiler.is_compiling():
            if root.live:
                HERE.shape = root.shape_in_graph(self.module, root.named(args, kwargs))
            output = self.inner(*args, **kwargs)
            HERE.shape = None
            return output
        if root.live and not HERE.noted:  # somebody called forward itself, past the pre-hook
            root.note(self.module, args, kwargs)
        HERE.noted = False
        try:
            return self.inner(*args, **kwargs)
        finally:
            HERE.shape = HERE.passing = None
            HERE.unplaced = UNPLACED

    def __get__(self, instance: Any, owner: Any = None) -> Self:
        """Bind like the bound method that it stands for: it is bound already (cache-dit)."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has the forward that it had without us."""
        return _same, (self.inner,)


class Before:
    """The pre-hook of ``torch.nn``."""

    def __init__(self, root: Root) -> None:
        """Report to ``root``."""
        self.root = root

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Note the pass that begins; a graph does so in ``Forward``.

        Without ``kwargs``: another thread has just taken the hook off.
        """
        if not torch.compiler.is_compiling() and kwargs is not None:
            if getattr(module, "_is_replica", False):
                raise AttachError(
                    f"{type(module).__name__}: DataParallel copied the model to several GPUs, "
                    "but sparse attention supports one copy per process; use DataParallel with "
                    "one GPU (device_ids=[0]), or start one process per GPU "
                    "(docs/several-gpus.md)"
                )
            self.root.settle(module)
            self.root.note(module, args, kwargs)
            HERE.noted = True

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copied or pickled model it does nothing."""
        return _nothing, ()


class Root:
    """What is known of one attached transformer as a whole."""

    def __init__(self, listener: Listener, family: Family, module: nn.Module) -> None:
        """Put both hooks on; hold the listener weakly: a model keeps no pipeline alive."""
        self._listener = weakref.ref(listener)
        self.family = family
        self.names = _argument_names(type(module))
        self.live = True
        self.forward: Forward
        self._outermost: Any = None
        self.number = next(_NUMBERS)
        _ROOTS[self.number] = self
        self._model = weakref.ref(module)
        self._seen: tuple[list[Any], int] = ([], -1)
        self._placed: tuple[Shape | None, str] = (None, UNPLACED)
        self._hook = module.register_forward_pre_hook(Before(self), with_kwargs=True)
        self.wrap(module)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model is a plain one."""
        return type(None), ()

    def wrap(self, module: Any) -> None:
        """Put ``Forward`` before whatever ``forward`` is now."""
        module.__dict__["forward"] = self.forward = Forward(self, module, module.forward)
        self._outermost = self.forward

    def unwrap(self, module: nn.Module) -> bool:
        """Take ``Forward`` off; False where something that we cannot look into holds it."""
        found = _replace(module, self.forward, self.forward.inner)
        stock = module.__dict__.get("forward")
        if getattr(stock, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]  # a bound method of the class itself: not an override
        return found

    def settle(self, module: nn.Module) -> None:
        """Come back where somebody put an older ``forward`` in place.

        accelerate does so when its own hook goes; ``enable_model_cpu_offload`` after every run.
        """
        if module.__dict__.get("forward") is not self._outermost:
            if not _replace(module, self.forward, self.forward):
                self.wrap(module)
            self._outermost = module.__dict__.get("forward")

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the arguments of ``forward`` by name."""
        # Cut to equal length: the compiler of torch 2.9 cannot trace an uneven zip.
        return {**dict(zip(self.names[: len(args)], args, strict=False)), **kwargs}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note grid and timestep of the pass that begins."""
        inputs = self.named(args, kwargs)
        HERE.shape, HERE.unplaced = self.place(module, inputs)
        listener = self._listener()
        if listener is not None:
            HERE.passing = listener.begin_pass(inputs.get(self.family.timestep))
            listener.adopt()

    def place(self, module: Any, inputs: dict[str, Any]) -> tuple[Shape | None, str]:
        """Read the grid; where it cannot be, say why."""
        values = [inputs.get(name) for name in self.family.shape_inputs]
        text = _text_length(inputs)
        known, known_text = self._seen
        if known and text == known_text and all(map(_is, known, values)):
            return self._placed
        source = self.family.grid_source
        try:
            shape = self.family.shape(module.config, inputs)
            reason = f"{UNPLACED}: no single grid in {source}"
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            shape, reason = None, f"{UNPLACED}: {source} cannot be read ({error!r})"
        self._placed = (shape, reason)
        if all(value is not None for value in values):
            self._seen = ([weakref.ref(value) for value in values], text)
        return self._placed

    def shape_in_graph(self, module: Any, inputs: dict[str, Any]) -> Shape | torch.Tensor | None:
        """Read the grid while a graph is made; from values, an operator reads it at run time."""
        values = [inputs.get(name) for name in self.family.shape_inputs]
        if not values:
            return self.family.shape(module.config, inputs)
        if any(value is None for value in values):
            return None
        placed: torch.Tensor = place_operator(values, _text_length(inputs), self.number)
        return placed

    def place_values(self, values: list[torch.Tensor], text: int) -> Shape | None:
        """Read the grid from within a graph, given what the graph was called with."""
        inputs: dict[str, Any] = dict(zip(self.family.shape_inputs, values, strict=True))
        if text >= 0:
            inputs["encoder_hidden_states"] = empty(1, text)
        shape, HERE.unplaced = self.place(self._model(), inputs)
        return shape

    def remove(self, module: nn.Module) -> None:
        """Take both hooks off."""
        self.live = False  # for a Forward that must stay where it is
        self._hook.remove()
        self.unwrap(module)


def _argument_names(cls: type) -> list[str]:
    """Name the arguments of ``forward``: a subclass's may only pass on what it is given."""
    parameters: list[inspect.Parameter] = []
    for each in cls.__mro__:
        if "forward" in vars(each):
            parameters = list(inspect.signature(vars(each)["forward"]).parameters.values())[1:]
            if all(one.kind is not inspect.Parameter.VAR_POSITIONAL for one in parameters):
                break
    return [one.name for one in parameters]


def _text_length(inputs: dict[str, Any]) -> int:
    """Count the prompt's tokens; -1 where there is no prompt."""
    text = inputs.get("encoder_hidden_states")
    return -1 if text is None else text.shape[1]


def _is(reference: Any, value: Any) -> bool:
    return reference() is value


def _same(inner: Any) -> Any:
    return inner


def _ignore(*_: Any) -> None:
    return None


def _nothing() -> Any:
    return _ignore


def _replace(module: nn.Module, ours: Forward, other: Any) -> bool:
    """Let whoever calls ``ours`` call ``other``: the module, accelerate, or a diffusers hook."""
    own = module.__dict__
    for name in ("forward", "_old_forward"):  # accelerate looks the second up at every call
        if own.get(name) is ours:
            own[name] = other
            return True
    for reference in getattr(own.get(REGISTRY), "_fn_refs", ()):
        for name in ("original_forward", "forward"):
            if getattr(reference, name) is ours:
                setattr(reference, name, other)
                return True
    return False
