# SPDX-License-Identifier: Apache-2.0
"""Most memory that a sparse call takes beyond its tensors, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import torch

from dit_sparse.bench.result import PeakMemory

SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.bench import Shape, make_plan
from dit_sparse.core.grid import LatentsGrid

tokens, heads, head_dim, density, threads = map(float, sys.argv[1:6])
torch.set_num_threads(int(threads))

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

def memory():  # (now, peak, of mapped files) in bytes; elsewhere the peak so far stands for now
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return found, found, 0
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssFile"))

random = torch.Generator().manual_seed(0)
backends = Backends(sys.argv[6] or None)
for length in (512, int(tokens)):  # the first call loads libraries and makes the canary's check
    shape = Shape("", LatentsGrid(1, 1, length), int(heads), int(head_dim))
    plan = make_plan(shape, 128, density, "random", random)
    query, key, value = (torch.randn(1, length, int(heads), int(head_dim)) for _ in range(3))
    if CLEAR.exists():
        CLEAR.write_text("5")  # forget the peak of imports and of the canary
    before, _, code = memory()
    output, _ = backends.attend(query, key, value, plan, head_dim**-0.5)
_, peak, code_after = memory()  # code that the call was the first to touch is not its memory
print(backends.last_kernel, (peak - before - (code_after - code) - output.nbytes) / 2**20)
"""


def measure_peak_memory(
    tokens: int = 32_768,
    heads: int = 2,
    head_dim: int = 128,
    density: float = 0.25,
    threads: int | None = None,
    kernel: str | None = None,
) -> PeakMemory:
    """Measure, in a fresh process, what one sparse CPU call takes beyond its tensors.

    ``kernel`` names the CPU kernel; None: the one that would run.
    """
    threads = torch.get_num_threads() if threads is None else threads
    arguments = (tokens, heads, head_dim, density, threads, kernel or "")
    done = subprocess.run(  # noqa: S603 (our own script)
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    name, extra_mib = done.stdout.split()
    return PeakMemory(name, tokens, heads, head_dim, density, threads, float(extra_mib))
