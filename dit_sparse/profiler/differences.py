# SPDX-License-Identifier: Apache-2.0
"""Tell two strategies apart in words, by what they do and not by how their rules are written."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_sparse.methods.params import method_text, params_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_sparse.strategy import Strategy

    Doing = tuple[str, dict[str, Any]]  # a method and its params

SHOWN = 40  # lines on who does what


@dataclass(frozen=True)
class Change:
    """Heads that do one thing in one strategy and another in the other.

    Args:
        stage: Transformer of the pipeline.
        layers: Ascending, as are heads and steps; each of these layers differs so in all of these
            heads at all of these steps.
        heads: Of each layer.
        steps: 0-based.
        one: Method and params.
        other: Method and params.
    """

    stage: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    steps: tuple[int, ...]
    one: Doing
    other: Doing


def changes(
    one: Strategy,
    other: Strategy,
    *,
    layers: int,
    heads: int,
    num_steps: int,
    stages: tuple[str, ...] = ("transformer",),
) -> list[Change]:
    """List who does what differently; layers that differ alike are one entry.

    Args:
        one: A strategy.
        other: Another.
        layers: Of the model.
        heads: Of a layer.
        num_steps: Of a generation, to which fractions are rounded.
        stages: Transformers of the pipeline.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    doings: dict[str, Doing] = {}
    for stage in stages:
        for layer in range(layers):
            told: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(
                lambda: defaultdict(list)
            )
            for step in range(num_steps):
                a_heads, b_heads = (
                    _of_heads(s, layer, step, num_steps, stage, heads, layers)
                    for s in (one, other)
                )
                for head, (a, b) in enumerate(zip(a_heads, b_heads, strict=True)):
                    if a != b:
                        texts = method_text(a), method_text(b)
                        doings |= {texts[0]: a, texts[1]: b}
                        told[texts][step].append(head)
            for pair, by_step in told.items():
                spans: dict[tuple[int, ...], list[int]] = defaultdict(list)
                for step, named in by_step.items():
                    spans[tuple(named)].append(step)
                for who, steps in spans.items():
                    alike[stage, pair, who, tuple(steps)].append(layer)
    return [
        Change(stage, tuple(found), who, steps, doings[pair[0]], doings[pair[1]])
        for (stage, pair, who, steps), found in alike.items()
    ]


def difference(
    one: Strategy,
    other: Strategy,
    *,
    layers: int,
    heads: int,
    num_steps: int,
    stages: tuple[str, ...] = ("transformer",),
) -> list[str]:
    """List what differs, a line each; an empty list: they do the same everywhere.

    Name, receipt and the way in which rules are split are not compared; measured figures that
    both have are, where they do something differently. Takes what ``changes`` takes.

    Returns:
        Lines such as ``layer 3, heads 0-2, steps 0-6: dense -> radial (decay_factor 0.5, ...)``.
    """
    lines = [f"{key}: {a} -> {b}" for key, a, b in about(one, other, ("model", "grid"))]
    told = changes(one, other, layers=layers, heads=heads, num_steps=num_steps, stages=stages)
    found = []
    for stage in stages:
        for layer in range(layers):
            for each in told:
                if each.stage != stage or layer not in each.layers:
                    continue
                prefix = f"{stage}, " if len(stages) > 1 else ""
                where = f"heads {ranges(each.heads)}, steps {ranges(each.steps)}"
                doing = f"{method_text(each.one)} -> {method_text(each.other)}"
                found.append(f"{prefix}layer {layer}, {where}: {doing}")
    lines += found[:SHOWN]
    if len(found) > SHOWN:
        lines.append(f"... and {len(found) - SHOWN} more")
    if found:
        a_figures, b_figures = one.receipt.measured, other.receipt.measured
        lines += [
            f"measured {key}: {a_figures[key]:g} -> {b_figures[key]:g}"
            for key in sorted(a_figures.keys() & b_figures.keys())
            if a_figures[key] != b_figures[key]
        ]
    return lines


def about(
    one: Strategy, other: Strategy, parts: Sequence[str] = ("model", "grid", "receipt")
) -> list[tuple[str, str, str]]:
    """List what differs in the parts that do not say who does what.

    Returns:
        (key, of one, of the other); a receipt is told key by key, measured figures one by one.
    """
    found = []
    for part in parts:
        a, b = getattr(one, part), getattr(other, part)
        if part != "receipt":
            if a != b:
                found.append((part, _plain(a), _plain(b)))
            continue
        a_keys, b_keys = (_flat(each.model_dump(mode="json")) for each in (a, b))
        found += [
            (f"receipt.{key}", _value(a_keys.get(key)), _value(b_keys.get(key)))
            for key in dict.fromkeys([*a_keys, *b_keys])
            if a_keys.get(key) != b_keys.get(key)
        ]
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _of_heads(
    strategy: Strategy, layer: int, step: int, num_steps: int, stage: str, heads: int, layers: int
) -> list[Doing]:
    """Say what each head does."""
    found: list[Doing] = [("dense", {})] * heads
    for choice in strategy.assign(layer, step, num_steps, stage, heads, layers):
        if choice.method is None or choice.rule is None:
            continue
        doing = strategy.rules[choice.rule].method, params_of(choice.method)
        for head in choice.heads:
            found[head] = doing
    return found


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """Spell objects inside out: ``measured.density``."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return (
        "not said" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _plain(value: Any) -> str:
    return "any" if value is None else ", ".join(f"{k} {_value(_list(v))}" for k, v in value)


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
