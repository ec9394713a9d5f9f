# SPDX-License-Identifier: Apache-2.0
"""An action follows the import of a module, whenever that is, and changes nothing else."""

import importlib
import sys
import threading

import pytest

from dit_sparse.core.on_import import on_import


@pytest.fixture
def later(tmp_path, monkeypatch):
    """A module that nobody has imported."""
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "imported_later"
    sys.modules.pop("imported_later", None)


def test_before_and_after(later):
    seen = []
    on_import(later, lambda module: seen.append((module, module.value)))
    assert not seen
    module = importlib.import_module(later)
    assert seen == [(module, 1)]
    on_import(later, lambda module: seen.append((module, 2)))
    assert seen[1:] == [(module, 2)]
    assert not [finder for finder in sys.meta_path if getattr(finder, "name", "") == later]


def test_the_module_is_as_it_would_have_been(later):
    plain = importlib.import_module(later)
    loader = type(plain.__loader__)
    del sys.modules[later]
    on_import(later, lambda _: None)
    module = importlib.import_module(later)
    assert type(module.__loader__) is type(module.__spec__.loader) is loader
    assert importlib.reload(module) is module


def test_several_wait_for_one(later):
    seen = []
    for number in range(3):
        on_import(later, lambda _, number=number: seen.append(number))
    importlib.import_module(later)
    assert sorted(seen) == [0, 1, 2]


def test_an_error_of_the_action_is_one_of_the_import(later):
    on_import(later, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(later)
    assert later not in sys.modules


def test_an_import_that_failed_may_be_tried_again(later, tmp_path):
    seen, path = [], tmp_path / f"{later}.py"
    path.write_text("import a_package_that_nobody_has\n")
    on_import(later, seen.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(later)
    path.write_text("value = 3, 4, 5, 6\n")
    importlib.invalidate_caches()
    assert importlib.import_module(later).value == (3, 4, 5, 6)
    assert [module.value for module in seen] == [(3, 4, 5, 6)]


def test_threads_that_import_at_once_see_it_done(later):
    seen, values = [], []
    on_import(later, lambda module: (seen.append(1), setattr(module, "value", 5)))
    start = threading.Barrier(4)

    def work():
        start.wait()
        values.append(importlib.import_module(later).value)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [5] * 4
    assert seen == [1]
