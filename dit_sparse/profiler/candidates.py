# SPDX-License-Identifier: Apache-2.0
"""The candidates of a search: named choices of a method and its params.

Text names them: ``radial`` (the method at its three levels), ``adaspa:density=0.25`` (one choice;
further params follow with more colons), or a preset; ``-rettention`` leaves a method out. Items
are parted by commas; commas inside brackets belong to a param.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dit_sparse.errors import DitSparseError
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method, param_names, params_of
from dit_sparse.profiler.errors import ProfileError

if TYPE_CHECKING:
    from dit_sparse.core.call import Method
    from dit_sparse.core.grid import LatentsGrid

LEVELS = (0.5, 0.25, 0.125)  # densities aimed at
SMALL_GRID, SMALL_BLOCK, BLOCK = 8192, 64, 128  # tokens; block sizes below and from there on


@dataclass(frozen=True)
class Candidate:
    """One choice that heads may get.

    Args:
        name: For people and tables, e.g. "radial@0.25"; no two of a search share it.
        method: A name from the table of methods.
        params: All of its params, defaults included.
    """

    name: str
    method: str
    params: dict[str, Any]

    @cached_property
    def instance(self) -> Method:
        """The method, built once."""
        return build_method(self.method, self.params)

    @property
    def period(self) -> int | None:
        """Steps from one refresh that computes everything to the next; None: there is none."""
        return self.instance.period

    def dense_steps(self, steps: int) -> int:
        """Count the steps of a band on which it computes everything, to search or to refresh."""
        if self.period is not None:
            return -(-steps // self.period)
        return int(bool(self.instance.at_start))

    @property
    def keeps_all(self) -> bool:
        """Whether it is dense by its params alone."""
        return self.instance.keeps_all


@dataclass(frozen=True)
class Wanted:
    """A candidate as text names it; ``resolve`` fits it to a grid.

    Args:
        method: A name from the table of methods.
        params: What was given.
        level: The density aimed at; None: the params say all.
    """

    method: str
    params: dict[str, Any]
    level: float | None = None

    @property
    def text(self) -> str:
        """The name: the method, what was given, and the level."""
        parts = [f"{key}={_short(value)}" for key, value in self.params.items()]
        level = "" if self.level is None else f"@{self.level:g}"
        return ":".join([self.method, *parts]) + level


def block_for(grid: LatentsGrid) -> int:
    """Tokens in a block where candidates are not told."""
    return SMALL_BLOCK if grid.tokens < SMALL_GRID else BLOCK


def presets() -> dict[str, tuple[str, ...]]:
    """Collect the presets and their candidates from the methods; bare names come first."""
    bare: dict[str, list[str]] = {}
    more: dict[str, list[str]] = {}
    for name in METHODS:
        for preset, entries in method_class(name).presets.items():
            for entry in entries:
                item = f"{name}:{entry}" if entry else name
                (more if entry else bare).setdefault(preset, []).append(item)
    return {
        preset: (*bare.get(preset, ()), *more.get(preset, ())) for preset in sorted(bare | more)
    }


def parse_candidates(text: str) -> tuple[Wanted, ...]:
    """Read what ``--candidates`` names.

    Raises:
        ProfileError: Nothing named, a name or param that does not exist, or a name given twice.
    """
    found: list[Wanted] = []
    items = [item.strip() for item in _split(text)]
    if not any(items):
        raise ProfileError(
            f"candidates: wanted methods with commas, as in radial,adaspa:density=0.25, or one of "
            f"{', '.join(presets())}; got {text!r:.80}"
        )
    for item in items:
        if item.startswith("-"):
            kept = [want for want in found if want.method != item[1:]]
            if len(kept) == len(found):
                raise ProfileError(
                    f"candidates: {item:.80}: no candidate before it is of such a method; there "
                    f"are {', '.join(dict.fromkeys(want.method for want in found)) or 'none'}"
                )
            found = kept
            continue
        known = item.partition(":")[0] in METHODS  # then no other method need be imported
        for one in (item,) if known else presets().get(item, (item,)):
            found += _wanted(one)
    if not found:
        raise ProfileError(f"candidates: {text!r:.80} leaves none")
    doubled = sorted({w.text for w in found if sum(o.text == w.text for o in found) > 1})
    if doubled:
        raise ProfileError(f"candidates: {doubled[0]} is named twice")
    return tuple(found)


def resolve(wanted: tuple[Wanted, ...], grid: LatentsGrid) -> tuple[Candidate, ...]:
    """Fit candidates to a grid: block size, and the params that give the wanted density.

    A method whose params do not decide its density is there once, not at every level.

    Raises:
        ProfileError: A param that the method refuses; names the candidate.
    """
    block = block_for(grid)
    found: list[Candidate] = []
    for want in wanted:
        cls, name = method_class(want.method), want.text
        params = {**cls.alone, **want.params, **cls.at_start}
        if "block_size" in param_names(want.method):
            params.setdefault("block_size", block)
        if want.level is not None:
            reached = cls.at_density(want.level, grid, block)
            name = name if reached is not None else replace(want, level=None).text
            params = {**(reached or {}), **params}
        try:
            method = build_method(want.method, params)
        except DitSparseError as error:
            raise ProfileError(f"candidates: {want.text}: {error}") from error
        made = Candidate(name, want.method, params_of(method))
        if all((made.method, made.params) != (other.method, other.params) for other in found):
            found.append(made)
    return tuple(found)


def _wanted(item: str) -> list[Wanted]:
    name, *pairs = _split(item, ":")
    if name not in METHODS or name == "dense":
        raise ProfileError(
            f"candidates: {name!r:.80} is no method or preset; methods: "
            f"{', '.join(sorted(set(METHODS) - {'dense'}))}; presets: {', '.join(presets())} "
            "(dense is always a choice)"
        )
    at_start = method_class(name).at_start
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in params:
            raise ProfileError(f"candidates: {item}: wanted KEY=VALUE once each, got {pair!r:.80}")
        if key in at_start:
            raise ProfileError(
                f"candidates: {item}: {key} cannot be set: in a profile every step band searches "
                "when it begins; leave it out"
            )
        try:
            params[key] = json.loads(value)
        except json.JSONDecodeError:
            params[key] = value
    try:
        build_method(name, params)
    except DitSparseError as error:
        raise ProfileError(f"candidates: {item}: {error}") from error
    return [
        Wanted(name, dict(one), level)
        for one, levelled in method_class(name).choices(params)
        for level in (LEVELS if levelled else (None,))
    ]


def _split(text: str, mark: str = ",") -> list[str]:
    """Split at a mark that stands outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
