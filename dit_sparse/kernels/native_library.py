# SPDX-License-Identifier: Apache-2.0
"""Load the native CPU kernel's library, or give the reason why there is none.

A library is loaded only where it is whole, for this platform and of the sources beside it: what is
damaged or of another version may crash the process instead of raising.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from dit_sparse.errors import NativeUnavailable
from dit_sparse.kernels import native_build
from dit_sparse.kernels.native_build import FAILED, HOW, BuildError, name_parts

ABI_VERSION = 2  # of native/call.h
REBUILD = "rebuild it with `dit-sparse doctor --build`, or any make target in a checkout"


def load() -> ctypes.CDLL:
    """Return the library of this process, loaded once.

    Raises:
        NativeUnavailable: There is none, or not one that fits; the text is the reason.
    """
    library = _load(native_build.LIBRARIES)
    if isinstance(library, str):
        raise NativeUnavailable(library)
    return library


@cache
def _load(folder: Path) -> ctypes.CDLL | str:
    try:
        return _open(_choose(folder))
    except (NativeUnavailable, BuildError) as error:
        return str(error)
    except OSError as error:
        return f"the native library in {folder} cannot be read: {error}; {REBUILD}"


def _choose(folder: Path) -> Path:
    """Find this platform's library, built from the sources beside it, and whole."""
    target, sources = native_build.this_target(), native_build.source_hash()
    there = native_build.libraries(folder)
    fitting = [path for path in there if name_parts(path)[0] == target.name]
    if not fitting:
        raise NativeUnavailable(f"{_why_missing(folder, there, target.name)}; {HOW}")
    current = [path for path in fitting if name_parts(path)[1] == sources]
    if not current:
        raise NativeUnavailable(
            f"{fitting[-1]} was built from other sources ({name_parts(fitting[-1])[1]}; the "
            f"installed sources are {sources}); {REBUILD}"
        )
    whole = [path for path in current if name_parts(path)[2] == native_build.content_hash(path)]
    if not whole:
        raise NativeUnavailable(
            f"{current[-1]} is damaged: the digest of its content is "
            f"{native_build.content_hash(current[-1])}, which differs from its name; {REBUILD}"
        )
    return whole[-1]


def _why_missing(folder: Path, there: list[Path], target: str) -> str:
    failed = folder / FAILED
    if failed.is_file():
        lines = failed.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
        more = f" (full output: {failed})" if len(lines) > 1 else ""
        return f"building the native library failed: {lines[0]}{more}"
    if there:
        others = ", ".join(sorted({name_parts(path)[0] for path in there}))
        return f"{folder} has a native library for {others}, but this process needs {target}"
    return f"no native library for {target} in {folder}"


def _open(path: Path) -> ctypes.CDLL:
    """Load one library and compare what it states of itself with what is wanted."""
    try:
        library = ctypes.CDLL(str(path))
        library.dit_sparse_abi_version.restype = ctypes.c_int32
        library.dit_sparse_source_hash.restype = ctypes.c_char_p
        abi = library.dit_sparse_abi_version()
        sources = library.dit_sparse_source_hash().decode()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}; {REBUILD}") from error
    if (abi, sources) != (ABI_VERSION, name_parts(path)[1]):
        raise NativeUnavailable(
            f"{path} has another version: its interface is {abi} and its sources are {sources}, "
            f"expected {ABI_VERSION} and {name_parts(path)[1]}; {REBUILD}"
        )
    return library
