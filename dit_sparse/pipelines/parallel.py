# SPDX-License-Identifier: Apache-2.0
"""One video on several processes: Diffusers' own context parallelism with sparse attention in it.

Ulysses (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509) splits the tokens among the
processes, and exchanges them for heads around attention: there a process has all tokens of its
heads. The splitting and both exchanges stay Diffusers'; only what is computed between the
exchanges is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from diffusers.models import attention_dispatch

from dit_sparse.errors import AttachError
from dit_sparse.pipelines import known_class

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dit_sparse.pipelines.family import Shape

    Plain = Callable[[Tensor, Tensor, Tensor], Tensor]
    Masked = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, Plain], Tensor]

# What a class's plan must split for its tokens to stand in the order that ``interleaved`` knows:
# video tokens alone, one stretch a process; or text and picture, a stretch of each.
_JOINT = frozenset({"hidden_states", "encoder_hidden_states"})
_VIDEO = frozenset({"hidden_states"})
SPLIT: dict[str, tuple[str, frozenset[str]]] = {
    "ChronoEditTransformer3DModel": ("blocks.0", _VIDEO),
    "Flux2Transformer2DModel": ("", _JOINT),
    "FluxTransformer2DModel": ("", _JOINT),
    "QwenImageTransformer2DModel": ("transformer_blocks.0", _JOINT),
    "WanTransformer3DModel": ("blocks.0", _VIDEO),
}
_EXCHANGE = "_templated_context_parallel_attention"
_INSTEAD = "or generate one video per GPU with 'accelerate launch' (docs/several-gpus.md)"


class Share(NamedTuple):
    """The heads of a call that this process computes; they follow each other.

    Args:
        first: The first of them, in the model's numbers.
        total: Heads of the model.
    """

    first: int
    total: int


def share_of(config: Any, heads: int) -> Share:
    """Say which of ``heads`` heads this process gets; ulysses_anything fills up the last one's."""
    context = config.context_parallel_config
    each = -(-heads // context.ulysses_degree)
    return Share(context._ulysses_mesh.get_local_rank() * each, heads)  # noqa: SLF001


def check(model: Any, heads: int, config: Any, cp_plan: Any = None) -> None:
    """Raise ``AttachError`` where sparse attention cannot run under a parallel config.

    Args:
        model: The transformer.
        heads: Its attention heads.
        config: A ``ParallelConfig`` or one of its parts; None: none.
        cp_plan: A plan of the user's own, if there is one.
    """
    reason = None if config is None else _refusal(model, heads, config, cp_plan)
    if reason is not None:
        raise AttachError(f"{type(model).__name__}: sparse attention cannot run under {reason}")


def remarks(strategy: Any) -> list[str]:
    """Say which rules of a strategy choose otherwise on several processes than on one."""
    found = {rule.method: tied for rule in strategy.rules if (tied := rule.instance.heads_tied)}
    return [
        f"{strategy.name}: {method} makes other choices on several processes than on one: {why}; "
        "the choices are equally valid, but results differ by more than rounding"
        for method, why in found.items()
    ]


def _refusal(model: Any, heads: int, config: Any, cp_plan: Any) -> str | None:
    name, version = known_class(model), diffusers.__version__
    context = getattr(config, "context_parallel_config", config)
    if not hasattr(context, "ulysses_degree"):
        return (
            "tensor parallelism, because it splits heads and attention cannot know which ones "
            "it has; use ContextParallelConfig(ulysses_degree=...)"
        )
    if context.ring_degree > 1:
        return (
            f"ring attention (ring_degree={context.ring_degree}), because each process sees only "
            "some of the keys at a time and cannot choose among all of them; use "
            "ContextParallelConfig(ulysses_degree=...) alone"
        )
    plan = getattr(model, "_cp_plan", None)
    if plan is None:
        return (
            f"context parallelism, because diffusers {version} has no plan (_cp_plan) for this "
            "class, and a custom plan does not define the token order; disable one of the two, "
            f"{_INSTEAD}"
        )
    path, names = SPLIT.get(name, ("", frozenset()))
    if not names or not names.issubset(plan.get(path, {})):
        return (
            f"context parallelism, because the token order of the plan in diffusers {version} is "
            f"unknown; disable one of the two, {_INSTEAD}"
        )
    if cp_plan not in (None, plan) or not _installed(model, plan):
        return (
            "a custom context parallel plan, because its token order is unknown; omit cp_plan, "
            f"{_INSTEAD}"
        )
    if heads % context.ulysses_degree and not context.ulysses_anything:
        return (
            f"ulysses_degree={context.ulysses_degree}, which does not divide the number of heads "
            f"({heads}); choose a divisor, or add ulysses_anything=True"
        )
    if not hasattr(attention_dispatch, _EXCHANGE):
        return (
            f"context parallelism with diffusers {version}, whose implementation is missing or "
            f"unknown to dit_sparse; disable one of the two, {_INSTEAD}"
        )
    return None


def _installed(model: Any, plan: dict[str, Any]) -> bool:
    """Tell whether the hooks of a model are those of ``plan``; so too where there are none."""
    found: dict[str, Any] = {}
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in () if registry is None else registry.hooks.items():
            kind, cut, path = name.partition("---")
            if cut and kind in {"cp_input", "cp_output"}:
                found[path] = hook.metadata
    one = {path: [x] if not isinstance(x, dict | list | tuple) else x for path, x in plan.items()}
    return not found or found == one


def exchange(
    core: Core,
    dense: Masked,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    config: Any,
    shape: Shape | None,
) -> Tensor:
    """Compute ``core`` on all tokens of this process's heads.

    What every process exchanges does not depend on what ``core`` does, so processes that choose
    differently cannot wait for each other.

    Args:
        core: Attention, the tokens in the model's own order; takes what is to run where it
            stays dense.
        dense: The model's own attention within this process.
        query: This process's tokens, ``[batch, tokens, heads, head_dim]``.
        key: Like ``query``.
        value: Like ``query``.
        mask: What the model passed, if anything.
        scale: Likewise.
        config: The processor's ``ParallelConfig``.
        shape: (frames, height, width, text) of the whole sequence.

    Returns:
        Like ``query``.
    """
    pieces = interleaved(shape, config.context_parallel_config.ulysses_degree)

    def local(_: Any, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, *_a: Any, **_k: Any):  # type: ignore[no-untyped-def] # noqa: ANN202
        if len(pieces) < 2 or q.shape[1] != sum(pieces):
            return core(q, k, v, given, lambda q, k, v: dense(q, k, v, given))

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (as_split(x, pieces) for x in (q, k, v))
            return in_order(dense(q, k, v, given), pieces)

        q, k, v = (in_order(x, pieces) for x in (q, k, v))
        return as_split(core(q, k, v, _mask_in_order(given, pieces), plain), pieces)

    stock = getattr(attention_dispatch, _EXCHANGE)
    options = {"scale": scale, "forward_op": local, "backward_op": None}
    result: Tensor = stock(query, key, value, mask, **options, _parallel_config=config)
    return result


def interleaved(shape: Shape | None, processes: int) -> list[int]:
    """Give the lengths of the stretches in which tokens arrive: text, video, text, video ...

    Each process has its share of the text and its share of the video; where they are not all
    alike the first have one token more (``torch.tensor_split``). Empty where the tokens arrive
    in the model's order.
    """
    if shape is None or shape[3] == 0:
        return []
    frames, height, width, text = shape
    both = (text, frames * height * width)
    return [n // processes + (i < n % processes) for i in range(processes) for n in both]


def in_order(x: Tensor, pieces: list[int]) -> Tensor:
    """Put tokens ``[batch, tokens, ...]`` from interleaved stretches into text, then video."""
    parts = x.split(pieces, dim=1)
    return torch.cat([*parts[::2], *parts[1::2]], dim=1)


def _mask_in_order(mask: Tensor | None, pieces: list[int]) -> Tensor | None:
    """Put a mask ``[..., tokens or 1, tokens]`` in the order of its tokens."""
    for axis in (-1, -2):
        if mask is not None and mask.ndim >= -axis and mask.shape[axis] == sum(pieces):
            parts = mask.split(pieces, dim=axis)
            mask = torch.cat([*parts[::2], *parts[1::2]], dim=axis)
    return mask


def as_split(x: Tensor, pieces: list[int]) -> Tensor:
    """Undo ``in_order``."""
    half = len(pieces) // 2
    parts = x.split([*pieces[::2], *pieces[1::2]], dim=1)
    return torch.cat([parts[i + side] for i in range(half) for side in (0, half)], dim=1)
