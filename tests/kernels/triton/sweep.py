# SPDX-License-Identifier: Apache-2.0
"""Time every tiling of the forward kernels on the GPU at hand: which is fastest, by how much.

    python tests/kernels/triton/sweep.py -o sweep.json                (needs a GPU; some minutes)
    TRITON_INTERPRET=1 python tests/kernels/triton/sweep.py --smoke   (no GPU: does it run at all)

``triton_target.py`` chooses by what compilers say of chips that were not there; this asks the
chip. First, processes of their own run all variants once, so that their code is in Triton's cache:
compiling is what takes long. Then, shape by shape, each variant is compared with the default one
on the same inputs (which the GPU tests compare with float64), timed in turn with torch's dense
attention, and told as (dense time x density) / sparse time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from dit_sparse.bench.attention import make_plan
from dit_sparse.bench.shapes import Shape
from dit_sparse.bench.timing import Clock, alternate, dense_calls
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.machine import environment
from dit_sparse.kernels import triton_attention as kernel
from dit_sparse.kernels.triton_target import Tiling

WORKERS = 12  # compilers at a time


@dataclass(frozen=True)
class Case:
    """What variants are compared on."""

    head_dim: int
    block: int
    dtype: str = "bfloat16"
    grid: tuple[int, int, int] = (1, 128, 256)  # 32,768 tokens
    heads: int = 8
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    repeats: int = 5


CASES = tuple(Case(head_dim, block) for head_dim, block in product((64, 128), (64, 128)))
SMOKE = (Case(64, 64, "float32", (1, 4, 32), 1, (0.5,), 1),)


def variants(case: Case) -> list[Tiling]:
    """List tilings that fit a block; registers and shared memory rule out the rest by failing."""
    found = [
        Tiling(m, n, warps, stages)
        for m, n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        if max(m, n) <= case.block
    ]
    found += [
        Tiling(m, n, warps, stages, copy_engine=True, specialize=specialize)
        for m, n, warps, stages, specialize in product(
            (64, 128), (64, 128), (4, 8), (2, 3), (False, True)
        )
        if max(m, n) <= case.block
    ]
    return found


def inputs(case: Case, device: torch.device) -> tuple[Any, list[Any]]:
    """Make query, key and value, and a plan for each density."""
    random = torch.Generator().manual_seed(0)
    shape = Shape("sweep", LatentsGrid(*case.grid), case.heads, case.head_dim)
    size = (3, 1, shape.tokens, case.heads, case.head_dim)
    qkv = torch.randn(size, generator=random).to(device, getattr(torch, case.dtype))
    plans = [make_plan(shape, case.block, d, "random", random).to(device) for d in case.densities]
    return qkv.unbind(0), plans


def compile_variant(case: Case, tiling: Tiling, device: str) -> str | None:
    """Run a variant once on each plan, so that its code is in the cache; says what fails."""
    try:
        qkv, plans = inputs(case, torch.device(device))
        for plan in plans:
            kernel.attend(*qkv, plan, case.head_dim**-0.5, tiling)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  (compilers and drivers raise anything)
        return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    return None


def compile_all(cases: tuple[Case, ...], device: str, workers: int) -> dict[Any, str | None]:
    """Compile all variants; what failed, by (case, tiling)."""
    jobs = [(case, tiling) for case in cases for tiling in variants(case)]
    if workers < 2:
        return {job: compile_variant(*job, device) for job in jobs}
    faults: dict[Any, str | None] = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(compile_variant, *job, device): job for job in jobs}
        for future in as_completed(futures):
            try:
                faults[futures[future]] = future.result()
            except Exception as error:  # noqa: BLE001, PERF203  (a compiler took its process along)
                faults[futures[future]] = type(error).__name__
    return faults


def measure(case: Case, device: torch.device, faults: dict) -> list[dict]:
    """Time the default and all variants of a case; one row a density and tiling."""
    (query, key, value), plans = inputs(case, device)
    scale = case.head_dim**-0.5
    clock = Clock.of(device)
    rows = []
    for plan in plans:
        calls, _ = dense_calls(query, key, value, scale)
        dense_names = list(calls)
        default = kernel.default_tiling(query, key, value, plan)
        wanted = kernel.attend(query, key, value, plan, scale)[0].float()
        spread = float(wanted.std())
        own = {}
        for tiling in dict.fromkeys((default, *variants(case))):
            row = {"head_dim": case.head_dim, "block": case.block, "dtype": case.dtype}
            row |= asdict(tiling)
            row |= {"density": float(plan.density().mean()), "default": tiling == default}
            row["fault"] = faults.get((case, tiling))
            rows.append(row)
            if row["fault"] is None:
                try:
                    made = kernel.attend(query, key, value, plan, scale, tiling)[0].float()
                except Exception as error:  # noqa: BLE001
                    row["fault"] = (str(error).strip().splitlines() or [""])[0][:200]
                    continue
                # Two rounding orders of one sum: a few units of bfloat16, never a whole key.
                if not bool(((made - wanted).abs() <= 0.05 * spread).all()):
                    row["fault"] = "differs from the default tiling"
                    continue
                own[str(id(row))] = row

                def call(plan: Any = plan, tiling: Tiling = tiling) -> object:
                    return kernel.attend(query, key, value, plan, scale, tiling)

                calls[str(id(row))] = call
        times = alternate(calls, case.repeats, clock)
        dense = min(dense_names, key=times.__getitem__)
        for name, row in own.items():
            row |= {"ms": times[name], "dense_ms": times[dense], "dense": dense}
            row["efficiency"] = times[dense] * row["density"] / times[name]
    return rows


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tell(rows: list[dict]) -> None:
    """Print the default and the three best of each case and density."""
    for key in dict.fromkeys((r["head_dim"], r["block"], r["density"]) for r in rows):
        here = [r for r in rows if (r["head_dim"], r["block"], r["density"]) == key and "ms" in r]
        best = sorted(here, key=lambda row: row["ms"])
        say(f"head_dim {key[0]}, blocks of {key[1]}, density {key[2]:.3f}:")
        for row in [*(r for r in here if r["default"]), *best[:3]]:
            kind = "copy engine" if row["copy_engine"] else "pointers"
            kind += ", specialized" if row["specialize"] else ""
            name = "default" if row["default"] else "best"
            say(
                f"  {name:7} {row['block_m']}x{row['block_n']}, {row['warps']} warps, "
                f"{row['stages']} stages, {kind}: {row['ms']:.3f} ms, {row['efficiency']:.2f} of "
                f"{row['dense']}"
            )


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="start no case after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU's interpreter")
    args = parser.parse_args()
    started = monotonic()
    cases, device = (SMOKE, "cpu") if args.smoke else (CASES, "cuda")
    workers = 1 if args.smoke else min(WORKERS, os.cpu_count() or 1)
    faults = compile_all(cases, device, workers)
    say(f"{len(faults)} variants compiled in {monotonic() - started:.0f} s")
    rows: list[dict] = []
    for case in cases:
        if monotonic() - started > args.seconds:
            say(f"no time left for {case}")
            continue
        rows += measure(case, torch.device(device), faults)
        if args.output is not None:  # after every case: what is cut off has its beginning
            told = {"kind": "dit_sparse.sweep", "environment": environment(), "rows": rows}
            args.output.write_text(json.dumps(told, indent=1) + "\n")
    tell(rows)


if __name__ == "__main__":
    main()
