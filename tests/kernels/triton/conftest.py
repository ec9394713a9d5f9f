# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels run on a GPU where there is one, else through Triton's interpreter.

``TRITON_INTERPRET`` is read when a kernel is defined, so tests/conftest.py sets it before any
import; on a machine with a GPU the same tests run on it, bfloat16 too.
"""

import pytest

pytest.importorskip("triton")


def pytest_collection_modifyitems(items):
    for item in items:
        if "/kernels/triton/" in str(item.path):
            # numpy's, from the interpreter: log2(0) and 0 / 0 are meant (rows with nothing kept).
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
