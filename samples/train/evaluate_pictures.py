# SPDX-License-Identifier: Apache-2.0
"""Score a picture pipeline's folder: generate pictures from prompts, read them back.

Even numbers take a scene with a held-out object, odd numbers one from training. Of every three
scenes, two have two objects and one has one; every fifth has three. Numbers 2, 3, 6, 7, ... take
the short form of the caption, 4, 5, 6, 7, 12, ... tell two opposite objects by places instead of
by one word. The noise seed is the number. Rows go to a CSV file that is gone on with where it
ends; pictures go to ``<number>.png`` beside it.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from captions import full_caption, short_caption
from diffusers import DiffusionPipeline
from evaluate import read_settings
from families.base import call_settings
from PIL import Image
from read_scene import SceneReading, read_picture
from scenes import World, picture_scene

SEED = 400
FIELDS = ("number", "held_out", "objects", "prompt", "colour", "shape", "place", "extras", "right")


def question(number: int) -> tuple[World, str, bool]:
    """Give the scene asked for, the prompt, and whether it tells a relation."""
    objects = 3 if number % 5 == 4 else (1 if number % 3 == 0 else 2)
    world = picture_scene(number, held_out=number % 2 == 0, count=objects, seed=SEED)
    relation = number % 8 < 4
    write = short_caption if number % 4 > 1 else full_caption
    return world, write(world, relation=relation), relation


def row_of(number: int, world: World, prompt: str, reading: SceneReading) -> dict[str, Any]:
    """Write the row of a picture: how many objects have each word right."""
    answers = reading.answers
    return {
        "number": number,
        "held_out": world.held_out,
        "objects": len(answers),
        "prompt": prompt,
        "colour": sum(answer.colour for answer in answers),
        "shape": sum(answer.shape for answer in answers),
        "place": sum(answer.place for answer in answers),
        "extras": reading.extras,
        "right": reading.right,
    }


def summarize(path: Path) -> None:
    """Print the model card's table: right objects and right pictures among all rows of the CSV."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = {
        "all": rows,
        "combinations from training": [row for row in rows if row["held_out"] == "False"],
        "with a held-out combination": [row for row in rows if row["held_out"] == "True"],
    } | {
        f"{n} object{'s' * (n > 1)}": [r for r in rows if r["objects"] == f"{n}"]
        for n in (1, 2, 3)
    }
    print("| images | colour | shape | place | whole image |\n|---|---|---|---|---|")
    for name, group in groups.items():
        total = sum(int(row["objects"]) for row in group)
        cells = [
            f"{sum(int(row[word]) for row in group)}/{total}"
            for word in ("colour", "shape", "place")
        ]
        whole = sum(row["right"] == "True" for row in group)
        print(f"| {name} | {' | '.join(cells)} | {whole}/{len(group)} |")
    extras = sum(row["extras"] == "True" for row in rows)
    print(f"images with a colour that the prompt does not name: {extras}")


def main() -> None:
    """Generate, read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("csv", type=Path, help="rows are appended")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="of the call")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(
        args.pipeline, torch_dtype=getattr(torch, args.dtype), use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    told = json.loads((args.pipeline / "sample_defaults.json").read_text(encoding="utf-8"))
    settings = call_settings(told) | read_settings(args.set)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("a+", newline="") as file:
        file.seek(0)
        done = {int(row["number"]) for row in csv.DictReader(file)}
        table = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            table.writeheader()
        for number in sorted(set(range(args.pictures)) - done):
            world, prompt, relation = question(number)
            generator = torch.Generator().manual_seed(number)
            result = pipeline(prompt, generator=generator, output_type="pt", **settings)
            image = result.images[0].permute(1, 2, 0).float()
            pixels = (image * 255).round().byte().numpy()
            Image.fromarray(pixels).save(args.csv.with_name(f"{number:03}.png"))
            row = row_of(number, world, prompt, read_picture(image, world, relation=relation))
            table.writerow(row)
            file.flush()
            print(row, flush=True)
    summarize(args.csv)


if __name__ == "__main__":
    main()
