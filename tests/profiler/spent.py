# SPDX-License-Identifier: Apache-2.0
"""Compare what measuring a prompt takes with a dense generation, in processor time.

    python tests/profiler/spent.py --candidates default quick

Runs on one thread: a dense generation (the second of two), then one measured prompt for each list
of candidates, its own generation included. Prints a line for each.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parents[2]))

from dit_sparse.cli.source import SampleDefaults, Settings, call_arguments
from dit_sparse.profiler.candidates import Candidate, parse_candidates
from dit_sparse.profiler.capture import Bands, Measuring, call_of, capture
from dit_sparse.profiler.run import EDGES
from dit_sparse.profiler.screen import screen

PROMPT = "a big red circle moving right over a gray plain background"


def processor_time(call) -> float:
    """Seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="samples/wan-tiny")
    parser.add_argument("--candidates", nargs="+", default=["default"])
    parser.add_argument("--sample", type=int, default=None, help="rows; 0: all")
    parser.add_argument("--steps", type=int, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(asked.model)
    pipe.set_progress_bar_config(disable=True)
    defaults = SampleDefaults.read(Path(asked.model))
    settings = Settings(num_inference_steps=asked.steps).over(defaults)
    arguments = call_arguments(pipe, PROMPT, settings)

    def dense() -> None:
        with torch.no_grad():
            pipe(**call_of(pipe, arguments, 0))

    dense()
    one = processor_time(dense)
    sys.stdout.write(f"dense generation: {one:.1f} s of processor time\n")
    for names in asked.candidates:
        how = Measuring(parse_candidates(names), Bands(EDGES), asked.sample)
        if how.screens:
            start = time.process_time()
            found = screen(pipe, arguments, 0, how)
            took = time.process_time() - start
            sys.stdout.write(f"{names}, screening once: {took / one:.2f} dense generations\n")
            listed = tuple(Candidate(**each) for each in found["candidates"])
            how = replace(how, listed=listed)
        took = processor_time(lambda how=how: capture(pipe, arguments, 0, how))
        sys.stdout.write(f"{names}: {took:.1f} s, {took / one:.2f} dense generations\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
