# SPDX-License-Identifier: Apache-2.0
"""Draw richer scenes from an index: one to three objects, each with words of its own.

A picture's objects have a place, a clip's have a motion, and its camera may pan. ``render.py``
draws a scene, ``captions.py`` describes it, ``read_scene.py`` reads it back. The single moving
object of ``data.py`` is another data set; only its words are shared.

No two objects of a scene share a colour, so a colour names one object. The object named first
stands in front of the others.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from data import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, is_held_out, signed_distance

PLACES = {  # centre (x, y), in half picture widths; y points down
    "left": (-0.52, 0.0),
    "right": (0.52, 0.0),
    "top": (0.0, -0.52),
    "bottom": (0.0, 0.52),
    "centre": (0.0, 0.0),
}
DEPTHS = ("front", "behind")  # two objects that overlap around the picture's centre
OPPOSITES = (("left", "right"), ("top", "bottom"), DEPTHS)
SPREAD = 0.08  # how far a centre may lie from its place, both ways
HIDDEN = (0.08, 0.4)  # share of the object behind that the one in front hides
SCENE_MOTIONS = (*MOTIONS, "standing still")
SCENE_TEXTURES = ("plain", "striped", "dotted")
PANS = ("right", "left", "up", "down")
PAN_LENGTH = (0.35, 0.6)  # half picture widths over a clip
SIZES = {"small": (0.19, 0.24), "big": (0.30, 0.36)}  # radius, in half picture widths
CLIP_SIZES = {"small": (0.17, 0.22), "big": (0.27, 0.33)}
COUNTS = (1, 1, 2, 2, 2, 3)  # objects of a scene, drawn evenly


@dataclass(frozen=True, slots=True)
class Thing:
    """One object; lengths in half picture widths."""

    shape: str
    colour: str
    size: str
    radius: float
    centre: tuple[float, float]  # at the clip's middle, without the camera's pan
    place: str | None = None  # of PLACES or DEPTHS, in pictures
    motion: str | None = None  # of SCENE_MOTIONS, in clips
    travel: float = 0.0  # way of a moving object's centre over the clip

    @property
    def held_out(self) -> bool:
        """Say whether this (shape, colour, place or motion) never occurs in training."""
        if self.motion is not None:
            return self.motion in MOTIONS and is_held_out(self.shape, self.colour, self.motion)
        return is_held_out_place(self.shape, self.colour, self.place)


@dataclass(frozen=True, slots=True)
class World:
    """A whole scene; ``things`` in the order of the caption, the first one in front."""

    things: tuple[Thing, ...]
    background: str
    texture: str
    phase: float  # of the background pattern, radians
    angle: float  # of the stripes, radians
    pan: str | None = None  # where the camera turns to; all that is seen moves the other way
    pan_length: float = 0.0

    @property
    def held_out(self) -> bool:
        """Say whether any object of the scene is held out."""
        return any(thing.held_out for thing in self.things)


def is_held_out_place(shape: str, colour: str, place: str | None) -> bool:
    """Keep an eighth of the combinations of shape, colour and place out of training."""
    words = (*PLACES, *DEPTHS)
    code = 3 * SHAPES.index(shape) + list(COLOURS).index(colour) + 2 * words.index(str(place))
    return code % 8 == 1


def picture_scene(
    index: int, *, held_out: bool | None = False, count: int | None = None, seed: int = 0
) -> World:
    """Draw the scene of picture number ``index``.

    Args:
        index: Any integer; the same index, count and seed always give the same scene.
        held_out: False draws scenes without a held-out object, True with one, None both.
        count: Number of objects, 1 to 3; drawn where it is None.
        seed: Separates data sets.
    """
    rng = random.Random(f"picture {seed}/{index}")
    number = rng.choice(COUNTS) if count is None else count
    while True:
        world = _picture(rng, number)
        if held_out is None or world.held_out == held_out:
            return world


def clip_scene(
    index: int, *, held_out: bool | None = False, count: int | None = None, seed: int = 0
) -> World:
    """Draw the scene of clip number ``index``; the arguments are `picture_scene`'s."""
    rng = random.Random(f"clip {seed}/{index}")
    number = rng.choice(COUNTS) if count is None else count
    while True:
        world = _clip(rng, number)
        if held_out is None or world.held_out == held_out:
            return world


