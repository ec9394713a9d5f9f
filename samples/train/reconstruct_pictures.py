# SPDX-License-Identifier: Apache-2.0
"""Measure what the pictures' autoencoder keeps: PSNR over pictures that no training drew."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from picture_latents import PictureSpace
from reconstruct import SEED, psnr
from render import picture


@torch.no_grad()
def main() -> None:
    """Print the PSNR of encoder + decoder, of the decoder alone and of the linear map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("checkpoints", type=Path, help="folder with latents.pt")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=384)
    args = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(args.pipeline, subfolder="vae", use_safetensors=True)
    space = PictureSpace.load(args.checkpoints / "latents.pt")
    errors: dict[str, list[float]] = {}
    for index in range(args.pictures):
        image, _ = picture(index, args.pixels, held_out=None, seed=SEED)
        exact = space.encode(image)
        encoded = vae.encode(image[None]).latent_dist.mode()
        results = {
            "encoder + decoder": vae.decode(encoded).sample[0],
            "exact latents + decoder": vae.decode(exact[None]).sample[0],
            "linear map": space.decode(exact),
        }
        for name, result in results.items():
            errors.setdefault(name, []).append((result - image).square().mean().item())
    for name, values in errors.items():
        print(f"{name}: {psnr(values):.1f} dB")


if __name__ == "__main__":
    main()
