# SPDX-License-Identifier: Apache-2.0
"""The candidates of a search: named choices of a method and its params.

Text names them: ``radial`` (the method at three densities), ``svg2:compensate=means@0.3`` (one
density; params follow with colons), ``adaspa:density=0.25`` (params that decide the density are
one choice), or a preset; ``-rettention`` leaves a method out. Items are separated by commas;
commas inside brackets belong to a param.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
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
    def family(self) -> str:
        """The method and what was given, without the level."""
        parts = [f"{key}={_short(value)}" for key, value in self.params.items()]
        return ":".join([self.method, *parts])

    @property
    def text(self) -> str:
        """The name: the family and the level."""
        return self.family + ("" if self.level is None else f"@{self.level:g}")

    @property
    def settled(self) -> bool:
        """Whether its params alone say what it keeps.

        They do not where the content decides, nor where means are counted on top.
        """
        if self.level is None:
            return True
        method = build_method(self.method, self.params)
        told = method.static or method.asked_density is not None
        return told and "compensate" not in self.params

    def fitted(self, grid: LatentsGrid, asked: float | None = None) -> Candidate:
        """Fit it to a grid: block size, and the params that give the wanted density.

        Args:
            grid: Where the tokens stand.
            asked: Density to ask the method for, in (0, 1]; None: the level. Where the content
                decides what a method keeps, another number than the level gives the level.

        Raises:
            ProfileError: A param that the method refuses; names the candidate.
        """
        cls, name = method_class(self.method), self.text
        params = {**cls.alone, **self.params, **cls.at_start}
        if "block_size" in param_names(self.method):
            params.setdefault("block_size", block_for(grid))
        if self.level is not None:
            asked = self.level if asked is None else asked
            reached = cls.at_density(asked, grid, params.get("block_size", block_for(grid)))
            name = name if reached is not None else self.family
            params = {**(reached or {}), **params}
        try:
            method = build_method(self.method, params)
        except DitSparseError as error:
            raise ProfileError(f"candidates: {self.text}: {error}") from error
        return Candidate(name, self.method, params_of(method))


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
            "candidates: must be comma-separated methods, e.g. radial,adaspa:density=0.25, or "
            f"one of {', '.join(presets())}; got {text!r:.80}"
        )
    for item in items:
        if item.startswith("-"):
            kept = [want for want in found if want.method != item[1:]]
            if len(kept) == len(found):
                raise ProfileError(
                    f"candidates: {item:.80}: no preceding candidate uses this method; preceding "
                    f"methods: {', '.join(dict.fromkeys(want.method for want in found)) or 'none'}"
                )
            found = kept
            continue
        name = item.partition("@")[0].partition(":")[0]
        known = name in METHODS  # then no other method need be imported
        for one in (item,) if known else presets().get(item, (item,)):
            found += _wanted(one)
    if not found:
        raise ProfileError(f"candidates: {text!r:.80} removes every candidate")
    doubled = sorted({w.text for w in found if sum(o.text == w.text for o in found) > 1})
    if doubled:
        raise ProfileError(f"candidates: duplicate candidate {doubled[0]}")
    return tuple(found)


def resolve(wanted: tuple[Wanted, ...], grid: LatentsGrid) -> tuple[Candidate, ...]:
    """Fit candidates to a grid; those that come out the same are there once.

    Raises:
        ProfileError: A param that the method refuses; names the candidate.
    """
    found: list[Candidate] = []
    for want in wanted:
        made = want.fitted(grid)
        if all((made.method, made.params) != (other.method, other.params) for other in found):
            found.append(made)
    return tuple(found)


def _wanted(item: str) -> list[Wanted]:
    item, level = _level(item)
    name, *pairs = _split(item, ":")
    if name not in METHODS or name == "dense":
        raise ProfileError(
            f"candidates: unknown method or preset {name!r:.80}; methods: "
            f"{', '.join(sorted(set(METHODS) - {'dense'}))}; presets: {', '.join(presets())} "
            "(dense is always a choice)"
        )
    at_start = method_class(name).at_start
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in params:
            raise ProfileError(
                f"candidates: {item}: must be KEY=VALUE, each key once, got {pair!r:.80}"
            )
        if key in at_start:
            raise ProfileError(
                f"candidates: {item}: {key} cannot be set, because in a profile every step band "
                "searches when it begins; remove it"
            )
        try:
            params[key] = json.loads(value)
        except json.JSONDecodeError:
            params[key] = value
    try:
        build_method(name, params)
    except DitSparseError as error:
        raise ProfileError(f"candidates: {item}: {error}") from error
    choices = method_class(name).choices(params)
    if level is not None and not all(levelled for _, levelled in choices):
        raise ProfileError(
            f"candidates: {item:.80}@{level:g}: its params already set the density; remove "
            f"'@{level:g}' or the param"
        )
    return [
        Wanted(name, dict(one), each)
        for one, levelled in choices
        for each in ((LEVELS if level is None else (level,)) if levelled else (None,))
    ]


def _level(item: str) -> tuple[str, float | None]:
    """Cut off the density that stands behind "@"."""
    base, mark, text = item.rpartition("@")
    if not mark:
        return item, None
    with suppress(ValueError):
        if 0 < (level := float(text)) <= 1:
            return base, level
    raise ProfileError(
        f"candidates: {item:.80}: density after @ must be in (0, 1], got {text!r:.20}"
    )


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
