# SPDX-License-Identifier: Apache-2.0
"""The map of a model: layer x head x step band, with what is known of each head there.

A *spot* is one head of one layer in one band; spots are numbered by stage, band, layer, head, the
last one fastest. What is not known of a spot is None, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dit_sparse.inspect.pictures import Pictures


class Band(NamedTuple):
    """Steps ``start`` to ``stop`` - 1 of ``of``."""

    start: int
    stop: int
    of: int

    def __str__(self) -> str:
        """Say it as people count: from 0, both ends named."""
        last = self.stop - 1
        return f"step {last}" if last == self.start else f"steps {self.start}-{last}"


@dataclass(frozen=True)
class Layout:
    """The axes of a map.

    Args:
        stages: Transformers of the pipeline.
        bands: Step bands, in order.
        layers: Of each transformer.
        heads: Of each layer.
    """

    stages: tuple[str, ...]
    bands: tuple[Band, ...]
    layers: int
    heads: int

    @property
    def spots(self) -> int:
        """How many there are."""
        return len(self.stages) * len(self.bands) * self.layers * self.heads

    def spot(self, stage: str, band: int, layer: int, head: int) -> int:
        """Give the number of a spot."""
        place = self.stages.index(stage) * len(self.bands) + band
        return (place * self.layers + layer) * self.heads + head

    def band_of(self, step: int) -> int:
        """Give the band that a step lies in."""
        return next(i for i, band in enumerate(self.bands) if band.start <= step < band.stop)


@dataclass
class Quantity:
    """One number for every spot, to colour the map by.

    Args:
        key: Short name.
        name: For people.
        values: One for each spot, None where it is not known.
        good: Which end of the scale is better; "": neither.
        note: Where the numbers come from.
        share: Shown in percent, on a scale from 0 to 1; otherwise the scale ends at the largest.
    """

    key: str
    name: str
    values: list[float | None]
    good: Literal["high", "low", ""] = ""
    note: str = ""
    share: bool = False

    @property
    def top(self) -> float:
        """The end of the scale."""
        most = max((value for value in self.values if value is not None), default=0.0)
        return most if most > 0 and not self.share else 1.0

    def known(self, spots: list[bool]) -> bool:
        """Say whether anything is known of the spots that are True."""
        return any(v is not None for v, asked in zip(self.values, spots, strict=True) if asked)


@dataclass
class Choice:
    """What some spots do.

    Args:
        method: Its name.
        text: Method and params, for people.
        name: Short, for lists.
        params: All of them.
        density: Of its sparse calls, by the geometry alone; None: it depends on the content.
        exact: ``density`` was counted from plans.
        kept: Number of the picture of the pairs it keeps; None: not drawn, ``why`` says why.
        seen: Number of the picture of what the middle token reads.
        why: Why there is no picture, or what it was made from.
    """

    method: str
    text: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    density: float | None = None
    exact: bool = False
    kept: int | None = None
    seen: int | None = None
    why: str = ""


@dataclass
class Candidates:
    """What was measured of every candidate at every spot; column 0 is dense.

    Args:
        names: Of the columns.
        columns: By figure ("error", "density", "recall", "time"), ``[spots][columns]``; an empty
            row: nothing was measured there.
    """

    names: list[str]
    columns: dict[str, list[list[float | None]]]


@dataclass
class Atlas:
    """Everything a page or a picture shows.

    Args:
        title: First line.
        lines: Under it.
        layout: The axes.
        quantities: What the map can be coloured by.
        choices: What spots do; empty for a model that nothing was chosen for.
        choice_of: Number of each spot's choice.
        candidates: What was measured; None: nothing.
        pictures: All pictures, by number.
        attention: Picture of the softmax mass of each spot, None where there is none.
        kept: Picture of the pairs each spot kept as it ran.
        seen: Picture of what the middle token read as it ran.
        facts: (name, value) pairs at the end.
        notes: What a reader must know.
    """

    title: str
    lines: list[str]
    layout: Layout
    quantities: list[Quantity] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    choice_of: list[int] = field(default_factory=list)
    candidates: Candidates | None = None
    pictures: Pictures = field(default_factory=Pictures)
    attention: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sparse(self) -> list[bool]:
        """Spots that are of interest: not dense by choice, or all of a model's."""
        if not self.choices:
            return [True] * self.layout.spots
        return [self.choices[number].method != "dense" for number in self.choice_of]
