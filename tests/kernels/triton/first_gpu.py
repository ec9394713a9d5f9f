# SPDX-License-Identifier: Apache-2.0
"""The first six minutes on a GPU: do the kernels run, are they right, do they wait, how fast.

    python -m tests.kernels.triton.first_gpu -o first.json              (needs a GPU)
    TRITON_INTERPRET=1 python -m tests.kernels.triton.first_gpu --rehearse -o first.json

Run it before anything else on a kind of GPU that these kernels have not seen. It needs no network,
but torch with its Triton, numpy, pydantic, pytest and hypothesis. It has four parts, each with a
share of the time:

1. every kernel at real tiles against float64, one process per case, so that a case that hangs or
   crashes stops no other;
2. times beside torch's dense attention and the loop of Triton's tutorial;
3. every method's calls under torch's check for hidden synchronisation;
4. NVIDIA's memory checker on one case.

The file is written after every result. ``--rehearse`` takes the same path on a CPU with tiny sizes
and Triton's interpreter: it proves that the script runs, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from dit_sparse.attach.runtime import Runtime
from dit_sparse.bench.attention import make_plan
from dit_sparse.bench.shapes import Shape
from dit_sparse.bench.timing import dense_calls
from dit_sparse.core.call import AttentionCall
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.machine import environment
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.canary import Kind, check_kernel, check_lloyd
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.kernels.means import block_means
from dit_sparse.kernels.triton_target import forward_tiling, target_of
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method
from dit_sparse.strategy import Strategy
from dit_sparse.strategy.files import write_text

MODULE = "tests.kernels.triton.first_gpu"
TESTS = "tests/kernels/triton/test_triton_gpu.py"
CASE_SECONDS = 75  # a case that takes longer is killed
WORKERS = 16  # compilers at a time
DENSITIES = (1.0, 0.5, 0.25, 0.1)
KINDS = {
    "whole": Kind(128, 128, kv_spread=True),
    "uneven": Kind(128, 128, q_spread=False),
    "short": Kind(100, 37),
    "permuted": Kind(128, 128, q_permuted=True, kv_permuted=True, own=True),
    "weighted": Kind(128, 128, weighted=True),
    "cut": Kind(128, 128, cut=True),
    "means": Kind(128, 128, means=True),
    "everything": Kind(100, 96, q_spread=False, own=True, q_permuted=True, kv_permuted=True,
                       cut=True, means=True),
}  # fmt: skip
PROPERTIES = ("forward", "backward", "mass", "means", "kmeans")


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and a rehearsal.

    Args:
        device: Where.
        heads: Of the calls that are timed.
        grids: Of the calls that are timed: frames, rows, columns.
        head_dims: Of the cases.
        dtypes: Of the cases; the last one of those that are timed.
        kinds: Of plans.
        methods: Whose calls are watched.
    """

    device: str
    heads: int
    grids: tuple[tuple[int, int, int], ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    methods: tuple[str, ...]

    @property
    def tokens(self) -> list[int]:
        """Length of each timed sequence."""
        return [frames * height * width for frames, height, width in self.grids]


REAL = Sizes(
    "cuda", 8, ((8, 64, 64), (21, 45, 80)), (64, 128), ("float32", "float16", "bfloat16"),
    tuple(KINDS), tuple(METHODS),
)  # fmt: skip
TINY = Sizes(
    "cpu", 1, ((1, 8, 32),), (16,), ("float32",), ("whole", "means"), ("pooled", "centroid")
)


def cases(sizes: Sizes, *, rehearse: bool) -> dict[str, list[str]]:
    """Name every case and give the command of its process."""
    python = sys.executable
    found = {}
    shapes = product(sizes.dtypes, sizes.head_dims, sizes.kinds)
    for name in ("/".join(("plan", dtype, str(dim), kind)) for dtype, dim, kind in shapes):
        tiny = ["--rehearse"] if rehearse else []
        found[name] = [python, "-m", MODULE, "--case", name, *tiny]
    pytest = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if rehearse:
        pick = [f"{TESTS.replace('_gpu', '_means')}", "--examples", "2"]
        return found | {"property/means": [*pytest, *pick]}
    for dtype, dim in product(sizes.dtypes, sizes.head_dims):
        name = f"kmeans/{dtype}/{dim}"
        found[name] = [python, "-m", MODULE, "--case", name]
    for name in PROPERTIES:
        file = TESTS.replace("_gpu", f"_{name}" if name != "kmeans" else "_kmeans")
        found[f"property/{name}"] = [*pytest, file, "--examples", "4"]
    for name in ("hopper", "backward", "beyond_32_bits"):
        found[f"real/{name}"] = [*pytest, TESTS, "-k", name, "-m", "gpu"]
    return found


def run_case(name: str, device: str) -> str | None:
    """Run one case in this process; says what is wrong."""
    what, dtype, dim, *kind = name.split("/")
    place, kept = torch.device(device), (getattr(torch, dtype), int(dim))
    if what == "kmeans":
        from dit_sparse.kernels.triton_kmeans import lloyd

        return check_lloyd(lloyd, place, *kept)
    return check_kernel(kernel, place, *kept, KINDS[kind[0]])


def in_a_process(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a command; killed with all that it started when time is up."""
    began = perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        message = "" if process.returncode == 0 else said.strip()[-600:] or "no output"
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        message = f"killed after {seconds:.0f} s"
    return {"passed": not message, "seconds": round(perf_counter() - began, 1), "message": message}


def milliseconds(call: Any, device: str) -> float:
    """Time a call: by CUDA events and Triton's benchmark on a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=100))
    began = perf_counter()
    call()
    return 1e3 * (perf_counter() - began)


def timed_calls(sizes: Sizes, grid: LatentsGrid) -> dict[str, tuple[Any, float]]:
    """Name the calls that are timed on a grid; each with its density."""
    from tests.kernels.triton.dense import dense_launch

    random = torch.Generator().manual_seed(0)
    head_dim, scale = sizes.head_dims[-1], sizes.head_dims[-1] ** -0.5
    shape = Shape("first", grid, sizes.heads, head_dim)
    size = (3, 1, grid.tokens, sizes.heads, head_dim)
    qkv = torch.randn(size, generator=random)
    query, key, value = qkv.to(sizes.device, getattr(torch, sizes.dtypes[-1])).unbind(0)
    dense, _ = dense_calls(query, key, value, scale, flex=False)
    found: dict[str, tuple[Any, float]] = {name: (call, 1.0) for name, call in dense.items()}
    for density in DENSITIES:
        plan = make_plan(shape, 128, density, "random", random).to(sizes.device)
        own = partial(kernel.attend, query, key, value, plan, scale)
        found[f"triton {density:g}"] = own, float(plan.density().mean())
        if density == DENSITIES[0]:
            tiling = forward_tiling(target_of(query.device), query.dtype, head_dim, 128, 128)
            launch = dense_launch(query, key, value, torch.empty_like(query), tiling)
            found["triton's tutorial"] = launch.run, 1.0
    means = [block_means(x, plan) for x in (key, value)]
    output, lse = own()
    adding = partial(kernel.add_means, query, *means, plan.with_means(), scale, output, lse)
    found["means added"] = adding, 1 / 128
    for name in ("pooled", "composed", "centroid", "svg2", "xattention"):
        method = build_method(name, {})
        call = AttentionCall(
            query=query, key=key, value=value, grid=grid, heads=tuple(range(sizes.heads)),
            scale=scale, layer=0, step=1, num_steps=50, state={}, shared={},
        )  # fmt: skip
        found[f"planning {name}"] = partial(method.plan, call, Backends()), 0.0
    return found


def waits(name: str, sizes: Sizes) -> str:
    """Run a method's calls under torch's check for hidden waits; says what waited."""
    strategy = Strategy.coerce(name, **dict(method_class(name).example), dense_warmup_steps=0)
    grid = LatentsGrid(2, 8, 16, 6)
    runtime = Runtime(strategy, num_layers=1, num_heads=2)
    # Kernels are checked and static plans made in the first generation; a new one begins at 0.
    for i, step in enumerate((0, 1, 2, 0, 1, 2)):
        shape = (1, grid.tokens, 2, 64)
        qkv = [torch.randn(shape).to(sizes.device, torch.float16) for _ in range(3)]
        watched = i >= 4 and sizes.device == "cuda"
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            runtime.attend(*qkv, grid=grid, layer=0, step=step, num_steps=4)
        except Exception as error:  # noqa: BLE001  (of torch, or of a kernel)
            return f"step {step}: {str(error).strip()[-300:]}"
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode("default")
    return ""


class Results:
    """What was found so far, in a file that is written whole each time."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.began, self.seconds = path, monotonic(), seconds
        self.found: dict[str, Any] = {"kind": "dit_sparse.first_gpu", "environment": environment()}
        for part in ("cases", "times", "waits", "memory_checker"):
            self.found[part] = {}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (monotonic() - self.began)

    def add(self, part: str, name: str, result: Any) -> None:
        """Take a result in, print it, write the file."""
        self.found[part][name] = result
        self.found["seconds"] = round(monotonic() - self.began, 1)
        write_text(self.path, json.dumps(self.found, indent=1) + "\n")
        sys.stdout.write(f"{self.found['seconds']:6.1f} s  {part}: {name}: {result}\n")
        sys.stdout.flush()


def check_all(results: Results, sizes: Sizes, *, rehearse: bool, until: float) -> None:
    """Run all cases, some at a time; those that time does not reach are told so."""
    workers = min(WORKERS, os.cpu_count() or 1)

    def limited(command: list[str]) -> dict[str, Any]:
        seconds = min(CASE_SECONDS, results.left - until)
        if seconds < 1:
            return {"passed": None, "seconds": 0.0, "message": "no time left"}
        return in_a_process(command, seconds)

    with ThreadPoolExecutor(workers) as pool:
        commands = cases(sizes, rehearse=rehearse)
        jobs = {pool.submit(limited, command): name for name, command in commands.items()}
        for job in as_completed(jobs):
            results.add("cases", jobs[job], job.result())


def time_all(results: Results, sizes: Sizes, *, until: float) -> None:
    """Time every call on every grid; the rate counts the kept pairs alone."""
    for size in sizes.grids:
        grid = LatentsGrid(*size)
        for name, (call, density) in timed_calls(sizes, grid).items():
            row: dict[str, Any] = {"density": round(density, 4)}
            if results.left < until:
                row["fault"] = "no time left"
            else:
                try:
                    row["ms"] = milliseconds(call, sizes.device)
                except Exception as error:  # noqa: BLE001
                    row["fault"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if density and "ms" in row:
                products = 4 * grid.tokens**2 * sizes.head_dims[-1] * sizes.heads * density
                row["tflops"] = round(products / row["ms"] / 1e9, 1)
            results.add("times", f"{grid.tokens} tokens, {name}", row)


def main() -> None:
    """Do it all, or one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("first.json"))
    parser.add_argument("--seconds", type=float, default=350, help="to take at most")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, by the interpreter")
    parser.add_argument("--case", help="run this one in this process")
    args = parser.parse_args()
    sizes = TINY if args.rehearse else REAL
    if args.case is not None:
        wrong = run_case(args.case, sizes.device)
        raise SystemExit(wrong)
    results = Results(args.output, args.seconds)
    check_all(results, sizes, rehearse=args.rehearse, until=0.4 * args.seconds)
    time_all(results, sizes, until=0.15 * args.seconds)
    for name in sizes.methods:
        results.add("waits", name, waits(name, sizes) if results.left > 20 else "no time left")
    checker = shutil.which("compute-sanitizer")
    if checker is None or results.left < 15:
        why = "compute-sanitizer is not installed" if checker is None else "no time left"
        results.add("memory_checker", "plan", {"passed": None, "message": why})
    else:
        case = f"plan/float16/{sizes.head_dims[0]}/everything"
        command = [checker, "--error-exitcode", "9", sys.executable, "-m", MODULE, "--case", case]
        results.add("memory_checker", case, in_a_process(command, results.left - 5))
    failed = [name for name, each in results.found["cases"].items() if each["passed"] is False]
    waiting = [name for name, message in results.found["waits"].items() if message]
    sys.stdout.write(f"failed: {failed or 'none'}; host waits for the GPU: {waiting or 'none'}\n")


if __name__ == "__main__":
    main()
