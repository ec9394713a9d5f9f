# SPDX-License-Identifier: Apache-2.0
"""Measure what a video autoencoder keeps: PSNR over clips that no training drew."""

import argparse
from pathlib import Path

import torch
from data import clip
from diffusers import DiffusionPipeline
from latents import LatentSpace

SEED = 500


def psnr(errors: list[float]) -> float:
    """Give the PSNR of the mean squared error, in dB, for values in [-1, 1]."""
    mean = sum(errors) / len(errors)
    return 10 * torch.log10(torch.tensor(4 / mean)).item()


@torch.no_grad()
def main() -> None:
    """Print the PSNR of encoder + decoder, of the decoder alone and of the linear map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("checkpoints", type=Path, help="folder with latents.pt")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--pixels", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vae = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True).vae
    space = LatentSpace.load(args.checkpoints / "latents.pt")
    errors = {"encoder + decoder": [], "exact latents + decoder": [], "linear map": []}
    for index in range(args.clips):
        video, _ = clip(index, args.frames, args.pixels, held_out=None, seed=SEED)
        exact = space.encode(video)
        encoded = vae.encode(video[None]).latent_dist.mode()
        results = (vae.decode(encoded).sample[0], vae.decode(exact[None]).sample[0])
        for name, result in zip(errors, (*results, space.decode(exact)), strict=True):
            errors[name].append((result - video).square().mean().item())
    for name, values in errors.items():
        print(f"{name}: {psnr(values):.1f} dB")


if __name__ == "__main__":
    main()
