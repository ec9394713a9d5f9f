# SPDX-License-Identifier: Apache-2.0
"""Print how well ``read_scene.py`` and ``read_clip.py`` read rendered scenes back.

Objects of which more than `HIDDEN` is covered or cut off are counted apart.
"""

import argparse
from collections import Counter

import torch
from read_clip import read_clip
from read_scene import SceneReading, read_picture
from render import picture, scene_clip, visible_shares
from scenes import World

CHECK_SEED = 300
HIDDEN = 0.05


def read(kind: str, index: int, pixels: int) -> tuple[SceneReading, World]:
    """Render picture or clip ``index`` and read it; odd pictures are read as told by places."""
    if kind == "pictures":
        image, world = picture(index, pixels, held_out=None, seed=CHECK_SEED)
        return read_picture(
            (image.permute(1, 2, 0) + 1) / 2, world, relation=index % 2 == 0
        ), world
    video, world = scene_clip(index, 33, pixels, held_out=None, seed=CHECK_SEED)
    return read_clip((video.permute(1, 2, 3, 0) + 1) / 2, world), world


def count(kind: str, number: int, pixels: int) -> Counter[str]:
    """Count what was read right over ``number`` scenes."""
    counts: Counter[str] = Counter()
    for index in range(number):
        reading, world = read(kind, index, pixels)
        shares = visible_shares(world, 1 if kind == "pictures" else 9)
        for answer, share in zip(reading.answers, shares, strict=True):
            group = "covered" if share < 1 - HIDDEN else "free"
            counts[f"{group} objects"] += 1
            counts[f"{group} colour"] += answer.colour
            counts[f"{group} shape"] += answer.shape
            counts[f"{group} place or motion"] += answer.place
        counts["scenes"] += 1
        counts["pan"] += reading.pan
        counts["whole scene"] += reading.right
    return counts


def main() -> None:
    """Render, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("pictures", "clips"))
    parser.add_argument("--number", type=int, default=240)
    parser.add_argument("--pixels", type=int, help="default 384 for pictures, 128 for clips")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pixels = args.pixels or (384 if args.kind == "pictures" else 128)
    counts = count(args.kind, args.number, pixels)
    for group in ("free", "covered"):
        total = counts[f"{group} objects"]
        words = ("colour", "shape", "place or motion")
        parts = [f"{word} {counts[f'{group} {word}']}/{total}" for word in words]
        print(f"{group} objects: {', '.join(parts)}")
    scenes = counts["scenes"]
    print(f"whole scenes: {counts['whole scene']}/{scenes}, camera {counts['pan']}/{scenes}")


if __name__ == "__main__":
    main()
