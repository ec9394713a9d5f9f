# SPDX-License-Identifier: Apache-2.0
"""Import paths of before the folders still work, and say where the module is now."""

import importlib
import sys

import pytest

import dit_sparse
from dit_sparse.core.moved import MOVED
from dit_sparse.core.plan import BlockPlan


@pytest.fixture
def forgotten(monkeypatch):
    """Forget what was imported by an old name, before and after."""

    def forget():
        for name in MOVED:
            sys.modules.pop(f"dit_sparse.{name}", None)

    forget()
    before = dict(vars(dit_sparse))
    yield
    forget()
    for name in set(vars(dit_sparse)) - set(before):
        monkeypatch.delattr(dit_sparse, name)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_gives_the_same_objects(old, new):
    moved = rf"dit_sparse\.{old} has moved to dit_sparse\.{new};"
    with pytest.warns(DeprecationWarning, match=moved):
        before = importlib.import_module(f"dit_sparse.{old}")
    after = importlib.import_module(f"dit_sparse.{new}")
    public = [name for name in vars(after) if not name.startswith("__")]
    assert public
    assert all(getattr(before, name) is getattr(after, name) for name in public)


@pytest.mark.usefixtures("forgotten")
def test_the_warning_names_the_line_that_imports():
    with pytest.warns(DeprecationWarning, match="dit_sparse.core.plan") as seen:
        exec("from dit_sparse.plan import BlockPlan as old", scope := {"__name__": "user"})
    assert scope["old"] is BlockPlan
    assert seen[0].filename == "<string>"


def test_an_unknown_name_is_still_unknown():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dit_sparse.nowhere")
