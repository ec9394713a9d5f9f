# SPDX-License-Identifier: Apache-2.0
"""Run scripts as torchrun does, but import torch and diffusers once for all of them.

    python -m tests.parallel.launch JOBS.json [MODULE ...]

Each job is a script, its arguments, a number of processes and a file for what they print. The
modules are imported before the processes are forked, so that this too is paid for once.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

import torch
from accelerate import PartialState  # noqa: F401  (from here on: loaded before the fork)
from accelerate.utils import gather_object  # noqa: F401
from diffusers import DiffusionPipeline, WanPipeline  # noqa: F401

from dit_sparse.profiler import profile  # noqa: F401
from dit_sparse.quality import psnr  # noqa: F401


def process(rank: int, job: dict, port: int) -> None:
    """Be one of the processes of a job."""
    torch.set_num_threads(1)
    if job["processes"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["processes"]),
            "LOCAL_WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    told = os.open(f"{job['told']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))  # as `python script.py` does
    runpy.run_path(job["script"], run_name="__main__")


def main() -> None:
    fork = multiprocessing.get_context("fork")
    for name in sys.argv[2:]:
        importlib.import_module(name)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [
            fork.Process(target=process, args=(r, job, port)) for r in range(job["processes"])
        ]
        for each in started:
            each.start()
        for each in started:
            each.join(240)
        for each in started:
            each.kill()


if __name__ == "__main__":
    main()
