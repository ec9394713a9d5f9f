# SPDX-License-Identifier: Apache-2.0
"""Read every object of a scene back from a picture. Nothing here is learned.

A colour names one object. Its pixels are those nearest to that colour. Its outline is the shape,
centre and size that overlap best with them, where pixels of other objects count for little, as
something may stand in front. Where an object is follows from its centre, who is in front from the
pixels that both outlines claim. ``read_clip.py`` reads clips frame by frame.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from checker import MIN_AREA, MIN_OVERLAP, _palette
from data import COLOURS, SHAPES, signed_distance
from scenes import PLACES, Thing, World
from torch import Tensor, nn

SIDE = 96  # pixels per side that a frame is read at
EXTRA_AREA = 0.02  # share of a frame that a colour nobody asked for may cover
PLACE_DISTANCE = 0.36  # half picture widths between a place and what still is there
MIN_STEP = 0.25  # half picture widths between two objects, for "left of" and the like
HIDDEN_COST = 0.1  # of a pixel of the outline that another object covers; beside 1
COARSE, FINE = (-1.0, -0.5, 0.0, 0.5, 1.0), (-1.0, 0.0, 1.0)  # moves tried, in steps
ROUNDS = (COARSE, COARSE, COARSE, FINE, FINE, FINE)
COARSE_RADIUS = 8  # pixels that a radius is looked at with in coarse rounds


@dataclass(frozen=True, slots=True)
class Found:
    """One object as a frame shows it; lengths in half picture widths."""

    shape: str | None  # None where no outline overlaps by `MIN_OVERLAP`
    centre: tuple[float, float]
    radius: float
    overlap: float  # intersection over union with the outline, other objects' pixels left out
    outline: Tensor  # bool [SIDE, SIDE]


@dataclass(frozen=True, slots=True)
class Answer:
    """Which of an object's words are right."""

    colour: bool  # something of that colour is there
    shape: bool
    place: bool  # or motion

    @property
    def right(self) -> bool:
        """Say whether all three are."""
        return self.colour and self.shape and self.place


@dataclass(frozen=True, slots=True)
class SceneReading:
    """What was read, against what was asked for."""

    answers: tuple[Answer, ...]  # one per object, in the caption's order
    extras: bool  # a colour that nobody asked for covers more than `EXTRA_AREA`
    pan: bool = True  # the camera pans as asked

    @property
    def right(self) -> bool:
        """Say whether everything is."""
        return all(answer.right for answer in self.answers) and self.pan and not self.extras


def colour_masks(image: Tensor) -> dict[str, Tensor]:
    """Find the pixels of each object colour in ``[H, W, 3]``, [0, 1]: bool ``[SIDE, SIDE]``.

    Lines one pixel wide are dropped: they are edges between two other colours.
    """
    rows = ((torch.arange(SIDE) + 0.5) * image.shape[0] / SIDE).long()
    columns = ((torch.arange(SIDE) + 0.5) * image.shape[1] / SIDE).long()
    pixels = image[rows][:, columns].reshape(-1, 3).float()
    values, names = _palette()
    nearest = torch.cdist(pixels, values).argmin(dim=1).view(SIDE, SIDE)
    masks = {}
    for colour in COLOURS:
        wanted = torch.tensor([i for i, name in enumerate(names) if name == colour])
        mask = torch.isin(nearest, wanted)[None, None].float()
        core = (nn.functional.avg_pool2d(mask, 3, 1, 1) > 0.75).float() * mask
        masks[colour] = (mask * nn.functional.max_pool2d(core, 3, 1, 1)).bool()[0, 0]
    return masks


def find(masks: dict[str, Tensor], colour: str, least: float = MIN_AREA) -> Found | None:
    """Fit an outline to the pixels of ``colour``; None below the share ``least`` of a frame."""
    mask = masks[colour]
    if mask.float().mean() < least:
        return None
    others = torch.stack([other for name, other in masks.items() if name != colour]).any(dim=0)
    fits = [_fit(shape, mask, others) for shape in SHAPES]
    overlaps = [fit.overlap for fit in fits]
    return fits[overlaps.index(max(overlaps))]


