# SPDX-License-Identifier: Apache-2.0
"""Build the native CPU kernel: one shared library, by the first C++ compiler that can.

This file runs while dit_sparse is being installed: it imports the standard library only.
``native/build.json`` lists what is compiled. The library is called ``TARGET-SOURCES-CONTENT.so``,
after the digests of its sources and of its own bytes: a stale or damaged one is recognised before
it is loaded, and a new one never overwrites a file that another process has mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).with_name("native")
LIBRARIES = SOURCES / "lib"  # where an installation keeps its library; git ignores it
FAILED = "failed.txt"  # in LIBRARIES: why there is no library, with the compilers' output
ZIGLANG = "ziglang==0.17.1"  # a C++ compiler in a wheel, for machines without one
HOW = "install a C++ compiler, or `pip install ziglang`, then run `dit-sparse doctor --build`"
COMPILERS = ("c++", "g++", "clang++", "cc")
DIGITS = 12  # hexadecimal, of each digest in a file name
TIMEOUT = 1800  # seconds for one compiler run: a hanging compiler must not hang an installation
# Standard headers that the kernel uses: a compiler without them is none.
PROBE = "#include <cmath>\n#include <cstdint>\n#include <cstring>\nint dit_sparse_probe;\n"


class BuildError(RuntimeError):
    """No library could be built; the first line of the text is the summary."""


class Target(NamedTuple):
    """A platform: its key in build.json, Zig's name for it, and the tag of its wheel."""

    name: str
    architecture: str
    zig: str
    suffix: str
    wheel: str


TARGETS = {
    target.name: target
    for target in (
        # Zig links against the stubs of glibc 2.17, the oldest that manylinux2014 promises.
        Target("linux-x86-64", "x86-64", "x86_64-linux-gnu.2.17", ".so", "manylinux2014_x86_64"),
        Target("linux-arm64", "arm64", "aarch64-linux-gnu.2.17", ".so", "manylinux2014_aarch64"),
        Target("macos-x86-64", "x86-64", "x86_64-macos.11.0", ".dylib", "macosx_11_0_x86_64"),
        Target("macos-arm64", "arm64", "aarch64-macos.11.0", ".dylib", "macosx_11_0_arm64"),
        Target("windows-x86-64", "x86-64", "x86_64-windows-gnu", ".dll", "win_amd64"),
    )
}


def this_target() -> Target:
    """Return the target of this process; raises ``BuildError`` where there is none."""
    systems = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}
    machines = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "arm64", "aarch64": "arm64"}
    system, machine = platform.system(), platform.machine()
    name = f"{systems.get(system)}-{machines.get(machine.lower())}"
    bits = 64 if sys.maxsize > 2**32 else 32
    if name not in TARGETS or bits != 64:
        raise BuildError(
            f"the native kernel supports {', '.join(TARGETS)}; this is {bits}-bit Python on "
            f"{system} {machine}"
        )
    return TARGETS[name]


def source_files() -> list[Path]:
    """List everything that is compiled, and build.json."""
    return sorted(p for p in SOURCES.iterdir() if p.suffix in {".cpp", ".h", ".json"})


def source_hash() -> str:
    """Return the digest of everything that is compiled, the same for either kind of line end."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.name}\0".encode())
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:DIGITS]


def content_hash(library: Path) -> str:
    """Return the digest of a library's bytes, the last part of its name."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:DIGITS]


def name_parts(library: Path) -> tuple[str, str, str]:
    """Split a library's name into target, digest of the sources, digest of its content."""
    target, sources, content = library.stem.rsplit("-", 2)
    return target, sources, content


def libraries(folder: Path) -> list[Path]:
    """List all libraries in a folder, whatever target or sources they are of."""
    return sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in {".so", ".dylib", ".dll"} and path.stem.count("-") >= 2
    )


def build(folder: Path | None = None, target: Target | None = None) -> Path:
    """Build the library for ``target`` (default: this machine) unless ``folder`` has it already.

    Compilers of this machine build for it alone; ziglang builds for every target.

    Returns:
        The library; older ones of the same target are removed.

    Raises:
        BuildError: None of the compilers could; ``folder/failed.txt`` has what they printed.
    """
    native = target is None
    folder = folder or LIBRARIES
    try:
        target = target or this_target()
        library = _present(folder, target) or _compile(folder, target, native=native)
    except (BuildError, OSError) as error:
        text = str(error)
        with suppress(OSError):  # a folder that cannot be written is what the error says
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILED).write_text(f"{text}\n", encoding="utf-8")
        raise BuildError(text) from error
    for path in [folder / FAILED, *libraries(folder)]:
        if path != library and (path.name == FAILED or name_parts(path)[0] == target.name):
            _remove(path)
    return library


def requirements(folder: Path) -> list[str]:
    """Name the packages that building needs: ziglang where no compiler of this machine works.

    An installation must not fail because ziglang cannot be fetched. Pip is therefore asked for it
    here, into ``folder``, and nothing is required where it has none to give.
    """
    try:
        target = this_target()
    except BuildError:
        return []
    if any(_works(compiler, target) for compiler in _compilers(native=True)):
        return []
    pip = [sys.executable, "-I", "-m", "pip"]  # -I: the caller's pip, not the isolated build's
    if not _succeeds([*pip, "--version"]):
        return [ZIGLANG]  # installed by something else than pip, which has to fetch it
    options = ("--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=15", "-qq")
    command = [*pip, "--disable-pip-version-check", "download", *options, ZIGLANG]
    if not _succeeds([*command, "-d", str(folder.resolve())]):
        return []
    wheel = next(folder.glob(f"{ZIGLANG.replace('==', '-')}-*.whl"))
    return [f"ziglang @ {wheel.resolve().as_uri()}"]


