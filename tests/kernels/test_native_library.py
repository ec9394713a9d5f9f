# SPDX-License-Identifier: Apache-2.0
"""The native kernel's library: built once, refused with its reason where it does not fit.

A library of a few lines stands in for the kernel, so that compiling it takes a moment.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dit_sparse
from dit_sparse.errors import KernelError, NativeUnavailable
from dit_sparse.forecast import doctor
from dit_sparse.kernels import native, native_build, native_library
from tests import tiny

SOURCE = """
#include <cstdint>
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int32_t dit_sparse_abi_version() { return %d; }
EXPORT const char* dit_sparse_source_hash() { return DIT_SPARSE_SOURCE_HASH; }
EXPORT int32_t dit_sparse_instruction_sets() { return %d; }
"""
ABI = native_library.ABI_VERSION
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in native_build.COMPILERS),
    reason="needs a C++ compiler on PATH",
)


def write_sources(folder, source=SOURCE % (ABI, 1)):
    entry = [{"source": "main.cpp", "object": "main", "flags": []}]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
    folder.mkdir(exist_ok=True)
    (folder / "build.json").write_text(
        json.dumps({"flags": flags, "x86-64": entry, "arm64": entry})
    )
    (folder / "main.cpp").write_text(source)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Let the recipe build and load the stand-in; the folder of its sources."""
    folder = tmp_path / "native"
    write_sources(folder)
    monkeypatch.setattr(native_build, "SOURCES", folder)
    monkeypatch.setattr(native_build, "LIBRARIES", folder / "lib")
    return folder


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(native_build, "find_spec", lambda name: None)


def refused(words):
    """Load, in a cache of its own, and expect a reason with ``words``."""
    native_library._load.cache_clear()
    with pytest.raises(NativeUnavailable, match=words) as raised:
        native_library.load()
    native_library._load.cache_clear()
    return str(raised.value)


def rename(library, content=None, sources=None):
    """Give a library the name that its content and ``sources`` would have."""
    if content is not None:
        library.write_bytes(content)
    target, old, _ = native_build.name_parts(library)
    digest = native_build.content_hash(library)
    return library.rename(library.with_name(f"{target}-{sources or old}-{digest}{library.suffix}"))


@needs_compiler
def test_built_once_and_loaded(sources):
    library = native_build.build()
    written = library.stat().st_mtime_ns
    native_library._load.cache_clear()
    assert native_library.load() is native_library.load()
    assert native.instruction_sets() == ["avx2"]
    assert doctor.native_state() == doctor.Native(str(library), ("avx2",))
    assert native_build.build() == library
    assert library.stat().st_mtime_ns == written
    assert [path.name for path in (sources / "lib").iterdir()] == [library.name]


@needs_compiler
def test_the_same_sources_give_the_same_bytes(sources, tmp_path):
    one, two = (native_build.build(tmp_path / name) for name in ("one", "two"))
    assert one.name == two.name
    assert str(tmp_path).encode() not in one.read_bytes()


@needs_compiler
def test_line_ends_do_not_change_the_digest(sources):
    before = native_build.source_hash()
    main = sources / "main.cpp"
    main.write_bytes(main.read_bytes().replace(b"\n", b"\r\n"))
    (sources / "main.cpp~").write_text("left by an editor")
    assert native_build.source_hash() == before


@needs_compiler
def test_builds_at_the_same_time_leave_one_library(sources):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: native_build.build(), range(4)))
    assert len(set(made)) == 1
    assert native_build.libraries(sources / "lib") == [made[0]]
    native_library._load.cache_clear()
    native_library.load()


def test_missing(sources):
    text = refused("no native library")
    assert str(sources / "lib") in text
    assert "dit-sparse doctor --build" in text
    assert issubclass(NativeUnavailable, KernelError)
    found = doctor.native_state()
    assert (found.library, found.reason) == (None, text)
    native_library._load.cache_clear()


def test_no_compiler_is_the_reason(sources, no_compiler):
    with pytest.raises(native_build.BuildError, match=r"no C\+\+ compiler found: c\+\+"):
        native_build.build()
    text = refused("ziglang is not installed")
    assert native_build.HOW in text


@needs_compiler
def test_what_the_compiler_printed_is_kept(sources):
    write_sources(sources, "int main( {")
    with pytest.raises(native_build.BuildError, match=r"main\.cpp"):
        native_build.build()
    kept = sources / "lib" / native_build.FAILED
    text = refused("building the native library failed")
    assert str(kept) in text
    assert len(text.splitlines()) == 1
    assert "int main( {" in kept.read_text()  # the line that the compiler shows
    write_sources(sources)
    assert [native_build.build()] == list((sources / "lib").iterdir())


