# SPDX-License-Identifier: Apache-2.0
"""Stand-in until the real loader is merged: loads a library built by hand."""

from __future__ import annotations

import ctypes
from functools import cache

from dit_sparse.errors import NativeUnavailable


@cache
def load() -> ctypes.CDLL:
    """Load the compiled kernel; ``NativeUnavailable`` says why it cannot be loaded."""
    try:
        return ctypes.CDLL("/tmp/k/lib.so")
    except OSError as error:
        raise NativeUnavailable(f"the native library does not load: {error}") from error