def _fit(shape: str, mask: Tensor, ignored: Tensor) -> Found:
    """Search centre and radius of ``shape`` for the greatest overlap, from coarse to fine."""
    axis = torch.linspace(-1 + 1 / SIDE, 1 - 1 / SIDE, SIDE)
    area = mask.float().mean().item()
    x = (mask * axis).sum().item() / mask.sum().item()
    y = (mask * axis[:, None]).sum().item() / mask.sum().item()
    radius = {"circle": 1.13, "square": 1.16, "triangle": 1.75}[shape] * math.sqrt(area)
    y += {"triangle": 0.1}.get(shape, 0.0) * radius
    step = 0.4 * radius
    cost = torch.where(ignored, HIDDEN_COST, 1.0)
    coarse = max(1, round(radius * SIDE / 2 / COARSE_RADIUS))
    for grid in ROUNDS:
        skip = coarse if grid is COARSE else 1
        moves = torch.tensor(list(itertools.product(grid, repeat=3)))
        trial = torch.tensor([x, y, radius]) + step * moves  # [trials, 3]
        trial[:, 2].clamp_(min=0.02)
        seen = slice(skip // 2, None, skip)
        dx = axis[seen].view(1, 1, -1) - trial[:, 0].view(-1, 1, 1)
        dy = axis[seen].view(1, -1, 1) - trial[:, 1].view(-1, 1, 1)
        inside = signed_distance(shape, dx, dy, trial[:, 2].view(-1, 1, 1)) < 0
        wanted = mask[seen, seen]
        shared = (inside & wanted).sum(dim=(1, 2))
        overlap = shared / ((inside | wanted) * cost[seen, seen]).sum(dim=(1, 2)).clamp(min=1)
        best = int(overlap.argmax())
        x, y, radius = trial[best].tolist()
        step /= 2
    value = overlap[best].item()
    name = shape if value >= MIN_OVERLAP else None
    return Found(name, (x, y), radius, value, inside[best])


def read_picture(image: Tensor, world: World, *, relation: bool = True) -> SceneReading:
    """Compare a picture ``[H, W, 3]``, [0, 1], with the scene that was asked for.

    Args:
        image: The picture.
        world: The scene; its words are checked, not its numbers.
        relation: Whether the prompt told two objects' places by one word (``left of``).
    """
    masks = colour_masks(image)
    found = [find(masks, thing.colour) for thing in world.things]
    places = _places_right(world, found, masks, relation=relation)
    answers = tuple(
        Answer(one is not None, one is not None and one.shape == thing.shape, place)
        for thing, one, place in zip(world.things, found, places, strict=True)
    )
    return SceneReading(answers, has_extras(masks, world))


def has_extras(masks: dict[str, Tensor], world: World) -> bool:
    """Say whether a colour that nobody asked for covers more than `EXTRA_AREA`."""
    asked = {thing.colour for thing in world.things}
    return any(
        mask.float().mean() > EXTRA_AREA for name, mask in masks.items() if name not in asked
    )


def _places_right(
    world: World, found: list[Found | None], masks: dict[str, Tensor], *, relation: bool
) -> list[bool]:
    """Say per object whether it is where it was asked to be."""
    first = world.things[0]
    pair = found if len(found) == 2 and None not in found else None
    if first.place == "front":
        right = pair is not None and _in_front(pair, masks, world.things)
        return [right] * len(found)
    opposite = len(found) == 2 and {thing.place for thing in world.things} in (
        {"left", "right"},
        {"top", "bottom"},
    )
    if relation and opposite:
        right = pair is not None and _relation(pair) == first.place
        return [right] * len(found)
    return [
        one is not None and nearest_place(one.centre) == thing.place
        for thing, one in zip(world.things, found, strict=True)
    ]


def nearest_place(centre: tuple[float, float]) -> str | None:
    """Name the place that ``centre`` is at; None where it is far from all."""
    distances = {name: math.dist(centre, place) for name, place in PLACES.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= PLACE_DISTANCE else None


def _relation(pair: list[Found | None]) -> str | None:
    """Name where the first of two objects is, seen from the second."""
    first, second = (one.centre for one in pair if one is not None)
    right, down = first[0] - second[0], first[1] - second[1]
    if max(abs(right), abs(down)) < MIN_STEP:
        return None
    if abs(right) >= abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def _in_front(
    pair: list[Found | None], masks: dict[str, Tensor], things: tuple[Thing, ...]
) -> bool:
    """Say whether the first object's pixels fill what both outlines claim."""
    outlines = [one.outline for one in pair if one is not None]
    both = outlines[0] & outlines[1]
    first, second = ((both & masks[thing.colour]).sum().item() for thing in things)
    smaller = min(outline.sum().item() for outline in outlines)
    return both.sum().item() >= 0.03 * smaller and first > 2 * second
