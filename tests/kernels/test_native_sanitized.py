# SPDX-License-Identifier: Apache-2.0
"""The native kernel under the sanitizers: no undefined behaviour, no byte out of place."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

SETS = {"x86_64": ["avx2", "wide"], "aarch64": ["neon"]}

# Run in a process of its own, which has the sanitizers' runtime preloaded.
SCRIPT = """
import ctypes, sys
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from dit_sparse.kernels.canary import compare
from dit_sparse.kernels import native, native_library
from tests.plans import cases, inputs_for

library = ctypes.CDLL(sys.argv[1])
native_library.load = lambda: library
native.WORTH_A_THREAD = 1.0
torch.get_num_threads = lambda: 2
quiet = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))

@quiet
@given(cases(), st.sampled_from([1, 3, 8, 24, 40, 64]), st.sampled_from(list(native.DTYPES)),
       st.sampled_from(sys.argv[2:]))
def run(case, head_dim, dtype, name):
    plan, batch, heads, seed = case
    tensors = inputs_for(plan, batch, heads, head_dim, seed, dtype)
    scale = head_dim**-0.5
    output, lse = native.attend(*tensors, plan, scale, name)
    assert compare(*tensors, plan, scale, output, lse, native.EXP_ERROR) is None
    native.attend_with_mass(*tensors, plan, scale, name)
    if plan.q_permutation is None and plan.kv_permutation is None:
        native.block_mass(*tensors[:2], lse, plan.q, plan.kv, scale, name)
    tensors[1][:, 0] = torch.nan
    native.attend(*tensors, plan, scale, name)

run()
print("clean")
"""


@pytest.mark.slow
def test_no_sanitizer_finds_anything(root, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    sources = root / "dit_sparse/kernels/native"
    recipe = json.loads((sources / "build.json").read_text(encoding="utf-8"))
    machine = {"x86_64": "x86-64", "aarch64": "arm64"}[platform.machine()]
    # -O0: optimising the checks takes ten times as long as running them on these sizes.
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0"]
    objects = []
    for entry in recipe[machine]:
        output = tmp_path / f"{entry['object']}.o"
        subprocess.run(
            [
                compiler,
                *recipe["flags"],
                *entry["flags"],
                *flags,
                "-c",
                entry["source"],
                "-o",
                output,
            ],
            cwd=sources,
            check=True,
        )
        objects.append(output)
    library = tmp_path / "library.so"
    subprocess.run([compiler, *flags, "-shared", "-o", library, *objects], check=True)
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, library, *SETS[platform.machine()]],
        cwd=root,
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "PYTHONPATH": str(root),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"
