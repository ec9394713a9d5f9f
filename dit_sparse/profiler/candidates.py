# SPDX-License-Identifier: Apache-2.0
"""The candidates of a search: named choices of a method and its params.

Text names them: ``radial`` (the method at its three levels), ``adaspa:density=0.25`` (one choice;
further params follow with more colons), or a preset; ``-rettention`` leaves a method out. Items
are parted by commas; commas inside brackets belong to a param.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.backends import Backends
from dit_sparse.call import AttentionCall
from dit_sparse.errors import DitSparseError
from dit_sparse.methods import METHODS
from dit_sparse.methods.params import build_method, param_names, params_of
from dit_sparse.profiler.errors import ProfileError

if TYPE_CHECKING:
    from dit_sparse.call import Method
    from dit_sparse.grid import LatentsGrid

LEVELS = (0.5, 0.25, 0.125)  # densities aimed at
SMALL_GRID, SMALL_BLOCK, BLOCK = 8192, 64, 128  # tokens; block sizes below and from there on
# In a profile every step band searches when it begins: these may not be set.
AT_BAND_START: dict[str, tuple[str, Any]] = {
    "adaspa": ("search_steps", [0.0]),
    "sparsed": ("search_step", 0.0),
}
SINK_FROM = 0.5  # levels at which Radial keeps the first frame for all: it costs 1 / frames
THRESHOLDS = {0.5: 0.95, 0.25: 0.8, 0.125: 0.6}  # for top-p rules, whose density is the content's
PATTERNS = ("full", "skip", "diagonal", "multi_diagonal", "vertical_stripe")
QUICK = ("radial", "pooled", "adaspa", "sparse_vdit:patterns=diagonal",
         "sparse_vdit:patterns=multi_diagonal")  # fmt: skip
EVERY = tuple(name for name in sorted(METHODS) if name not in {"dense", "sparse_vdit"})
PRESETS: dict[str, tuple[str, ...]] = {
    "default": (*EVERY, "sparse_vdit:patterns=diagonal", "sparse_vdit:patterns=multi_diagonal"),
    "quick": QUICK,
    "sparse-vdit": tuple(f"sparse_vdit:patterns={pattern}" for pattern in PATTERNS),
}
_BISECTIONS = 12


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
        return int(self.params["refresh"]) if self.method == "rettention" else None

    def dense_steps(self, steps: int) -> int:
        """Count the steps of a band on which it computes everything, to search or to refresh."""
        if self.period is not None:
            return -(-steps // self.period)
        return int(self.method in AT_BAND_START)

    @property
    def keeps_all(self) -> bool:
        """Dense by its params alone: Sparse-vDiT's full pattern."""
        return self.params.get("patterns") == "full"


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
            f"{', '.join(PRESETS)}; got {text!r:.80}"
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
        for one in PRESETS.get(item, (item,)):
            found += _wanted(one)
    if not found:
        raise ProfileError(f"candidates: {text!r:.80} leaves none")
    doubled = sorted({w.text for w in found if sum(o.text == w.text for o in found) > 1})
    if doubled:
        raise ProfileError(f"candidates: {doubled[0]} is named twice")
    return tuple(found)


def resolve(wanted: tuple[Wanted, ...], grid: LatentsGrid) -> tuple[Candidate, ...]:
    """Fit candidates to a grid: block size, and the knob that gives the wanted density.

    Radial's ``decay_factor`` and GNA's window are bisected until the plan keeps about that share;
    other methods take the density itself, or a threshold where what they
    keep depends on the content.

    Raises:
        ProfileError: A param that the method refuses; names the candidate.
    """
    block = block_for(grid)
    found: list[Candidate] = []
    for want in wanted:
        params = dict(want.params)
        names = param_names(want.method)
        if "block_size" in names and "block_size" not in params:
            params["block_size"] = block
        if want.method in AT_BAND_START:
            key, value = AT_BAND_START[want.method]
            params[key] = value
        if want.method == "adaspa":
            # Levels would tie a head's measured error to the other heads of its launch.
            params.setdefault("recall_threshold", 1.0)
        if want.level is not None:
            params = {**_at_level(want.method, want.level, grid, block), **params}
        try:
            method = build_method(want.method, params)
        except DitSparseError as error:
            raise ProfileError(f"candidates: {want.text}: {error}") from error
        made = Candidate(want.text, want.method, params_of(method))
        if all((made.method, made.params) != (other.method, other.params) for other in found):
            found.append(made)
    return tuple(found)


