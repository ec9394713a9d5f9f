# SPDX-License-Identifier: Apache-2.0
"""The table of methods: name -> "package.module:Class". Nothing is imported until it is named.

A new method is one file here and one line in this table. A method in another package is added by
``register_method``, or by that package's entry point in the group ``dit_sparse.methods``.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from dit_sparse.core.call import Method
from dit_sparse.errors import StrategyError

METHODS: dict[str, str] = {
    "adaspa": "dit_sparse.methods.adaspa:AdaSpa",
    "blade": "dit_sparse.methods.blade:Blade",
    "centroid": "dit_sparse.methods.centroid:Centroid",
    "composed": "dit_sparse.methods.composed:Composed",
    "dense": "dit_sparse.methods.dense:Dense",
    "gna": "dit_sparse.methods.gna:GNA",
    "pooled": "dit_sparse.methods.pooled:Pooled",
    "radial": "dit_sparse.methods.radial:Radial",
    "rettention": "dit_sparse.methods.rettention:Rettention",
    "sparse_vdit": "dit_sparse.methods.sparse_vdit:SparseVDiT",
    "sparsed": "dit_sparse.methods.sparsed:SparseD",
    "svg": "dit_sparse.methods.svg:SVG",
    "svg2": "dit_sparse.methods.svg2:SVG2",
    "window": "dit_sparse.methods.window:Window",
    "xattention": "dit_sparse.methods.xattention:XAttention",
}


def register_method(name: str, path: str) -> None:
    """Add a method of your own to the table; it is imported when it is first used.

    From then on strategies, the profiler, forecasts and pictures accept its name. Strategy files
    hold names only, so a program that loads one must register the same methods first. A package
    that is installed can declare the entry point ``name = "package.module:Class"`` in the group
    ``dit_sparse.methods`` instead. Registering the same line again changes nothing.

    Args:
        name: Lower-case letters, digits and underscores, starting with a letter.
        path: ``"package.module:Class"`` of a frozen dataclass that inherits from
            ``dit_sparse.core.call.Method``; its fields are the method's params.

    Raises:
        StrategyError: The name is invalid or stands for another class, or the path is invalid.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise StrategyError(
            f"a method's name must be lower-case letters, digits and underscores, starting with a "
            f"letter, got {name!r:.80}; try 'my_method'"
        )
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", path):
        raise StrategyError(
            f"method {name!r}: path must be 'package.module:Class', got {path!r:.80}; "
            "try 'my_package.my_method:MyMethod'"
        )
    if METHODS.setdefault(name, path) != path:
        raise StrategyError(
            f"method {name!r} is already {METHODS[name]}, so it cannot be registered as {path}; "
            "choose another name"
        )


def method_class(name: str) -> type[Method]:
    """Import the dataclass of the method called ``name``; ``StrategyError`` lists the names."""
    if name not in METHODS:
        raise StrategyError(
            f"unknown method {name!r}; available methods: {', '.join(sorted(METHODS))}"
        )
    module, _, symbol = METHODS[name].partition(":")
    try:
        found: Any = getattr(import_module(module), symbol)
    except (ImportError, AttributeError) as error:
        raise StrategyError(
            f"method {name!r}: {METHODS[name]} cannot be imported: {error}"
        ) from error
    proper = isinstance(found, type) and Method in found.__mro__ and is_dataclass(found)
    if not proper:
        raise StrategyError(
            f"method {name!r}: {METHODS[name]} must be a frozen dataclass that inherits from "
            "dit_sparse.core.call.Method"
        )
    return cast("type[Method]", found)


def _add_declared(point: EntryPoint) -> None:
    """Add a method that an installed package declares, or warn that it cannot be added."""
    try:
        register_method(point.name, f"{point.module}:{point.attr}")
    except StrategyError as error:
        owner = point.dist.name if point.dist is not None else "?"
        warnings.warn(f"entry point of the package {owner}: {error}", stacklevel=2)


for _point in entry_points(group="dit_sparse.methods"):
    _add_declared(_point)
