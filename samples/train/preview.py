# SPDX-License-Identifier: Apache-2.0
"""Look at a transformer in training: sample a few prompts, decode with the linear map alone."""

import argparse
import random
from pathlib import Path

import torch
from evaluate import read_settings
from families import FAMILIES, make_family
from families.base import call_settings
from PIL import Image

STRIP_FRAMES = 8


def main() -> None:
    """Write one row of frames per prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("checkpoints", type=Path, help="folder with dit.pt and latents.pt")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--size", default="33x128", help="FRAMESxPIXELS; pictures have one frame")
    parser.add_argument("--prompts", nargs="+", help="default: captions of unseen examples")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of the call")
    args = parser.parse_args()
    torch.set_num_threads(1)
    frames, pixels = map(int, args.size.split("x"))
    family = make_family(args.family)
    space = family.space(args.checkpoints / "latents.pt")
    transformer = family.make_transformer()
    state = torch.load(args.checkpoints / "dit.pt")
    transformer.load_state_dict(state["average"])
    family.spread(transformer)
    pipeline = family.make_pipeline(transformer.eval(), family.make_autoencoder())
    pipeline.set_progress_bar_config(disable=True)
    rng = random.Random("preview")
    drawn = [family.example(rng.randrange(10**9, 2 * 10**9), 1, 16)[1] for _ in range(8)]
    settings = call_settings(family.sample_defaults)
    settings |= read_settings(args.set) | {"height": pixels, "width": pixels}
    if frames > 1:
        settings["num_frames"] = frames
    rows = []
    for number, prompt in enumerate(args.prompts or [text for text in drawn if text][:4]):
        print(prompt, flush=True)
        generator = torch.Generator().manual_seed(number)
        with torch.autocast("cpu", torch.bfloat16):
            output = pipeline(prompt, generator=generator, output_type="latent", **settings)
        latents = output["frames" if frames > 1 else "images"]
        decoded = space.decode(family.unpack(latents, pixels)[0].float())
        decoded = decoded if decoded.ndim == 4 else decoded[:, None]  # [3, frames, H, W]
        chosen = torch.linspace(0, decoded.shape[1] - 1, STRIP_FRAMES).round().long().unique()
        rows.append(decoded[:, chosen].permute(2, 1, 3, 0).flatten(1, 2))  # [H, frames W, 3]
    picture = ((torch.cat(rows) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(picture).save(args.picture)
    print(f"step {state['step']}, {state['cpu_seconds']:.0f} s of CPU time")


if __name__ == "__main__":
    main()
