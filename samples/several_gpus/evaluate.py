# SPDX-License-Identifier: Apache-2.0
"""Compare sparse with dense clips on several GPUs: each process takes its share of the pairs.

    accelerate launch --num_processes 4 samples/several_gpus/evaluate.py samples/wan-tiny \
        --prompts samples/prompts.txt --strategy wan-tiny.radial

Without GPUs: ``torchrun --nproc-per-node 2 samples/several_gpus/evaluate.py ... --cpu``. This is
how to do it in code of your own; ``accelerate launch -m dit_sparse evaluate`` keeps the clips, can
be stopped, measures much more and writes a report (docs/quality.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from dit_sparse import sparse_attention
from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.core.video import as_uint8
from dit_sparse.quality import psnr, ssim


def main() -> None:
    """Make each pair in one process, and put the figures together."""
    parser = argparse.ArgumentParser(description="Compare sparse with dense on several GPUs.")
    parser.add_argument("model", help="folder or Hub id of a video pipeline")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line")
    parser.add_argument("--strategy", required=True, help="a strategy's name or path, or a method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
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

    def clip(prompt: str, seed: int) -> Any:
        call = pipe(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=wish.steps,
            height=height,
            width=width,
            num_frames=frames,
            output_type="np",
        )
        return as_uint8(call.frames[0])

    pairs = [(prompt, seed) for prompt in read_prompt_file(wish.prompts) for seed in wish.seeds]
    rows = []
    with state.split_between_processes(pairs) as mine:
        for prompt, seed in mine:
            dense = clip(prompt, seed)
            with sparse_attention(pipe, wish.strategy) as handle:
                sparse = clip(prompt, seed)
                density = handle.report().density
            rows.append(
                (prompt, seed, psnr(dense, sparse).value, ssim(dense, sparse).value, density)
            )

    found = sorted(gather_object(rows))
    for prompt, seed, noise, likeness, density in found:
        state.print(
            f"PSNR {noise:5.2f} dB  SSIM {likeness:.4f}  density {density:.3f}  "
            f"seed {seed}  {prompt}"
        )
    state.print(f"median PSNR of {len(found)} pairs: {median(row[2] for row in found):.2f} dB")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
