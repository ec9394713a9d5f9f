# SPDX-License-Identifier: Apache-2.0
"""The table of methods: name -> "file:Class". Nothing is imported until it is named.

A new method is one file here and one line in this table.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dit_sparse.errors import StrategyError

if TYPE_CHECKING:
    from dit_sparse.call import Method

METHODS: dict[str, str] = {
    "adaspa": "adaspa:AdaSpa",
    "blade": "blade:Blade",
    "dense": "dense:Dense",
    "gna": "gna:GNA",
    "pooled": "pooled:Pooled",
    "radial": "radial:Radial",
    "rettention": "rettention:Rettention",
    "sparse_vdit": "sparse_vdit:SparseVDiT",
    "sparsed": "sparsed:SparseD",
    "svg": "svg:SVG",
    "svg2": "svg2:SVG2",
    "xattention": "xattention:XAttention",
}


def method_class(name: str) -> type[Method]:
    """Import the dataclass of the method called ``name``; ``StrategyError`` lists the names."""
    if name not in METHODS:
        raise StrategyError(f"unknown method {name!r}; there are: {', '.join(sorted(METHODS))}")
    file, _, symbol = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(f"dit_sparse.methods.{file}"), symbol)
    return found
