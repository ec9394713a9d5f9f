# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the names at the top break no import, the wheel holds what it must."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dit_sparse.kernels import native_build

LIBRARY_FOLDER = "dit_sparse/kernels/native/lib/"
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in native_build.COMPILERS),
    reason="needs a C++ compiler on PATH",
)
# What a library's state is for whoever imports the package.
STATE = """
from dit_sparse.errors import NativeUnavailable
from dit_sparse.kernels import native, native_library
try:
    print(native_library.load()._name, *native.instruction_sets())
except NativeUnavailable as error:
    print("no:", error)
"""
LINKS = ("kernels", "pipelines", "profiles")


def run(*arguments, cwd, timeout=900, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_to(source, root):
    """Copy what is packaged, so that the repository gets no build folders."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "lib")
    shutil.copytree(root / ".ci", source / ".ci", ignore=skip)
    shutil.copytree(root / "dit_sparse", source / "dit_sparse", ignore=skip)
    for name in LINKS:
        (source / name).symlink_to(source / "dit_sparse" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    return source


def build_wheel(source, out, **environment):
    build = ("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out))
    run("-m", "pip", *build, cwd=out, **environment)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(root, tmp_path_factory):
    source = copy_to(tmp_path_factory.mktemp("source") / "dit-sparse", root)
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; sys.path.insert(0, '.ci'); import build_backend; "
    run("-c", f"{code}build_backend.build_sdist({str(out)!r})", cwd=source)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build the wheel from the sdist, which must hold all that it takes."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


def library_of(wheel):
    """Name the one file in the folder of the native library."""
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.startswith(LIBRARY_FOLDER))
    return name


@pytest.mark.parametrize("name", LINKS)
def test_the_names_at_the_top_are_links(root, name):
    assert (root / name).is_symlink()
    assert (root / name).readlink() == Path("dit_sparse") / name
    assert (root / name).is_dir()


def test_kernels_shadows_nothing(root):
    # Transformers imports a PyPI package called `kernels`: docs/decisions/0001-package-layout.md.
    assert not (root / "dit_sparse" / "kernels" / "__init__.py").exists()


def test_repository_root_on_the_path_breaks_no_import(root):
    code = (
        "import sys; assert '' in sys.path;"
        "import diffusers; from diffusers import WanPipeline; import dit_sparse;"
        "print(dit_sparse.__file__)"
    )
    assert run("-c", code, cwd=root).strip() == str(root / "dit_sparse" / "__init__.py")


def test_versions_agree(root):
    text = (root / "dit_sparse" / "_version.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    assert importlib.metadata.version("dit-sparse") == version
    changes = (root / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {version}" in changes


def test_nothing_pulls_torchvision():
    wanted = importlib.metadata.requires("dit-sparse")
    assert not [line for line in wanted if line.startswith(("torchvision", "torchaudio"))]


def test_wheel_holds_the_package_and_nothing_else(root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = root / "dit_sparse"
    wanted = {
        path.relative_to(root).as_posix()
        for pattern in (
            "**/*.py",
            "**/templates/*",
            "profiles/*.json",
            "py.typed",
            "kernels/native/*.*",
        )
        for path in package.glob(pattern)
    }
    assert "dit_sparse/py.typed" in wanted
    assert any(name.startswith("dit_sparse/kernels/") for name in wanted)
    assert any(name.startswith("dit_sparse/profiles/") for name in wanted)
    wanted.add(library_of(wheel))
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "dit-sparse = dit_sparse.cli:main" in archive.read(entry).decode()
    code = "import dit_sparse, dit_sparse.kernels.reference as r; print(dit_sparse.__file__)"
    out = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.strip() == str(tmp_path / "site" / "dit_sparse" / "__init__.py")


def processors_sets():
    """Name what the kernel can use of this processor, best first, as Linux lists it."""
    flags = {*Path("/proc/cpuinfo").read_text(encoding="utf-8").split()}
    wide = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma"}
    needed = {"avx512": wide, "avx2": {"avx2", "fma"}, "neon": {"asimd"}}
    return [name for name, words in needed.items() if words <= flags]


def state_in(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return run("-c", STATE, cwd=folder, PYTHONPATH=str(folder)).strip()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc/cpuinfo")
def test_wheel_holds_a_native_library_that_loads(wheel, tmp_path):
    assert re.fullmatch(r"dit_sparse-.*-py3-none-(linux|macosx|win)_?\w+\.whl", wheel.name)
    state, *sets = state_in(wheel, tmp_path).split(" ")
    assert state == str(tmp_path / library_of(wheel))
    assert sets == processors_sets()


def test_a_wheel_is_built_without_a_compiler(root, tmp_path):
    # As `pip install .` on a machine without one: it succeeds, and the reason comes along.
    source = copy_to(tmp_path / "dit-sparse", root)
    (tmp_path / "out").mkdir()
    (tmp_path / "hidden").mkdir()  # Zig's compiler, where it is installed, is a package of Python
    (tmp_path / "hidden/sitecustomize.py").write_text("import sys; sys.modules['ziglang'] = None")
    hidden = {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": str(tmp_path / "hidden")}
    wheel = build_wheel(source, tmp_path / "out", **hidden)
    assert library_of(wheel) == f"{LIBRARY_FOLDER}failed.txt"
    state = state_in(wheel, tmp_path / "site")
    assert "no: building the native library failed: no C++ compiler found" in state
    assert "dit-sparse doctor --build" in state


def test_sdist_holds_the_sources_and_no_library(root, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {path.relative_to(root).as_posix() for path in native_build.source_files()}
    assert {".ci/build_backend.py", *native} <= names
    assert not [name for name in names if Path(name).suffix in {".so", ".dylib", ".dll"}]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc/cpuinfo")
def test_wheels_for_every_platform_of_which_one_loads_here(root, tmp_path):
    pytest.importorskip("ziglang", reason="needs ziglang: pip install -e '.[wheels]'")
    run(".ci/wheels.py", str(tmp_path), cwd=root, timeout=2400)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    wheels = {path.name.rpartition("-none-")[2]: path for path in tmp_path.glob("*.whl")}
    targets = native_build.TARGETS.values()
    assert set(wheels) == {f"{target.wheel}.whl" for target in targets}
    for target in targets:
        name = library_of(wheels[f"{target.wheel}.whl"])
        assert Path(name).name.startswith(f"{target.name}-{native_build.source_hash()}-")
        # Built elsewhere and later, it has the same bytes, whose digest is in the name. Two of the
        # five, whose formats hold a path and a time unless they are taken out.
        if target.name in {"macos-arm64", "windows-x86-64"}:
            assert native_build.build(tmp_path / "again", target).name == Path(name).name
    wheel = wheels[f"{native_build.this_target().wheel}.whl"]
    state, *sets = state_in(wheel, tmp_path / "site").split(" ")
    assert state == str(tmp_path / "site" / library_of(wheel))
    assert sets == processors_sets()


def test_one_version_of_ziglang(root):
    assert f'"{native_build.ZIGLANG}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
