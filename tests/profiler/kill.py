# SPDX-License-Identifier: Apache-2.0
"""Kill searches at random moments, resume them, and compare with an unbroken one.

    python tests/profiler/kill.py --kills 20 --sequential none bands layers

The kills are shared among the named ways to measure. Each try is a forked process (imports are
paid once), killed with SIGKILL after a random part of the unbroken run's time. Prints a line for
each and one for all, and exits with 1 where a file differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from dit_sparse.profiler import Bands, Store, Wish, profile
from tests import tiny

UNITS, BANDS = 2, 2  # (prompt, seed), step bands
# Files of a finished search beside its setup and its strategy.
FILES = {"none": UNITS, "bands": UNITS * (1 + BANDS) + BANDS, "layers": UNITS}


def search(folder: Path, sequential: str) -> None:
    """Search with a store in ``folder`` and save the strategy there."""
    torch.set_num_threads(1)
    pipe, arguments = tiny.wan()
    tiny.stretch(pipe)
    pipe.set_progress_bar_config(disable=True)
    other = {**arguments, "prompt_embeds": tiny.normal(1, 512, 32, seed=9)}
    found = profile(
        pipe,
        [arguments, other],
        arguments={"num_inference_steps": 4},
        seeds=range(UNITS // 2),
        candidates="pooled:block_size=8:density=0.25,adaspa:density=0.4:block_size=8",
        bands=Bands((0.0, 0.5, 1.0)),
        wish=Wish(target=0.5),
        costs="assumed",
        check=False,
        sequential=sequential,
        store=Store(folder / "store"),
    )
    assert found is not None
    assert found.strategy.rules
    found.strategy.save(folder / "strategy.json")


def start(folder: Path, sequential: str) -> int:
    """Fork a search; the child never returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        search(folder, sequential)
        code = 0
    finally:
        os._exit(code)


def files(folder: Path) -> dict[str, bytes]:
    """Every file that was kept, hidden leftovers of a killed write left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def broken_searches(scratch: Path, sequential: str, wanted_kills: int, draw: random.Random) -> int:
    """Kill so many times; say how it went and give the number of searches that came out else."""
    whole = scratch / "whole"
    begun = time.monotonic()
    _, code = os.waitpid(start(whole, sequential), 0)
    took = time.monotonic() - begun
    assert code == 0
    wanted = files(whole)
    assert len(wanted) == FILES[sequential] + 2, sorted(wanted)
    kills = broken = rounds = 0
    while kills < wanted_kills:
        rounds += 1
        folder = scratch / f"killed-{rounds}"
        done = False
        while not done:
            child = start(folder, sequential)
            if kills < wanted_kills:
                time.sleep(draw.uniform(0, took))
                os.kill(child, signal.SIGKILL)  # ended or not: it is ours until waited for
            _, code = os.waitpid(child, 0)
            done = code == 0
            kills += os.WIFSIGNALED(code)
            assert done or os.WIFSIGNALED(code), code
        broken += files(folder) != wanted
    sys.stdout.write(f"{sequential}: {kills} kills, {rounds} searches, {broken} differ\n")
    return broken


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequential", nargs="+", choices=FILES, default=["none"])
    asked = parser.parse_args()
    draw, broken = random.Random(asked.seed), 0
    for number, sequential in enumerate(asked.sequential):
        kills = len(range(number, asked.kills, len(asked.sequential)))
        with tempfile.TemporaryDirectory() as scratch:
            broken += broken_searches(Path(scratch), sequential, kills, draw)
    sys.stdout.write(f"{asked.kills} kills, {broken} differ from the unbroken\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
