# SPDX-License-Identifier: Apache-2.0
"""Generate one video on several GPUs: Diffusers' context parallelism with sparse attention in it.

    torchrun --nproc-per-node 2 samples/several_gpus/one_video.py samples/wan-tiny \
        "a red circle moving right" --strategy wan-tiny.radial -o red.mp4

``--cpu`` tries it without GPUs. Heads, and tokens, must be divisible by the number of processes;
``--anything`` lifts that (Diffusers' ``ulysses_anything``; not on CPUs, whose gloo cannot).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline

import dit_sparse  # noqa: F401  (gives every pipeline enable_sparse_attention)
from dit_sparse.core.video import as_uint8, write_mp4


def main() -> None:
    """Load the pipeline in each process, share its transformers, and generate together."""
    parser = argparse.ArgumentParser(description="Generate one video on several GPUs.")
    parser.add_argument("model", help="folder or Hub id of a video pipeline")
    parser.add_argument("prompt")
    parser.add_argument("--strategy", required=True, help="a strategy's name or path, or a method")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the clip")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(128, 128, 33), metavar=("H", "W", "F")
    )
    parser.add_argument("--fps", type=float, default=12)
    parser.add_argument("--anything", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    wish = parser.parse_args()
    height, width, frames = wish.size

    device = torch.device("cpu" if wish.cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if wish.cpu:
        torch.accelerator.device_count = lambda: 1  # Diffusers divides by it, and a CPU has none
    else:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if wish.cpu else "nccl")
    dtype = torch.float32 if wish.cpu else torch.bfloat16
    pipe = DiffusionPipeline.from_pretrained(wish.model, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=dist.get_rank() > 0)

    options = {"ulysses_anything": True} if wish.anything else {}
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):  # Wan 2.2 has two
        if model is not None:
            config = ContextParallelConfig(ulysses_degree=dist.get_world_size(), **options)
            model.enable_parallelism(config=config)
    handle = pipe.enable_sparse_attention(wish.strategy)

    clip = pipe(
        wish.prompt,
        generator=torch.Generator().manual_seed(0),  # the same in every process
        num_inference_steps=wish.steps,
        height=height,
        width=width,
        num_frames=frames,
        output_type="np",
    ).frames[0]
    report = handle.merged_report()  # every process takes part
    if dist.get_rank() == 0:
        write_mp4(wish.output, as_uint8(clip), wish.fps)
        print(report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
