# SPDX-License-Identifier: Apache-2.0
"""Score a video pipeline's folder: generate clips from prompts, read them back with the checker.

Even numbers take a held-out (shape, colour, motion), odd numbers one from training; numbers 2, 3,
6, 7, ... take the short form of the caption. The noise seed is the number. Rows go to a CSV file,
so that several processes may share the work (``--first``, ``--clips``). Frames of each clip go to
``<number>.png`` beside the CSV file. The settings are the folder's ``sample_defaults.json``.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from checker import check
from data import MOTIONS, SHAPES, Scene, full_caption, sample, short_caption
from diffusers import DiffusionPipeline
from families.base import call_settings
from PIL import Image

SEED = 400
STRIP_FRAMES = 8
FIELDS = ("number", "held_out", "prompt", "colour", "shape", "motion", "overlap", "right")


def question(number: int) -> tuple[Scene, str]:
    """Give the scene asked for and the prompt that asks for it."""
    scene = sample(number, held_out=number % 2 == 0, seed=SEED)
    return scene, short_caption(scene) if number % 4 > 1 else full_caption(scene)


def read_settings(pairs: list[str]) -> dict[str, int | float]:
    """Read ``NAME=NUMBER`` pairs."""
    settings = [pair.split("=", 1) for pair in pairs]
    return {name: float(value) if "." in value else int(value) for name, value in settings}


def generate(
    pipeline: DiffusionPipeline, prompt: str, seed: int, settings: dict[str, Any]
) -> torch.Tensor:
    """Sample one clip ``[frames, height, width, 3]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(prompt, generator=generator, output_type="pt", **settings).frames
    return frames[0].permute(0, 2, 3, 1).float().cpu()


def save_strip(video: torch.Tensor, path: Path) -> None:
    """Write frames of a clip ``[frames, height, width, 3]``, evenly spaced, side by side."""
    chosen = torch.linspace(0, len(video) - 1, STRIP_FRAMES).round().long()
    strip = torch.cat(list(video[chosen]), dim=1)
    Image.fromarray((strip * 255).round().byte().numpy()).save(path)


def summarize(path: Path) -> None:
    """Print the model card's table: right clips among all rows of the CSV file, and by word."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = {
        "all": rows,
        "combinations from training": [row for row in rows if row["held_out"] == "False"],
        "held-out combinations": [row for row in rows if row["held_out"] == "True"],
        "short form": [row for row in rows if "background" not in row["prompt"]],
        "long form": [row for row in rows if "background" in row["prompt"]],
    } | {word: [row for row in rows if word in row["prompt"]] for word in (*SHAPES, *MOTIONS)}
    print("| prompts | colour | motion | shape | all three |\n|---|---|---|---|---|")
    for name, group in groups.items():
        cells = [
            f"{sum(row[word] == 'True' for row in group)}/{len(group)}"
            for word in ("colour", "motion", "shape", "right")
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"mean overlap of outlines: {mean(float(row['overlap']) for row in rows):.2f}")


def main() -> None:
    """Generate, check, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("csv", type=Path, help="rows are appended")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of the call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    pipeline = DiffusionPipeline.from_pretrained(
        args.pipeline, torch_dtype=dtype, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    told = json.loads((args.pipeline / "sample_defaults.json").read_text())
    settings = call_settings(told) | read_settings(args.set)
    with args.csv.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            table.writeheader()
            file.flush()
        for number in range(args.first, args.first + args.clips):
            scene, prompt = question(number)
            video = generate(pipeline, prompt, number, settings)
            save_strip(video, args.csv.with_name(f"{number:03}.png"))
            reading = check(video)
            row = {
                "number": number,
                "held_out": scene.held_out,
                "prompt": prompt,
                "colour": reading.colour == scene.colour,
                "shape": reading.shape == scene.shape,
                "motion": reading.motion == scene.motion,
                "overlap": f"{reading.overlap:.3f}",
                "right": reading.matches(scene.colour, scene.shape, scene.motion),
            }
            table.writerow(row)
            file.flush()
            print(row, flush=True)
    summarize(args.csv)


if __name__ == "__main__":
    main()
