# SPDX-License-Identifier: Apache-2.0
"""The table of docs/composition.md: feature x family, each cell the verdict of a test.

A test states its cells with ``cells``, which also makes its parameters: a cell cannot stand in
the table without its test. To write the page anew: ``python -m tests.composition.table``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
FAMILIES = ("wan", "hunyuan_video", "cogvideox", "flux", "pixart_sigma")
MODULES = ("test_features", "test_pipelines", "test_lifecycle", "test_compile")


@dataclass(frozen=True)
class Cannot:
    """Stock diffusers cannot do it, ``reason``; the test sees it fail without us."""

    reason: str
    mark = "stock cannot"


@dataclass(frozen=True)
class Refused:
    """We refuse it, ``reason``; the test sees the error."""

    reason: str
    mark = "refused"


@dataclass(frozen=True)
class Works:
    """It works; the test says what that means. ``note``: what to know."""

    note: str = ""
    mark = "yes"


@dataclass
class Row:
    """One feature: its title, the test and the verdict for each family."""

    title: str
    test: str
    verdicts: dict = field(default_factory=dict)


ROWS: dict[str, Row] = {}


def add(test, title, verdicts=None, families=FAMILIES):
    """State a row: ``verdicts`` where it is not plain ``Works()``; "-" where a test says nothing.

    Args:
        test: ``module::function``, without the parameter.
        title: The feature as the page names it.
        verdicts: By family.
        families: That the test runs on.
    """
    if title in ROWS and ROWS[title].test != test:
        raise ValueError(f"two rows are titled {title!r}")
    found = {name: (verdicts or {}).get(name, Works()) for name in families}
    ROWS[title] = Row(title, test, found)
    return found


def cells(title, verdicts=None, families=FAMILIES, quick=None):
    """Parametrize a test over the families of its row: arguments ``family`` and ``verdict``.

    Where ``quick`` families are named, the others are marked slow.
    """
    slow = () if quick is None else (pytest.mark.slow,)

    def decorate(function):
        test = f"{function.__module__.rsplit('.', 1)[-1]}::{function.__name__}"
        found = add(test, title, verdicts, families)
        values = [
            pytest.param(name, verdict, id=name, marks=() if name in (quick or ()) else slow)
            for name, verdict in found.items()
        ]
        return pytest.mark.parametrize(("family", "verdict"), values)(function)

    return decorate


HEAD = """# Sparse attention beside other features of Diffusers

Each cell is a test in `tests/composition/` on a real Diffusers pipeline of tiny size with random
weights. `python -m tests.composition.table` writes this page. No test of this page has run on a
GPU.

- **yes**: the feature was switched on before and after sparse attention, and both were removed
  in either order. With the strategy `dense`, the latents are bit-identical to those of the
  feature alone. With a sparse strategy, they are the same in both orders, and equal to those of
  plain sparse attention if the feature changes no numbers. Afterwards the pipeline gives
  bit-identical results to those before.
- **stock cannot**: diffusers {version} itself fails or has no effect there; the test would
  detect a change.
- **refused**: we raise an error before anything is computed.
- **-**: the test of this row is for the other models.

"""


def render(version):
    """Write the page."""
    notes: list[str] = []

    def cell(verdict):
        if verdict is None:
            return "-"
        text = getattr(verdict, "reason", "") or getattr(verdict, "note", "")
        if not text:
            return verdict.mark
        if text not in notes:
            notes.append(text)
        return f"{verdict.mark} ({notes.index(text) + 1})"

    lines = [["feature", *FAMILIES, "test"], ["---"] * (len(FAMILIES) + 2)]
    lines += [
        [row.title, *(cell(row.verdicts.get(name)) for name in FAMILIES), f"`{row.test}`"]
        for row in ROWS.values()
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(notes, 1))
    tail = PARTS.read_text(encoding="utf-8") if PARTS.exists() else ""
    return f"{HEAD.format(version=version)}{table}\n\n{listed}\n{tail}"


PARTS = Path(__file__).with_name("notes.md")


def collect():
    """Import the test modules, which fill ``ROWS``, and put the rows in the order of the page."""
    for name in MODULES:
        importlib.import_module(f"tests.composition.{name}")
    order = sorted(ROWS.values(), key=lambda row: MODULES.index(row.test.split("::")[0]))
    ROWS.update({row.title: ROWS.pop(row.title) for row in order})
    return ROWS


if __name__ == "__main__":
    import diffusers

    from tests.composition import table  # the one that the tests import, not __main__

    table.collect()
    PAGE.write_text(table.render(diffusers.__version__), encoding="utf-8")