@needs_compiler
def test_other_sources(sources):
    old = native_build.build()
    write_sources(sources, SOURCE % (ABI, 4))
    text = refused("was built from other sources")
    assert native_build.source_hash() in text
    assert str(old) in text
    new = native_build.build()
    assert native_build.libraries(sources / "lib") == [new]
    native_library._load.cache_clear()
    assert native.instruction_sets() == ["neon"]


@needs_compiler
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged(sources, part, damage):
    library = native_build.build()
    content = bytearray(library.read_bytes())
    at = int(part * len(content))
    if damage == "cut":
        del content[at:]
    else:
        content[at] ^= 1
    library.write_bytes(content)
    assert str(library) in refused("is damaged")
    assert native_build.build() == library  # building again mends it
    native_library._load.cache_clear()
    native_library.load()


@needs_compiler
def test_only_for_another_platform(sources):
    library = native_build.build()
    other = next(name for name in native_build.TARGETS if name not in library.name)
    library.rename(library.with_name(library.name.replace(library.stem.rsplit("-", 2)[0], other)))
    assert "this process needs" in refused(f"has a native library for {other}")


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="changes the header of an ELF file")
def test_wrong_architecture_under_the_right_name(sources):
    library = native_build.build()
    content = bytearray(library.read_bytes())
    (machine,) = struct.unpack_from("<H", content, 18)
    struct.pack_into("<H", content, 18, 183 if machine == 62 else 62)  # x86-64 <-> arm64
    assert str(rename(library, content)) in refused("cannot be loaded")


@needs_compiler
def test_another_interface_version(sources):
    write_sources(sources, SOURCE % (ABI + 1, 1))
    native_build.build()
    refused(f"has another version: its interface is {ABI + 1} .* expected {ABI}")


@needs_compiler
def test_another_kernels_library_under_our_name(sources):
    library = native_build.build()
    write_sources(sources, SOURCE % (ABI, 2))
    rename(library, sources=native_build.source_hash())
    refused("has another version: its interface is")


@needs_compiler
def test_a_library_of_something_else(sources):
    write_sources(sources, "int nothing_of_ours = 1;")
    native_build.build()
    refused("cannot be loaded: .*dit_sparse_abi_version")


def test_a_machine_that_the_kernel_is_not_written_for(sources, monkeypatch):
    monkeypatch.setattr(native_build.platform, "machine", lambda: "riscv64")
    refused("supports linux-x86-64.*; this is 64-bit Python on .* riscv64")
    assert native_build.requirements(sources) == []


@needs_compiler
def test_nothing_is_fetched_where_a_compiler_works(sources):
    assert native_build.requirements(sources) == []


def test_ziglang_is_required_only_where_it_can_be_had(sources, no_compiler, monkeypatch, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = native_build.ZIGLANG.replace("==", "-")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert native_build.requirements(tmp_path / "build") == []
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as archive:
        version = native_build.ZIGLANG.partition("==")[2]
        archive.writestr(
            f"{name}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: ziglang\nVersion: {version}\n",
        )
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    (required,) = native_build.requirements(tmp_path / "build")
    assert required.startswith("ziglang @ file:///")
    assert Path(required.partition("file://")[2]).is_file()


@needs_compiler
def test_the_kernel_exports_its_own_names_and_needs_no_cpp_runtime():
    library = native_build.build()  # there already, where dit_sparse is installed from a checkout
    content = library.read_bytes()
    assert b"libstdc++.so" not in content
    assert b"libgcc_s.so" not in content
    if shutil.which("nm") and sys.platform == "linux":
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
        ).stdout
        names = {line.split()[-1] for line in listed.splitlines()}
        assert "dit_sparse_abi_version" in names
        assert all(name.startswith("dit_sparse_") for name in names)


def test_without_a_library_the_first_use_and_the_report_say_so(tmp_path, monkeypatch):
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(native_build, "LIBRARIES", tmp_path)
    with dit_sparse.sparse_attention(pipe, "pooled", density=0.5, block_size=8) as handle:
        with pytest.warns(
            UserWarning, match=r"slower torch kernel, .* no native library for"
        ) as seen:
            tiny.run(pipe, args)
        report = handle.report()
        assert "dit-sparse doctor --build" in report.native_missing
        assert report.native_missing in str(seen[0].message)
        assert len(seen) == 1
        assert "cpu" in report.kernels
        assert f"the native CPU kernel was not used: {report.native_missing}" in report.summary()
        tiny.run(pipe, args)  # said once
    with pytest.raises(KernelError, match="no native library"):
        dit_sparse.enable(pipe, "pooled", kernel="native", density=0.5, block_size=8)
    monkeypatch.undo()
    if native.missing():
        return
    with dit_sparse.sparse_attention(pipe, "pooled", density=0.5, block_size=8) as handle:
        tiny.run(pipe, args)
        assert not handle.report().native_missing
