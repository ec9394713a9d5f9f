# SPDX-License-Identifier: Apache-2.0
"""The page docs/composition.md is what the tests say, and has no cell without a test."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.composition import table


@pytest.fixture(scope="module")
def rows():
    return table.collect()


def test_the_page_is_fresh(rows):
    page = table.PAGE.read_text(encoding="utf-8")
    version = re.search(r"diffusers (\S+) itself", page)[1]
    assert page == table.render(version), "python -m tests.composition.table writes it anew"


def test_every_cell_has_its_test(rows):
    assert rows
    for row in rows.values():
        name, function = row.test.split("::")
        test = getattr(importlib.import_module(f"tests.composition.{name}"), function)
        (mark,) = (each for each in test.pytestmark if each.name == "parametrize")
        names, values = mark.args
        place = names.index("family")
        tested = [value.values[place] for value in values if titled(names, value, row)]
        assert sorted(tested) == sorted(row.verdicts)
        assert set(row.verdicts) <= set(table.FAMILIES)


def titled(names, value, row):
    """Whether a parameter belongs to this row: one test may serve several."""
    if "key" not in names:
        return True
    from tests.composition.features import FEATURES

    return FEATURES[value.values[names.index("key")]].title == row.title


def test_the_five_families_have_a_verdict_on_most_features(rows):
    everywhere = [row for row in rows.values() if set(row.verdicts) == set(table.FAMILIES)]
    assert len(everywhere) >= 20
    assert {verdict.mark for row in rows.values() for verdict in row.verdicts.values()} == {
        "yes",
        "stock cannot",
        "refused",
    }
