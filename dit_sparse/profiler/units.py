# SPDX-License-Identifier: Apache-2.0
"""Measure all units (a prompt with a seed), shared among processes, in one go or band by band.

Band by band: all units measure the first band, it is decided over all of them, and runs sparse
when the second is measured, and so on. A band's errors are then those on inputs that the strategy
itself produces up to the band's beginning, and every band keeps to the wish by itself. A
generation ends with its band, so with B equal bands a unit takes (B + 1) / 2 generations. What was
decided is kept beside the units: a killed search goes on with it, and what was measured holds for
this wish alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_sparse.core.grid import LatentsGrid
from dit_sparse.profiler.capture import capture
from dit_sparse.profiler.errors import ProfileError
from dit_sparse.profiler.greedy import Greedy
from dit_sparse.profiler.screen import screen
from dit_sparse.profiler.store import LISTED, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dit_sparse.profiler.candidates import Candidate
    from dit_sparse.profiler.capture import Measuring
    from dit_sparse.profiler.store import Store
    from dit_sparse.profiler.table import Key
    from dit_sparse.profiler.wish import Wish
    from dit_sparse.strategy import Strategy

    Units = list[dict[str, Any]]
    Choices = dict[Key, tuple[int, ...]]
    Progress = Callable[[str, int, int], None]


@dataclass
class Work:
    """The units of a search and how they are measured.

    Args:
        pipe: A Diffusers pipeline.
        jobs: Arguments of the call and seed of each unit.
        how: What to measure.
        store: Where it is kept.
        state: accelerate's ``PartialState``; None: one process.
        progress: Called with (what, done, total).
    """

    pipe: Any
    jobs: Sequence[tuple[dict[str, Any], int]]
    how: Measuring
    store: Store
    state: Any = None
    progress: Progress | None = None

    @property
    def index(self) -> int:
        """This process's number."""
        return 0 if self.state is None else int(self.state.process_index)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def screen(self) -> None:
        """Choose the candidates on the first unit, once, for all processes."""
        if self.index == 0 and self.store.read(LISTED) is None:

            def tick(done: int, total: int) -> None:
                if self.progress is not None:
                    self.progress("screening candidates", done, total)

            call, seed = self.jobs[0]
            self.store.write(LISTED, screen(self.pipe, call, seed, self.how, tick))
        self.wait()
        self.how = replace(self.how, listed=listed(self.store))

    def candidates(self, about: Mapping[str, Any]) -> tuple[Candidate, ...]:
        """Give the candidates that units are measured with."""
        return self.how.candidates(LatentsGrid(*about["grid"]))

    def units(self, band: int | None = None) -> Units:
        """Read what all processes measured."""
        units = [self.store.unit(number, band) for number in range(len(self.jobs))]
        found = [unit for unit in units if unit is not None]
        if len(found) < len(units):
            raise ProfileError(f"{len(units) - len(found)} of {len(units)} units are missing")
        return found

    def measure(
        self,
        band: int | None = None,
        before: Strategy | None = None,
        greedy: Wish | None = None,
    ) -> None:
        """Measure this process's share of the units that are not there yet; then wait."""
        follow = None if greedy is None else lambda seen: Greedy(seen, greedy).strategy()
        count = 1 if self.state is None else int(self.state.num_processes)
        own = range(self.index, len(self.jobs), count)
        named = "" if band is None else f" band {band + 1}"
        for done, number in enumerate(own):
            if self.store.unit(number, band) is None:

                def tick(part: int, whole: int, done: int = done) -> None:
                    if self.progress is not None:
                        self.progress(f"measuring{named}", done * whole + part, len(own) * whole)

                call, seed = self.jobs[number]
                unit = capture(
                    self.pipe, call, seed, self.how,
                    band=band, before=before, follow=follow, tick=tick,
                )  # fmt: skip
                self.store.write_unit(number, unit, band)
            if self.progress is not None:
                self.progress(f"units{named}", done + 1, len(own))
        self.wait()

    def measure_in_bands(
        self, decide: Callable[[Units], Choices], strategy: Callable[[Choices], Strategy]
    ) -> None:
        """Measure and decide band by band, and put each unit's bands together.

        Args:
            decide: Chooses for the band that these units measured.
            strategy: Makes the strategy of what was chosen.
        """
        count = len(self.how.bands.edges) - 1
        for band in range(count):
            choices = {key: value for part in self.chosen(band) for key, value in part.items()}
            self.measure(band, strategy(choices) if choices else None)
            name = f"chosen-{band}.json"
            if self.index == 0 and self.store.read(name) is None:
                made = decide(self.units(band))
                self.store.write(name, {"choices": [[*k, list(v)] for k, v in made.items()]})
            self.wait()
        if self.index == 0:
            for number in range(len(self.jobs)):
                if self.store.unit(number) is None:
                    parts = [self.store.unit(number, band) for band in range(count)]
                    self.store.write_unit(number, _joined([part for part in parts if part]))

    def chosen(self, before: int | None = None) -> list[Choices]:
        """Read what was decided, of each band before one (None: of all)."""
        count = len(self.how.bands.edges) - 1 if before is None else before
        found = []
        for band in range(count):
            part = self.store.read(f"chosen-{band}.json")
            if part is None:
                raise ProfileError(f"band {band + 1}: no process has chosen its methods")
            found.append({(s, layer, b): tuple(c) for s, layer, b, c in part["choices"]})
        return found


def _joined(parts: Units) -> dict[str, Any]:
    """Put the bands of one unit together."""
    stages = sorted({stage for part in parts for stage in part["steps"]})
    steps = {
        stage: sorted({step for part in parts for step in part["steps"].get(stage, ())})
        for stage in stages
    }
    calls = [call for part in parts for call in part["calls"]]
    return {**parts[0], "steps": steps, "calls": calls}
