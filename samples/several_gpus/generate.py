# SPDX-License-Identifier: Apache-2.0
"""Generate a file of prompts on several GPUs: each process takes its share of the prompts.

    accelerate launch --num_processes 4 samples/several_gpus/generate.py samples/wan-tiny \
        --prompts samples/prompts.txt --strategy wan-tiny.radial -o outputs/several

Without GPUs, to try it (accelerate's own launcher wants MPI for CPUs):

    torchrun --nproc-per-node 2 samples/several_gpus/generate.py samples/wan-tiny --cpu \
        --prompts samples/prompts.txt --strategy wan-tiny.radial -o outputs/several

A prompt's seed goes by its place in the file, so the clips do not depend on the processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

import dit_sparse  # noqa: F401  (gives every pipeline enable_sparse_attention)
from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.core.video import as_uint8, write_mp4


def main() -> None:
    """Load a pipeline in each process, and let each make its clips."""
    parser = argparse.ArgumentParser(description="Generate a file of prompts on several GPUs.")
    parser.add_argument("model", help="folder or Hub id of a video pipeline")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("--strategy", required=True, help="a strategy's name or path, or a method")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the clips")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(128, 128, 33), metavar=("H", "W", "F")
    )
    parser.add_argument("--fps", type=float, default=12)
    parser.add_argument("--cpu", action="store_true")
    wish = parser.parse_args()
    height, width, frames = wish.size

    state = PartialState(cpu=wish.cpu)
    dtype = torch.float32 if wish.cpu else torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(wish.model, torch_dtype=dtype).to(state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    handle = pipe.enable_sparse_attention(wish.strategy)
    wish.output.mkdir(parents=True, exist_ok=True)

    done = []
    with state.split_between_processes(list(enumerate(read_prompt_file(wish.prompts)))) as mine:
        for number, prompt in mine:
            clip = pipe(
                prompt,
                generator=torch.Generator().manual_seed(number),
                num_inference_steps=wish.steps,
                height=height,
                width=width,
                num_frames=frames,
                output_type="np",
            ).frames[0]
            write_mp4(wish.output / f"{number:04}.mp4", as_uint8(clip), wish.fps)
            done.append((number, prompt, handle.report().density, state.process_index))

    for number, prompt, density, process in sorted(gather_object(done)):
        state.print(f"{number:04}.mp4  process {process}  density {density:.3f}  {prompt}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