def _present(folder: Path, target: Target) -> Path | None:
    """Return the library that a build would make, where it is there and whole."""
    for path in libraries(folder):
        name, sources, content = name_parts(path)
        if (name, sources) == (target.name, source_hash()) and content == content_hash(path):
            return path
    return None


def _compilers(*, native: bool) -> Iterator[list[str]]:
    """Yield the commands that may compile C++, this machine's own first."""
    seen = set()
    for name in COMPILERS if native else ():
        path = shutil.which(name)
        if path and os.path.realpath(path) not in seen and not _is_stub(path):
            seen.add(os.path.realpath(path))
            yield [path]
    if find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "c++"]


def _is_stub(path: str) -> bool:
    """Whether this is macOS's placeholder, which opens a window that offers to install Xcode."""
    if platform.system() != "Darwin" or not path.startswith("/usr/bin/"):
        return False
    return not _succeeds(["xcode-select", "-p"])


def _compile(folder: Path, target: Target, *, native: bool) -> Path:
    outputs = []
    folder.mkdir(parents=True, exist_ok=True)
    for compiler in _compilers(native=native):
        # In the same folder, so that the finished library moves into place in one step.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
            try:
                built = _compile_with(compiler, target, Path(temporary))
            except BuildError as error:
                outputs.append(str(error))
                continue
            name = f"{target.name}-{source_hash()}-{content_hash(built)}{target.suffix}"
            return built.replace(folder / name)
    if not outputs:
        tried = "" if not native else f"{', '.join(COMPILERS)} are not on PATH and "
        raise BuildError(f"no C++ compiler found: {tried}ziglang is not installed")
    summary = "; ".join(output.splitlines()[0] for output in outputs)
    raise BuildError("\n\n".join([summary, *outputs]))


def _compile_with(compiler: list[str], target: Target, folder: Path) -> Path:
    """Compile every object of build.json in parallel, then link them."""
    recipe = _recipe()
    common = [*recipe["flags"], f'-DDIT_SPARSE_SOURCE_HASH="{source_hash()}"']
    common += _target_flags(compiler, target)
    objects = [folder / f"{entry['object']}.o" for entry in recipe[target.architecture]]
    commands = [
        [*compiler, *common, *entry["flags"], "-c", entry["source"], "-o", str(output)]
        for entry, output in zip(recipe[target.architecture], objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = folder / f"library{target.suffix}"
    _run([*_linker(compiler, target), "-o", str(library), *map(str, objects)])
    if target.suffix == ".dll":
        _clear_time(library)
    return library


def _clear_time(library: Path) -> None:
    """Zero the time of linking in a Windows library's header: equal builds, equal bytes."""
    content = bytearray(library.read_bytes())
    header = int.from_bytes(content[60:64], "little")  # PE signature, machine, sections, time
    content[header + 8 : header + 12] = bytes(4)
    library.write_bytes(content)


def _works(compiler: list[str], target: Target) -> bool:
    """Whether a compiler takes all flags of build.json and links: a moment, nothing is kept."""
    recipe = _recipe()
    flags = [*recipe["flags"], *_target_flags(compiler, target)]
    flags += [flag for entry in recipe[target.architecture] for flag in entry["flags"]]
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary, "probe.cpp"), Path(temporary, "probe.o")
        source.write_text(PROBE, encoding="utf-8")
        flags = [flag for flag in flags if not flag.startswith("-D")]
        compiled = _succeeds([*compiler, *flags, "-c", str(source), "-o", str(output)])
        link = [*_linker(compiler, target), "-o", f"{output}.library", str(output)]
        return compiled and _succeeds(link)


def _recipe() -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((SOURCES / "build.json").read_text(encoding="utf-8"))
    return recipe


def _target_flags(compiler: list[str], target: Target) -> list[str]:
    # Zig compiles for the very processor it runs on unless it is given a target.
    return ["-target", target.zig] if "ziglang" in compiler else []


def _linker(compiler: list[str], target: Target) -> list[str]:
    """Return the command that links: nothing of C++'s own library is needed when it is loaded."""
    # Without a name of its own a macOS library carries the path that it is linked at.
    named = ["-Wl,-install_name,dit_sparse.dylib"] if target.name.startswith("macos") else []
    if "ziglang" in compiler:
        # As C: no object needs anything of libc++, which Zig would compile first.
        return [*compiler[:-1], "cc", "-target", target.zig, "-shared", "-s", *named]
    if target.name.startswith("macos"):
        return [*compiler, "-shared", *named]
    static = ["-static"] if target.name.startswith("windows") else []
    return [
        *compiler, "-shared", "-s", *static, "-static-libgcc", "-static-libstdc++",
        *(["-Wl,--build-id=none", "-Wl,--exclude-libs,ALL"] if not static else []),
    ]  # fmt: skip


def _succeeds(command: list[str]) -> bool:
    try:
        _run(command)
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603  (compilers found on PATH, with our own flags)
            command,
            cwd=SOURCES,  # sources are named relatively: no path of this machine in the library
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stdout.splitlines()
        said = next((line for line in lines if "error" in line.lower()), " ".join(lines[:1]))
        raise BuildError(
            f"{command[0]} failed ({said.strip()})\n{subprocess.list2cmdline(command)}\n"
            f"{done.stdout}"
        )


def _remove(path: Path) -> None:
    # Windows keeps a library that a process has loaded; the next build removes it.
    with suppress(OSError):
        path.unlink(missing_ok=True)
