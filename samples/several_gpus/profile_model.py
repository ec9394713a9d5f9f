# SPDX-License-Identifier: Apache-2.0
"""Search a strategy on several GPUs: the processes share prompts and seeds, the first one chooses.

    accelerate launch --num_processes 4 samples/several_gpus/profile_model.py samples/wan-tiny \
        --prompts samples/prompts.txt -o mine.json

Without GPUs: ``torchrun --nproc-per-node 2 samples/several_gpus/profile_model.py ... --cpu``. This
is how to do it in code of your own; ``accelerate launch -m dit_sparse profile`` has every setting
(docs/profiler.md). Killed, the same command goes on. (A script named profile.py would hide
Python's own module of that name, which torch imports.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.profiler import Store, Wish, profile


def main() -> None:
    """Measure in every process; save in the first."""
    parser = argparse.ArgumentParser(description="Search a strategy on several GPUs.")
    parser.add_argument("model", help="folder or Hub id of a pipeline")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="strategy file to write")
    parser.add_argument("--density", type=float, default=0.5, help="mean density to keep")
    parser.add_argument("--candidates", default="quick")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(128, 128, 33), metavar=("H", "W", "F")
    )
    parser.add_argument("--cpu", action="store_true")
    wish = parser.parse_args()
    height, width, frames = wish.size

    state = PartialState(cpu=wish.cpu)
    dtype = torch.float32 if wish.cpu else torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(wish.model, torch_dtype=dtype).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    found = profile(
        pipe,
        read_prompt_file(wish.prompts),
        arguments={
            "num_inference_steps": wish.steps,
            "height": height,
            "width": width,
            "num_frames": frames,
        },
        wish=Wish(density=wish.density),
        candidates=wish.candidates,
        name=wish.output.stem,
        store=Store(wish.output.with_suffix(".measured")),
        state=state,
    )
    if found is not None:  # the first process
        found.strategy.save(wish.output)
        print(f"{wish.output}: {len(found.strategy.rules)} rules")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
