# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels run on a GPU where there is one, else through Triton's interpreter.

``TRITON_INTERPRET`` is read when a kernel is defined, so tests/conftest.py sets it before any
import; on a machine with a GPU the same tests run on it, bfloat16 too.

Random cases are counted and the number is printed at the end (not under xdist, whose workers keep
theirs). ``pytest tests/kernels/triton --examples 500`` is the long run.
"""

import inspect
import os
from collections import Counter
from functools import cache, wraps

import pytest

pytest.importorskip("triton")

CASES = pytest.StashKey[Counter]()


def patch_once():
    """Keep the interpreter from patching triton.language anew at every call inside a kernel.

    It does so for each device function, though the launch has patched the same modules: two
    fifths of its time (triton 3.9).
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    stock = interpreter._patch_lang

    @cache
    def languages(fn):
        tl = interpreter.tl
        return [each for each in fn.__globals__.values() if each is tl or each is tl.core]

    @wraps(stock)
    def patch(fn):
        patched = not any(is_builtin(language.load) for language in languages(fn))
        return None if patched else stock(fn)

    if inspect.isclass(getattr(interpreter, "_LangPatchScope", None)):
        interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once()


def pytest_collection_modifyitems(config, items):
    cases = config.stash.setdefault(CASES, Counter())
    for item in items:
        if "/kernels/triton/" not in str(item.path):
            continue
        # numpy's, from the interpreter: log2(0) and 0 / 0 are meant (rows with nothing kept).
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        if hasattr(item.obj, "hypothesis"):
            item.obj.hypothesis.inner_test = counted(item.obj.hypothesis.inner_test, cases)


def counted(test, cases):
    """Count the examples that a property passed."""

    @wraps(test)
    def run(*args, **kwargs):
        test(*args, **kwargs)
        cases[test.__name__] += 1

    return run


def pytest_terminal_summary(terminalreporter, config):
    if cases := config.stash.get(CASES, None):
        each = ", ".join(f"{name} {count}" for name, count in cases.items())
        terminalreporter.write_line(
            f"{cases.total()} random cases passed on Triton's kernels: {each}"
        )
