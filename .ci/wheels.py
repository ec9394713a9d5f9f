# SPDX-License-Identifier: Apache-2.0
"""Build a wheel for every platform, and the sdist, into a folder (dist): ``make wheels``.

Each wheel is built from a copy of what git tracks, so nothing else gets into it. ziglang compiles
the native kernel, and what the library asks of glibc is compared with its wheel's tag.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from build_backend import native_build

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (2, 17)  # what manylinux2014 promises
CALL = "import build_backend, sys; build_backend.{}(sys.argv[1], {})"


def main() -> None:
    """Build all of them; the first that cannot be built ends it."""
    dist = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    dist.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--deduplicate"],  # noqa: S607
            cwd=ROOT, check=True, capture_output=True,
        ).stdout.decode()  # fmt: skip
        for target in (None, *native_build.TARGETS.values()):
            source = Path(temporary, target.name if target else "sdist")
            for name in tracked.split("\0")[:-1]:
                _copy(ROOT / name, source / name)
            path = _build(source, dist, target)
            if target is not None:
                _check(path)
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")  # noqa: T201


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        to.symlink_to(path.readlink())
    elif path.is_file():
        to.write_bytes(path.read_bytes())


def _build(source: Path, dist: Path, target: native_build.Target | None) -> Path:
    before = {path: path.stat().st_mtime_ns for path in dist.iterdir()}
    call = CALL.format("build_sdist", None)
    if target is not None:
        settings = {"--build-option": f"--plat-name={target.wheel}"}
        call = CALL.format("build_wheel", settings)
    subprocess.run(  # noqa: S603
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.ci'); {call}", str(dist)],
        cwd=source, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (made,) = (path for path in dist.iterdir() if before.get(path) != path.stat().st_mtime_ns)
    return made


def _check(wheel: Path) -> None:
    """Compare the newest glibc symbol that a library needs with the tag of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if "/native/lib/" in name)
        needed = re.findall(rb"GLIBC_(\d+)\.(\d+)", archive.read(library))
    newest = max(((int(a), int(b)) for a, b in needed), default=(0, 0))
    if newest > GLIBC:
        raise SystemExit(f"{wheel.name}: {library} needs glibc {newest}, the tag says {GLIBC}")


if __name__ == "__main__":
    main()
