# SPDX-License-Identifier: Apache-2.0
"""Read colour, shape and motion back from a clip. Nothing here is learned.

Colour: the shape colour that most pixels are nearest to, backgrounds being candidates too.
Shape: the outline that overlaps best with those pixels, at their own centre and area.
Motion: drift of their centre, or growth of their area, from the clip's beginning to its end.
"""

import argparse
from dataclasses import dataclass

import torch
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, clip, signed_distance
from torch import Tensor

LIGHT = (0.6, 0.8, 1.0, 1.2, 1.4)  # backgrounds are lit and striped
SHADE = (0.88, 1.0, 1.12)  # shapes are shaded
MIN_AREA = 0.004  # share of the picture below which a frame shows no shape
MIN_OVERLAP = 0.6  # intersection over union with the best outline, mean over frames
MIN_DRIFT = 0.3  # half picture widths between the first and the last quarter
MIN_GROWTH = 1.8  # area, last quarter over first; a shape that moves keeps its area
CHECK_SEED = 300


@dataclass(frozen=True, slots=True)
class Reading:
    """What a clip shows; a word is None where the clip does not show one clearly."""

    colour: str | None
    shape: str | None
    motion: str | None
    overlap: float  # with the best outline, 1 is a perfect shape
    drift: tuple[float, float]  # right and down, half picture widths
    growth: float

    def matches(self, colour: str, shape: str, motion: str) -> bool:
        """Say whether all three words are right."""
        return (self.colour, self.shape, self.motion) == (colour, shape, motion)


def _palette() -> tuple[Tensor, list[str | None]]:
    """List every colour a pixel may have, with its word; None for backgrounds."""
    entries: list[tuple[list[float], str | None]] = [
        ([min(1.0, part * shade) for part in value], name)
        for name, value in COLOURS.items()
        for shade in SHADE
    ]
    entries += [
        ([min(1.0, part * light) for part in value], None)
        for value in BACKGROUNDS.values()
        for light in LIGHT
    ]
    values, names = zip(*entries, strict=True)
    return torch.tensor(values), list(names)


def segment(video: Tensor) -> tuple[str | None, Tensor]:
    """Find the shape's colour and its pixels ``[T, H, W]`` in a video ``[T, H, W, 3]``, [0, 1]."""
    values, names = _palette()
    nearest = torch.cdist(video.reshape(-1, 3).float(), values).argmin(dim=1)
    nearest = nearest.view(video.shape[:3])
    masks = {
        colour: torch.isin(nearest, torch.tensor([i for i, n in enumerate(names) if n == colour]))
        for colour in COLOURS
    }
    colour = max(masks, key=lambda name: int(masks[name].sum()))
    mask = masks[colour]
    return (colour if mask.float().mean() > MIN_AREA else None), mask


def outline_overlaps(mask: Tensor, centres: Tensor, areas: Tensor) -> dict[str, float]:
    """Overlap the pixels ``[T, H, W]`` with each outline; mean intersection over union."""
    height, width = mask.shape[1:]
    y = torch.linspace(-1 + 1 / height, 1 - 1 / height, height).view(1, -1, 1)
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width).view(1, 1, -1)
    dx, dy = x - centres[:, 0].view(-1, 1, 1), y - centres[:, 1].view(-1, 1, 1)
    overlaps = {}
    for shape in SHAPES:
        unit = _unit_area(shape)
        radius = (4 * areas / unit).sqrt().view(-1, 1, 1)  # areas are shares of a 2 x 2 picture
        low = signed_distance(shape, dx, dy - _lowering(shape) * radius, radius) < 0
        shared = (low & mask).sum(dim=(1, 2)) / (low | mask).sum(dim=(1, 2))
        overlaps[shape] = shared.mean().item()
    return overlaps


def _unit_area(shape: str) -> float:
    """Give the area of the outline of radius 1, by counting points."""
    return 4 * _unit_points(shape).float().mean().item()


def _lowering(shape: str) -> float:
    """Give how far the drawing's origin lies below the outline's centre of area, radius 1."""
    axis = torch.linspace(-1, 1, 401).view(-1, 1)
    inside = _unit_points(shape)
    return -(inside * axis).sum().item() / inside.sum().item()


def _unit_points(shape: str) -> Tensor:
    """Mark the points inside the outline of radius 1 on a 401 x 401 grid over [-1, 1]."""
    axis = torch.linspace(-1, 1, 401)
    return signed_distance(shape, axis.view(1, -1), axis.view(-1, 1), 1.0) < 0


def check(video: Tensor) -> Reading:
    """Read a video ``[T, H, W, 3]`` with values in [0, 1]."""
    colour, mask = segment(video)
    areas = mask.float().mean(dim=(1, 2))
    seen = areas > MIN_AREA
    quarter = max(1, len(video) // 4)
    if colour is None or not seen[-quarter:].any() or seen.float().mean() < 0.5:
        return Reading(colour, None, None, 0.0, (0.0, 0.0), 1.0)
    height, width = mask.shape[1:]
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width)
    y = torch.linspace(-1 + 1 / height, 1 - 1 / height, height)
    count = mask.sum(dim=(1, 2)).clamp(min=1)
    centres = torch.stack(
        [(mask * x).sum(dim=(1, 2)) / count, (mask * y.view(-1, 1)).sum(dim=(1, 2)) / count], dim=1
    )
    overlaps = outline_overlaps(mask[seen], centres[seen], areas[seen])
    shape = max(overlaps, key=overlaps.__getitem__)
    visible = seen.nonzero().flatten()
    first, last = visible[:quarter], visible[-quarter:]
    drift = (centres[last].mean(dim=0) - centres[first].mean(dim=0)).tolist()
    growth = (areas[last].mean() / areas[first].mean()).item()
    return Reading(
        colour=colour,
        shape=shape if overlaps[shape] >= MIN_OVERLAP else None,
        motion=_motion(drift, growth),
        overlap=overlaps[shape],
        drift=(drift[0], drift[1]),
        growth=growth,
    )


def _motion(drift: list[float], growth: float) -> str | None:
    """Name the motion; None where nothing moves far or grows much."""
    right, down = drift
    if max(abs(right), abs(down)) < MIN_DRIFT:
        return MOTIONS[4] if growth >= MIN_GROWTH else None
    if abs(right) >= abs(down):
        return MOTIONS[0] if right > 0 else MOTIONS[1]
    return MOTIONS[3] if down > 0 else MOTIONS[2]


def main() -> None:
    """Print the checker's own accuracy on rendered clips."""
    parser = argparse.ArgumentParser(description="Check the checker on rendered clips.")
    parser.add_argument("--clips", type=int, default=200)
    args = parser.parse_args()
    right = {"colour": 0, "shape": 0, "motion": 0, "all": 0}
    overlap = 1.0
    for index in range(args.clips):
        video, scene = clip(index, held_out=None, seed=CHECK_SEED)
        reading = check((video.permute(1, 2, 3, 0) + 1) / 2)
        for word in ("colour", "shape", "motion"):
            right[word] += getattr(reading, word) == getattr(scene, word)
        right["all"] += reading.matches(scene.colour, scene.shape, scene.motion)
        overlap = min(overlap, reading.overlap)
    print({word: f"{count}/{args.clips}" for word, count in right.items()})
    print(f"least overlap {overlap:.3f}")


if __name__ == "__main__":
    main()
