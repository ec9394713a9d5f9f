# SPDX-License-Identifier: Apache-2.0
"""Read back what a search measured, from the folder beside its strategy file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.methods.params import build_method
from dit_sparse.profiler.candidates import parse_candidates, resolve
from dit_sparse.profiler.capture import Bands
from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.store import SETUP, Store, listed
from dit_sparse.profiler.table import cells_of, sum_up

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.profiler.candidates import Candidate, Wanted
    from dit_sparse.profiler.search import Cell
    from dit_sparse.profiler.table import Key, Row
    from dit_sparse.strategy import Strategy

MOST = 10_000  # steps, layers, heads
SUFFIX = ".measured"


@dataclass(frozen=True)
class Stored:
    """Everything that a search measured.

    Args:
        folder: Where.
        grid: Of the captured calls.
        num_steps: Of the generations.
        layers: Of each transformer.
        heads: Of each layer.
        bands: How the run was cut.
        candidates: Column c of a table is candidate c - 1; column 0 is dense.
        rows: By (stage, layer, band).
        cells: The same with predicted times, in the rows' order.
        units: Prompts times seeds that are there.
        timing: Where predicted times come from, for people.
        inputs: What the measured calls were fed with, for people.
    """

    folder: Path
    grid: LatentsGrid
    num_steps: int
    layers: int
    heads: int
    bands: Bands
    candidates: tuple[Candidate, ...]
    rows: dict[Key, Row]
    cells: dict[Key, Cell]
    units: int
    timing: str
    inputs: str = "dense inputs"

    def column(self, method: str, params: dict[str, Any]) -> int | None:
        """Find the column of a choice; None: it was not measured."""
        if build_method(method, params).keeps_all:
            return 0
        for column, candidate in enumerate(self.candidates, 1):
            if (candidate.method, candidate.params) == (method, params):
                return column
        return None


def beside(path: Path) -> Path:
    """Name the folder in which a search keeps what it measured for a strategy file."""
    return path.with_name(path.stem + SUFFIX)


def read_stored(folder: Path) -> Stored | None:
    """Read a folder that a search wrote; None: there is none, or no unit is done yet.

    Raises:
        ProfileError: It cannot be read, or this version cannot make sense of it.
    """
    store = Store(folder)
    if not folder.is_dir() or (setup := store.read(SETUP)) is None:
        return None
    try:
        count = len(setup["calls"])
        units = [unit for number in range(count) if (unit := store.unit(number)) is not None]
        if not units:
            return None
        about = units[0]["about"]
        sizes = {key: about[key] for key in ("num_steps", "layers", "heads")}
        if wrong := [f"{key} {n!r:.40}" for key, n in sizes.items() if not 1 <= n <= MOST]:
            raise ValueError(f"{', '.join(wrong)}: must be from 1 to {MOST}")  # noqa: TRY301
        grid = LatentsGrid(*about["grid"])
        bands = Bands(tuple(setup["bands"]), setup["captures"])
        candidates = listed(store)
        if candidates is None:
            candidates = resolve(tuple(_wanted(text) for text in setup["candidates"]), grid)
        rows = sum_up(units, candidates, bands)
        timed = store.read("costs.json")
        costs = (
            CostModel.assumed(candidates, about["heads"])
            if timed is None
            else CostModel.from_dict(timed["model"])
        )
        cells = {cell.key: cell for cell in cells_of(rows, candidates, costs)}
        return Stored(
            folder,
            grid,
            about["num_steps"],
            about["layers"],
            about["heads"],
            bands,
            candidates,
            rows,
            cells,
            len(units),
            costs.source,
            "dense inputs"
            if setup.get("sequential", "none") == "none"
            else "inputs that earlier choices produced",
        )
    except (KeyError, TypeError, IndexError, ValueError, AssertionError) as error:
        raise ProfileError(
            f"{folder}: not written by this version of the profiler ({type(error).__name__}: "
            f"{error}); add --fresh to measure again"
        ) from error


def fits(stored: Stored, strategy: Strategy) -> str | None:
    """Say why measurements are not a strategy's; None: they are of its grid and layers."""
    grid = strategy.grid
    found = stored.grid
    sides = (found.frames, found.height, found.width, found.text_length)
    if grid is None or (grid.frames, grid.height, grid.width, grid.text) != sides:
        return f"it was measured at {found} tokens, but the strategy has another grid"
    for rule in strategy.rules:
        for named, size, word in ((rule.layers, stored.layers, "layer"),
                                  (rule.heads, stored.heads, "head")):  # fmt: skip
            if named != "all" and named[-1] >= size:
                return f"it was measured on {size} {word}s, the strategy names {word} {named[-1]}"
    return None


def _wanted(text: str) -> Wanted:
    """Find the candidate that a name in the setup stands for."""
    for found in parse_candidates(text):
        if found.text == text:
            return found
    raise ProfileError(f"this version has no candidate {text!r:.80}")
