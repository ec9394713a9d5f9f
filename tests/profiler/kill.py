# SPDX-License-Identifier: Apache-2.0
"""Kill searches at random moments, resume them, and compare with an unbroken one.

    python tests/profiler/kill.py --kills 20

Each try is a forked process (imports are paid once), killed with SIGKILL after a random part of
the unbroken run's time. Prints one line and exits with 1 where a file differs.
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

UNITS = 2  # (prompt, seed)


def search(folder: Path) -> None:
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
        store=Store(folder / "store"),
    )
    assert found is not None
    assert found.strategy.rules
    found.strategy.save(folder / "strategy.json")


def start(folder: Path) -> int:
    """Fork a search; the child never returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        search(folder)
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


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        begun = time.monotonic()
        _, code = os.waitpid(start(whole), 0)
        took = time.monotonic() - begun
        assert code == 0
        wanted = files(whole)
        kills = finished = broken = rounds = 0
        while kills < asked.kills:
            rounds += 1
            folder = Path(scratch, f"killed-{rounds}")
            done = False
            while not done:
                child = start(folder)
                if kills < asked.kills:
                    time.sleep(draw.uniform(0, took))
                    os.kill(child, signal.SIGKILL)  # ended or not: it is ours until waited for
                _, code = os.waitpid(child, 0)
                done = code == 0
                kills += os.WIFSIGNALED(code)
                assert done or os.WIFSIGNALED(code), code
            finished += 1
            broken += files(folder) != wanted
    sys.stdout.write(f"{kills} kills, {finished} searches, {broken} differ from the unbroken\n")
    return 1 if broken or len(wanted) != UNITS + 2 else 0


if __name__ == "__main__":
    sys.exit(main())
