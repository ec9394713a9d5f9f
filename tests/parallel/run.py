# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201  (a script as well: it prints)
"""Run the cases on several processes of this machine, and print the differences to one process.

    python -m tests.parallel.run            2 and 4 processes, all cases, a table
    python -m tests.parallel.run --json 2   2 processes, a JSON line for the tests

Everything is imported once; the processes are forked, and talk by gloo on the CPU.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxPipeline, WanPipeline  # noqa: F401  (loaded late otherwise, in each)

from tests.parallel.cases import CASES, FOUR, MORE, World, run_all


def all_gather(stock: Any, tensors: list[Any], tensor: Any, group: Any = None) -> Any:
    """Gather unlike sizes too, as NCCL does and gloo does not: diffusers relies on it."""
    if all(each.shape == tensor.shape for each in tensors):
        stock(tensors, tensor, group=group)
        return
    for rank, each in enumerate(tensors):
        if rank == dist.get_rank(group):
            each.copy_(tensor)
        dist.broadcast(each, group_src=rank, group=group)


def process(rank: int, processes: int, folder: str, names: list[str]) -> None:
    """Be one of the processes; leave what was found, or what went wrong, in a file."""
    torch.set_num_threads(1)
    # Diffusers asks for the number of accelerators, and divides by it: a CPU has none.
    torch.accelerator.device_count = lambda: 1
    # It also gathers sizes there, and a build for CUDA names a GPU where there is none.
    torch.accelerator.current_accelerator = lambda *_, **__: None
    dist.all_gather = functools.partial(all_gather, dist.all_gather)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    mesh = dist.init_device_mesh("cpu", (1, processes), mesh_dim_names=("ring", "ulysses"))
    world = World(processes, mesh)
    answer: dict[str, Any] = {"rows": [], "error": None}
    try:
        run_all(world, names, answer["rows"])
    except BaseException:  # noqa: BLE001  (an assertion too: it is shown by the parent)
        name = names[len(answer["rows"])]
        answer["error"] = f"process {rank}, {name}:\n{traceback.format_exc()}"
    Path(folder, f"{rank}.json").write_text(json.dumps(answer), encoding="utf-8")


def run(processes: int, names: list[str]) -> list[dict[str, Any]]:
    """Fork, wait, and give the first process's rows; raises where any of them failed."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        started = [
            fork.Process(target=process, args=(rank, processes, folder, names))
            for rank in range(processes)
        ]
        for each in started:
            each.start()
        for each in started:
            each.join(300)
        for each in started:
            each.kill()
        answers = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("*.json"))
        ]
    errors = [answer["error"] for answer in answers if answer["error"]]
    if errors or len(answers) != processes:
        raise RuntimeError("\n".join(errors) or f"only {len(answers)} of {processes} ended")
    return list(answers[0]["rows"])


def main() -> None:
    if "--json" in sys.argv:
        processes = int(sys.argv[-1])
        names = [*CASES, *MORE] if processes == 2 else list(FOUR)
        print(json.dumps(run(processes, names)))
        return
    print("| case | processes | largest difference | over largest value | sparse from dense |")
    print("|---|---|---|---|---|")
    for processes, names in ((2, [*CASES, *MORE]), (4, list(FOUR))):
        for row in run(processes, names):
            if "largest" in row:
                moved = f"{row['sparse_moves']:.1e}" if "sparse_moves" in row else "-"
                found = f"{row['largest']:.1e} | {row['relative']:.1e}"
                print(f"| {row['case']} | {processes} | {found} | {moved} |")


if __name__ == "__main__":
    main()
