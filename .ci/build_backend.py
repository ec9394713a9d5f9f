# SPDX-License-Identifier: Apache-2.0
"""Setuptools, and the native CPU kernel beside it: built where a compiler is found.

``pip install .`` and ``pip install -e .`` succeed without a compiler: the torch kernel then runs,
and ``dit-sparse doctor`` gives the reason. A wheel for another platform (``bdist_wheel
--plat-name``, as in ``make wheels``) is an error without its library.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Command, build_meta
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve()
RECIPE = Path("dit_sparse", "kernels", "native_build.py")
Settings = dict[str, Any] | None


def _load_recipe() -> Any:
    """Load native_build.py alone: the package imports torch, which is not needed to build it."""
    spec = importlib.util.spec_from_file_location("native_build", HERE.parents[1] / RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native_build = _load_recipe()

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Ask for ziglang where no compiler works; see ``native_build.requirements``."""
    required: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    return required + native_build.requirements(Path("build"))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Ask for ziglang where no compiler works; see ``native_build.requirements``."""
    required: list[str] = build_meta.get_requires_for_build_editable(config_settings)
    return required + native_build.requirements(Path("build"))


class Build(build):
    """``build``, with the native library as its last part."""

    sub_commands = [*build.sub_commands, ("build_native", None)]


class BuildNative(Command):
    """Build the native library: into the package folder when editable, else into ``build_lib``."""

    description = "build the native CPU kernel"
    user_options = [("build-lib=", None, "folder to build into")]

    def initialize_options(self) -> None:
        """Set every option to its default."""
        self.build_lib: str | None = None
        self.editable_mode = False
        self.wheel_tag: str | None = None  # of another platform; None: this machine's library

    def finalize_options(self) -> None:
        """Take the folder from ``build``."""
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Build; without a library the installation goes on, a wheel for another platform not."""
        if not self.editable_mode:  # an earlier build's may be another platform's
            shutil.rmtree(self._folder(), ignore_errors=True)
        try:
            native_build.build(self._folder(), self._target())
        except native_build.BuildError as error:
            if self.wheel_tag is not None:
                raise
            self.warn(f"dit_sparse is installed without its native CPU kernel: {error}")

    def get_source_files(self) -> list[str]:
        """List what an sdist needs for this command."""
        root = HERE.parents[1]
        files = [HERE, *native_build.source_files()]
        return [path.relative_to(root).as_posix() for path in files]

    def get_outputs(self) -> list[str]:
        """List what was built into ``build_lib``."""
        return [] if self.editable_mode else [str(path) for path in self._folder().glob("*.*")]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is copied from a source: the library is made."""
        return {}

    def _folder(self) -> Path:
        if self.editable_mode:
            return Path(native_build.LIBRARIES)
        assert self.build_lib is not None
        inside = native_build.LIBRARIES.relative_to(HERE.parents[1])
        return Path(self.build_lib, inside).resolve()

    def _target(self) -> Any:
        if self.wheel_tag is None:
            return None
        return next(t for t in native_build.TARGETS.values() if t.wheel == self.wheel_tag)


class BdistWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: the library does not know Python."""

    def finalize_options(self) -> None:
        """Hand the platform on to ``build_native`` where it is one that is cross-built."""
        asked = self.plat_name
        self.distribution.has_ext_modules = lambda: True  # it holds a library: platlib
        super().finalize_options()
        if asked in {target.wheel for target in native_build.TARGETS.values()}:
            self.distribution.get_command_obj("build_native").wheel_tag = asked

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the platform's, without an interpreter's."""
        return "py3", "none", super().get_tag()[2]


class Sdist(sdist):
    """A source distribution, with this file."""

    def add_defaults(self) -> None:
        """Add this file and the native sources to what setuptools finds by itself."""
        super().add_defaults()
        self.filelist.extend(self.get_finalized_command("build_native").get_source_files())