def _picture(rng: random.Random, number: int) -> World:
    """Draw a still scene, held out or not."""
    if number == 1:
        places = [rng.choice(tuple(PLACES))]
    elif number == 2:
        places = list(rng.choice(OPPOSITES))
        if places != list(DEPTHS):
            rng.shuffle(places)
    else:
        places = rng.sample([place for place in PLACES if place != "centre"], number)
    things = []
    for place, colour in zip(places, rng.sample(tuple(COLOURS), number), strict=True):
        size = rng.choice(tuple(SIZES))
        radius = rng.uniform(*SIZES[size])
        x, y = PLACES.get(place, (0.0, 0.0))
        centre = (x + rng.uniform(-SPREAD, SPREAD), y + rng.uniform(-SPREAD, SPREAD))
        things.append(Thing(rng.choice(SHAPES), colour, size, radius, centre, place))
    if places == list(DEPTHS):
        things = _overlap(rng, *things)
    texture = rng.choice(("plain", "plain", "striped"))
    return World(tuple(things), **_background(rng), texture=texture)


def _overlap(rng: random.Random, front: Thing, behind: Thing) -> list[Thing]:
    """Move two objects so that the front one hides a part of the other within `HIDDEN`."""
    axis = torch.linspace(-1, 1, 65)
    while True:
        turn = rng.uniform(0, 2 * math.pi)
        way = rng.uniform(0.3, 1.0) * (front.radius + behind.radius)
        x, y = way * math.cos(turn), way * math.sin(turn)
        covers = signed_distance(front.shape, axis, axis[:, None], front.radius) < 0
        seen = signed_distance(behind.shape, axis - x, axis[:, None] - y, behind.radius) < 0
        if HIDDEN[0] <= ((covers & seen).sum() / seen.sum()).item() <= HIDDEN[1]:
            return [
                replace(front, centre=(-x / 2, -y / 2)),
                replace(behind, centre=(x / 2, y / 2)),
            ]


def _clip(rng: random.Random, number: int) -> World:
    """Draw a moving scene, held out or not."""
    pan = rng.choice(PANS) if rng.random() < 0.3 else None
    pan_length = rng.uniform(*PAN_LENGTH) if pan else 0.0
    things = []
    for colour in rng.sample(tuple(COLOURS), number):
        size = rng.choice(tuple(CLIP_SIZES))
        radius = rng.uniform(*CLIP_SIZES[size])
        motion = rng.choice(SCENE_MOTIONS)
        reach = 1 - radius - pan_length / 2  # a centre stays within this, so nothing is cut off
        reach -= 0.5 * radius if motion == "growing" else 0.0
        across = rng.uniform(-reach, reach)
        way = rng.uniform(0.75, 1.0) * reach
        centre = (across, rng.uniform(-reach, reach))
        if motion in {"moving right", "moving left"}:
            centre = (0.0, across)
        elif motion in {"moving up", "moving down"}:
            centre = (across, 0.0)
        things.append(
            Thing(rng.choice(SHAPES), colour, size, radius, centre, motion=motion, travel=2 * way)
        )
    texture = "dotted" if pan else rng.choice(SCENE_TEXTURES)
    return World(
        tuple(things), **_background(rng), texture=texture, pan=pan, pan_length=pan_length
    )


def _background(rng: random.Random) -> dict[str, Any]:
    """Draw what every scene has beside its objects."""
    return {
        "background": rng.choice(tuple(BACKGROUNDS)),
        "phase": rng.uniform(0, 2 * math.pi),
        "angle": rng.choice((0.0, math.pi / 4, math.pi / 2, -math.pi / 4)),
    }
