# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the names at the top break no import, the wheel holds what it must."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LINKS = ("kernels", "pipelines", "profiles")


def run(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """Build a wheel from a copy, so that the repository gets no build folders."""
    source = tmp_path_factory.mktemp("source") / "dit-sparse"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(root / "dit_sparse", source / "dit_sparse", ignore=skip)
    for name in LINKS:
        (source / name).symlink_to(source / "dit_sparse" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = ("wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out))
    run("-m", "pip", *build, cwd=source)
    (path,) = out.glob("*.whl")
    return path


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
        for pattern in ("**/*.py", "profiles/*.json", "py.typed")
        for path in package.glob(pattern)
    }
    assert "dit_sparse/py.typed" in wanted
    assert any(name.startswith("dit_sparse/kernels/") for name in wanted)
    assert any(name.startswith("dit_sparse/profiles/") for name in wanted)
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "dit-sparse = dit_sparse.cli:main" in archive.read(entry).decode()
    code = "import dit_sparse, dit_sparse.kernels.reference as r; print(dit_sparse.__file__)"
    out = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.strip() == str(tmp_path / "site" / "dit_sparse" / "__init__.py")
