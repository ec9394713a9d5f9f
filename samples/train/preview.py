# SPDX-License-Identifier: Apache-2.0
"""Look at a transformer in training: sample a few prompts, decode with the linear map alone.

With ``--questions N`` the prompts are the first N of ``evaluate.py``, and its checker reads the
clips back. Only videos of one object have such a checker.
"""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from checker import check
from diffusers import DiffusionPipeline
from evaluate import question, read_settings
from families import FAMILIES, make_family
from families.base import Family, call_settings
from PIL import Image
from torch import Tensor
from train_dit import DTYPES, read_weights

STRIP_FRAMES = 8
MAX_ROWS = 8


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("weights", type=Path, help="checkpoint, or pack_checkpoint.py's file")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--size", default="33x128", help="FRAMESxPIXELS; pictures have one frame")
    parser.add_argument("--prompts", nargs="+", help="default: captions of unseen examples")
    parser.add_argument("--questions", type=int, help="number of evaluate.py's prompts")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of the call")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the autocast")
    return parser.parse_args(arguments)


def make_pipeline(family: Family, weights: dict[str, Tensor]) -> DiffusionPipeline:
    """Put the weights into the family's pipeline; its autoencoder is not used."""
    transformer = family.make_transformer()
    transformer.load_state_dict(weights)
    family.spread(transformer)
    pipeline = family.make_pipeline(transformer.eval(), family.make_autoencoder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unseen_captions(family: Family) -> list[str]:
    """Draw captions of examples that no training reaches."""
    rng = random.Random("preview")
    drawn = [family.example(rng.randrange(10**9, 2 * 10**9), 1, 16)[1] for _ in range(8)]
    return [text for text in drawn if text][:4]


def sample(family: Family, args: argparse.Namespace, prompts: list[str]) -> Iterable[Tensor]:
    """Generate one clip ``[3, frames, H, W]`` in [-1, 1] per prompt; the seed is its number."""
    frames, pixels = map(int, args.size.split("x"))
    weights, step, cpu_seconds = read_weights(args.weights)
    print(f"step {step}, {cpu_seconds:.0f} s of CPU time")
    pipeline, space = (
        make_pipeline(family, weights),
        family.space(args.weights.parent / "latents.pt"),
    )
    settings = call_settings(family.sample_defaults) | read_settings(args.set)
    settings |= {"height": pixels, "width": pixels}
    if frames > 1:
        settings["num_frames"] = frames
    dtype = DTYPES[args.dtype]
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = pipeline(prompt, generator=generator, output_type="latent", **settings)
        latents = output["frames" if frames > 1 else "images"]
        decoded = space.decode(family.unpack(latents, pixels)[0].float())
        yield decoded if decoded.ndim == 4 else decoded[:, None]


def main(arguments: list[str] | None = None) -> None:
    """Write one row of frames per prompt; say which questions came out right."""
    args = read_arguments(arguments)
    torch.set_num_threads(1)
    family = make_family(args.family)
    asked = [question(number) for number in range(args.questions or 0)]
    prompts = [prompt for _, prompt in asked] or args.prompts or unseen_captions(family)
    rows, right = [], 0
    for number, (prompt, clip) in enumerate(
        zip(prompts, sample(family, args, prompts), strict=True)
    ):
        chosen = torch.linspace(0, clip.shape[1] - 1, STRIP_FRAMES).round().long().unique()
        rows.append(clip[:, chosen].permute(2, 1, 3, 0).flatten(1, 2))  # [H, frames W, 3]
        verdict = ""
        if asked:
            scene, reading = asked[number][0], check((clip.permute(1, 2, 3, 0) + 1) / 2)
            matches = reading.matches(scene.colour, scene.shape, scene.motion)
            right += matches
            verdict = f": {'right' if matches else 'wrong'}, overlap {reading.overlap:.2f}"
        print(prompt + verdict, flush=True)
    picture = ((torch.cat(rows[:MAX_ROWS]) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(picture).save(args.picture)
    if asked:
        print(f"{right} of {len(asked)} have all words right")


if __name__ == "__main__":
    main()
