# SPDX-License-Identifier: Apache-2.0
"""Count what a strategy is made of, for methods that choose per head."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from dit_sparse.profiler.stored import read_stored
from dit_sparse.strategy import Strategy

if TYPE_CHECKING:
    from pathlib import Path

PER_HEAD = ("mixed", "sparse_vdit")


def composition_of(
    strategy: Strategy, *, layers: int, heads: int, num_steps: int
) -> dict[str, float]:
    """Give each method's share of all (layer, head, step), the largest first; they sum to 1.

    Sparse-vDiT's patterns stand apart ("sparse_vdit:skip"); heads that no rule names are "dense".
    """
    count: Counter[str] = Counter()
    for step in range(num_steps):
        for layer in range(layers):
            for choice in strategy.assign(layer, step, num_steps, "transformer", heads, layers):
                name = "dense"
                if choice.rule is not None and choice.method is not None:
                    rule = strategy.rules[choice.rule]
                    pattern = rule.params.get("patterns")
                    name = rule.method if pattern is None else f"{rule.method}:{pattern}"
                count[name] += len(choice.heads)
    total = count.total()
    return {name: round(found / total, 4) for name, found in count.most_common()}


def compositions(folder: Path, store: Path) -> dict[str, dict[str, float]]:
    """Read those of all strategies in ``folder`` that chose per head.

    Args:
        folder: With the strategy files.
        store: Where the profiler keeps what it measured, in a folder for each of these methods;
            the model's size is read there.
    """
    found = {}
    for method in PER_HEAD:
        stored = read_stored(store / method)
        for path in sorted(folder.glob(f"{method}-*.json")):
            assert stored is not None
            found[path.stem] = composition_of(
                Strategy.load(path),
                layers=stored.layers,
                heads=stored.heads,
                num_steps=stored.num_steps,
            )
    return found