def _wanted(item: str) -> list[Wanted]:
    name, *pairs = _split(item, ":")
    if name not in METHODS or name == "dense":
        raise ProfileError(
            f"candidates: {name!r:.80} is no method or preset; methods: {', '.join(EVERY)}, "
            f"sparse_vdit; presets: {', '.join(PRESETS)} (dense is always a choice)"
        )
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in params:
            raise ProfileError(f"candidates: {item}: wanted KEY=VALUE once each, got {pair!r:.80}")
        if name in AT_BAND_START and key == AT_BAND_START[name][0]:
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
    if name == "sparse_vdit":
        if not pairs:
            return [Wanted(name, {"patterns": pattern}) for pattern in PATTERNS]
        banded = params.get("patterns") in {"diagonal", "multi_diagonal"}
        if not banded or len(params) > 1:
            return [Wanted(name, params)]
        return [Wanted(name, params, level) for level in LEVELS]
    if pairs:
        return [Wanted(name, params)]
    return [Wanted(name, {}, level) for level in LEVELS]


def _at_level(method: str, level: float, grid: LatentsGrid, block: int) -> dict[str, Any]:
    """Give the params that make a method keep about ``level`` of the pairs on a grid."""
    if method == "radial":
        return {"decay_factor": _radial_factor(level, grid, block), "sink": level >= SINK_FROM}
    if method == "gna":
        return _gna_window(level, grid, block)
    if method == "rettention":
        factor = _radial_factor(level, grid, block)
        mask = {"decay_factor": factor, "block_size": block, "sink": level >= SINK_FROM}
        return {"mask_params": mask}
    if method == "sparse_vdit":
        return {"diagonal_density": level, "multi_diagonal_density": level}
    if method == "xattention":
        return {"threshold": THRESHOLDS[level]}
    if method == "svg2":
        return {"top_p": THRESHOLDS[level], "first_iterations": 10}
    if method == "blade":
        return {"density": level, "floor": min(0.05, level)}
    return {"density": level}


def _radial_factor(level: float, grid: LatentsGrid, block: int) -> float:
    """Bisect the logarithm of Radial's factor for the density of its plan."""
    low, high = -10.0, 4.0  # powers of 2
    params = {"block_size": block, "sink": level >= SINK_FROM}
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _static_density("radial", {**params, "decay_factor": 2**middle}, grid) > level:
            high = middle
        else:
            low = middle
    return float(f"{2**low:.3g}")


def _gna_window(level: float, grid: LatentsGrid, block: int) -> dict[str, Any]:
    """Bisect the window, as one share of all sides, for the density of its plan.

    Blocks are kept whole: cut to the token, the same blocks are computed, with masks on top, and
    what they leave out is missed (``test_whole_tiles_err_less_for_the_same_blocks``).
    """
    sides = (grid.frames, grid.height, grid.width)
    axes = sum(side > 1 for side in sides) or 1
    tile = [4, 4, 4] if block == SMALL_BLOCK else [4, 4, 8]
    low, high = 0.0, 1.0

    def params(share: float) -> dict[str, Any]:
        window = [max(1, round(side * share ** (1 / axes))) for side in sides]
        stride = [min(pair) for pair in zip(tile, window, strict=True)]
        return {"window": window, "stride": stride, "tile": tile, "exact": False}

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _static_density("gna", params(middle), grid) > level:
            high = middle
        else:
            low = middle
    return params(low)


def _static_density(method: str, params: dict[str, Any], grid: LatentsGrid) -> float:
    """Count what a static method keeps on a grid."""
    blank = torch.zeros(1, grid.tokens, 1, 1)
    call = AttentionCall(blank, blank, blank, grid, 1.0, heads=(0,))
    plan = build_method(method, params).plan(call, Backends())
    return 1.0 if plan is None else float(plan.density().mean())


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
