# SPDX-License-Identifier: Apache-2.0
"""The native kernel's NEON code, compiled by ziglang and run under qemu's user emulation."""

import ctypes
import json
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import native
from dit_sparse.kernels.canary import compare
from tests.plans import cases, inputs_for

CASES = 150
POINTERS = [name for name, kind in native._Call._fields_ if kind is native._Pointer]


@pytest.fixture(scope="module")
def program(root, tmp_path_factory):
    """Compile the kernel with a program that runs calls from a file; its command."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None or find_spec("ziglang") is None:
        pytest.skip("needs qemu-aarch64 (qemu-user) and ziglang")
    sources = root / "dit_sparse/kernels/native"
    recipe = json.loads((sources / "build.json").read_text(encoding="utf-8"))
    folder, flags = tmp_path_factory.mktemp("neon"), [f for f in recipe["flags"] if f != "-fPIC"]
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    objects = []
    runner = {"source": root / "tests/kernels/run_calls.cpp", "object": "run_calls", "flags": []}
    for entry in (*recipe["arm64"], runner):
        objects.append(folder / f"{entry['object']}.o")
        command = [*zig, *flags, *entry["flags"], '-DDIT_SPARSE_SOURCE_HASH="0"', f"-I{sources}"]
        command += ["-c", entry["source"], "-o", objects[-1]]
        subprocess.run(command, cwd=sources, check=True)
    made = folder / "run_calls"
    subprocess.run([*zig, "-static", "-o", made, *objects], check=True)
    return [emulator, made]


def call_of(tensors, plan, scale):
    """Describe a call as ``native._attend`` does; the call, its output and LSE, and the plan's."""
    batch, tokens, heads, _ = tensors[0].shape
    output, lse = torch.full_like(tensors[0], 7.0), torch.full((batch, heads, tokens), 7.0)
    call, held = native._lay_out(plan)
    native._describe(call, *tensors, output, lse, None, scale)
    call.instruction_set = native.INSTRUCTION_SETS["neon"]
    return call, output, lse, held


def write(call, tensors):
    """Give the bytes of a call and its memory, and where each tensor is in that."""
    memory, places = bytearray(), {}
    for tensor in tensors:
        memory += bytes(-len(memory) % 64)
        places[tensor.data_ptr()] = len(memory)
        memory += ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    moved = native._Call.from_buffer_copy(call)
    for name in POINTERS:
        if address := getattr(call, name):
            setattr(moved, name, places[address] + 1)
    return bytes(moved) + struct.pack("<q", len(memory)) + memory, places, len(memory)


def read(memory, place, tensor):
    data = memory[place : place + tensor.numel() * tensor.element_size()]
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)


@pytest.mark.slow
def test_neon_stays_within_twice_the_plain_error(program, tmp_path):
    calls, data = [], b""

    @settings(
        max_examples=CASES, database=None, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        cases(),
        st.sampled_from([1, 3, 8, 17, 24, 48, 64, 72, 128]),
        st.sampled_from(list(native.DTYPES)),
    )
    def collect(case, head_dim, dtype):
        nonlocal data
        plan, batch, heads, seed = case
        scale = head_dim**-0.5
        tensors = [x.contiguous() for x in inputs_for(plan, batch, heads, head_dim, seed, dtype)]
        call, output, lse, held = call_of(tensors, plan, scale)
        text, places, size = write(call, [*tensors, output, lse, *held])
        data += text
        calls.append((tensors, plan, scale, output, lse, places, size))

    collect()
    file, answer = tmp_path / "calls", tmp_path / "answer"
    file.write_bytes(struct.pack("<qq", len(calls), ctypes.sizeof(native._Call)) + data)
    subprocess.run([*program, file, answer], check=True, timeout=500)
    left = answer.read_bytes()
    for tensors, plan, scale, output, lse, places, size in calls:
        (result,), memory, left = (
            struct.unpack("<i", left[:4]),
            left[4 : 4 + size],
            left[4 + size :],
        )
        assert result == native.DONE
        got = [read(memory, places[each.data_ptr()], each) for each in (output, lse)]
        assert compare(*tensors, plan, scale, *got, native.EXP_ERROR) is None
    assert not left
    assert len(calls) >= CASES
