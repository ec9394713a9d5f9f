# SPDX-License-Identifier: Apache-2.0
"""Tell two strategies apart in words, by what they do and not by how their rules are written."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from dit_sparse.methods.params import params_of

if TYPE_CHECKING:
    from dit_sparse.strategy import Strategy

SHOWN = 40  # lines on who does what


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
    both have are.

    Args:
        one: A strategy.
        other: Another.
        layers: Of the model.
        heads: Of a layer.
        num_steps: Of a generation, to which fractions are rounded.
        stages: Transformers of the pipeline.

    Returns:
        Lines such as ``layer 3, heads 0-2, steps 0-6: dense -> radial (decay_factor 0.5, ...)``.
    """
    lines = []
    for name in ("model", "grid"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            lines.append(f"{name}: {_plain(a)} -> {_plain(b)}")
    told: dict[tuple[str, int, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for stage in stages:
        for layer in range(layers):
            for step in range(num_steps):
                a_heads, b_heads = (
                    _of_heads(s, layer, step, num_steps, stage, heads, layers)
                    for s in (one, other)
                )
                for head in range(heads):
                    if a_heads[head] != b_heads[head]:
                        text = f"{a_heads[head]} -> {b_heads[head]}"
                        told[stage, layer, text][step].append(head)
    found = []
    for (stage, layer, text), by_step in told.items():
        spans: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for step, named in by_step.items():
            spans[tuple(named)].append(step)
        prefix = f"{stage}, " if len(stages) > 1 else ""
        found += [
            f"{prefix}layer {layer}, heads {_ranges(list(named))}, steps {_ranges(steps)}: {text}"
            for named, steps in spans.items()
        ]
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


def _of_heads(
    strategy: Strategy, layer: int, step: int, num_steps: int, stage: str, heads: int, layers: int
) -> list[str]:
    """Describe what each head does."""
    found = ["dense"] * heads
    for choice in strategy.assign(layer, step, num_steps, stage, heads, layers):
        if choice.method is None or choice.rule is None:
            continue
        params = ", ".join(f"{key} {value}" for key, value in params_of(choice.method).items())
        name = strategy.rules[choice.rule].method
        for head in choice.heads:
            found[head] = f"{name} ({params})" if params else name
    return found


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _plain(value: Any) -> str:
    return "any" if value is None else ", ".join(f"{k} {v}" for k, v in value)
