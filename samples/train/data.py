# SPDX-License-Identifier: Apache-2.0
"""Render captioned clips: one coloured shape that moves over a dark background.

Everything about a clip follows from its index: ``sample(index)`` draws the words, ``clip(index)``
renders them. Colours of shapes and of backgrounds share no word, so a caption binds one way only.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.97, 0.90, 0.15),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.45, 0.45, 0.45),
    "navy": (0.08, 0.10, 0.35),
    "maroon": (0.38, 0.05, 0.12),
}
SHAPES = ("circle", "square", "triangle")
TEXTURES = ("plain", "striped")
MOTIONS = ("moving right", "moving left", "moving up", "moving down", "growing")
SIZES = {"small": (0.27, 0.33), "big": (0.38, 0.46)}  # radius, in half picture widths

EMPTY_SHARE = 0.10  # captions that are dropped whole, for classifier-free guidance
STRIPES = 7.0  # radians per half picture width


@dataclass(frozen=True, slots=True)
class Scene:
    """Words and numbers that one clip is drawn from; lengths in half picture widths."""

    shape: str
    colour: str
    motion: str
    background: str
    texture: str
    size: str
    radius: float
    travel: float  # share of the free way that a moving shape covers, [0.75, 1]
    offset: tuple[float, float]  # (x, y) of the axis that does not move, share of the free way
    phase: float  # of the background pattern, radians
    angle: float  # of the stripes, radians

    @property
    def held_out(self) -> bool:
        """Say whether this (shape, colour, motion) never occurs in training."""
        return is_held_out(self.shape, self.colour, self.motion)


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Keep 9 of the 75 combinations out of training; each single word stays in it."""
    code = 3 * SHAPES.index(shape) + list(COLOURS).index(colour) + 2 * MOTIONS.index(motion)
    return code % 8 == 1


def sample(index: int, *, held_out: bool | None = False, seed: int = 0) -> Scene:
    """Draw the scene number ``index``.

    Args:
        index: Any integer; the same index and seed always give the same scene.
        held_out: False draws training combinations, True held-out ones, None both.
        seed: Separates data sets: 0 trains the transformer, other numbers train the VAE and test.
    """
    rng = random.Random(f"{seed}/{index}")
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        motion = rng.choice(MOTIONS)
        if held_out is None or is_held_out(shape, colour, motion) == held_out:
            break
    size = rng.choice(tuple(SIZES))
    return Scene(
        shape=shape,
        colour=colour,
        motion=motion,
        background=rng.choice(tuple(BACKGROUNDS)),
        texture=rng.choice(TEXTURES),
        size=size,
        radius=rng.uniform(*SIZES[size]),
        travel=rng.uniform(0.75, 1.0),
        offset=(rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)),
        phase=rng.uniform(0, 2 * math.pi),
        angle=rng.choice((0.0, math.pi / 4, math.pi / 2, -math.pi / 4)),
    )


def full_caption(scene: Scene) -> str:
    """Write every word: ``a big red circle moving right over a gray plain background``."""
    return (
        f"a {scene.size} {scene.colour} {scene.shape} {scene.motion} "
        f"over a {scene.background} {scene.texture} background"
    )


def short_caption(scene: Scene) -> str:
    """Write what the checker reads back: ``a red circle moving right``."""
    return f"a {scene.colour} {scene.shape} {scene.motion}"


def caption(index: int, scene: Scene, *, seed: int = 0) -> str:
    """Write the training caption of clip ``index``: parts of it, or all of it, may be dropped."""
    rng = random.Random(f"caption {seed}/{index}")
    if rng.random() < EMPTY_SHARE:
        return ""
    words = ["a"]
    if rng.random() < 0.6:
        words.append(scene.size)
    words += [scene.colour, scene.shape, scene.motion]
    if rng.random() < 0.6:
        words += ["over", "a", scene.background]
        if rng.random() < 0.8:
            words.append(scene.texture)
        words.append("background")
    return " ".join(words)


def clip(
    index: int,
    frames: int = 33,
    pixels: int = 128,
    *,
    held_out: bool | None = False,
    seed: int = 0,
) -> tuple[Tensor, Scene]:
    """Render clip ``index``: video ``[3, frames, pixels, pixels]`` in [-1, 1], and its scene."""
    scene = sample(index, held_out=held_out, seed=seed)
    return render(scene, frames, pixels), scene


def render(scene: Scene, frames: int, pixels: int) -> Tensor:
    """Draw ``scene``: float32 ``[3, frames, pixels, pixels]`` in [-1, 1], edges one pixel wide."""
    axis = torch.linspace(-1 + 1 / pixels, 1 - 1 / pixels, pixels)
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # [pixels, pixels]
    centre_x, centre_y, radius = _path(scene, torch.linspace(0, 1, frames).view(-1, 1, 1))
    dx, dy = x - centre_x, y - centre_y  # [frames, pixels, pixels]
    distance = signed_distance(scene.shape, dx, dy, radius)
    alpha = (0.5 - distance * pixels / 2.4).clamp(0, 1)[None]  # [1, frames, pixels, pixels]
    shade = 1 - 0.12 * ((dx + dy) / (radius + 0.05)).clamp(-1, 1)
    shape = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1) * shade
    video = _background(scene, x, y)[:, None] * (1 - alpha) + shape.clamp(0, 1) * alpha
    return video * 2 - 1


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Measure the way to the outline of ``shape`` around the origin; negative inside."""
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.86
    if shape == "triangle":  # equilateral, one corner up; image y points down
        slope = math.sqrt(3)
        sides = torch.maximum(slope * dx - dy, -slope * dx - dy) / 2 - radius * 0.5
        return torch.maximum(dy - radius * 0.6, sides)
    message = f"shape must be one of {SHAPES}, got {shape!r}"
    raise ValueError(message)


def _path(scene: Scene, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place the shape at every time in [0, 1]: centre x, centre y, radius, shaped like time."""
    free = 1 - scene.radius
    way = scene.travel * free * (2 * time - 1)  # from one side to the other
    centre_x = torch.full_like(time, scene.offset[0] * free)
    centre_y = torch.full_like(time, scene.offset[1] * free)
    radius = torch.full_like(time, scene.radius)
    if scene.motion == "moving right":
        centre_x = way
    elif scene.motion == "moving left":
        centre_x = -way
    elif scene.motion == "moving down":
        centre_y = way
    elif scene.motion == "moving up":
        centre_y = -way
    else:
        radius = radius * (0.4 + 1.1 * time)
    return centre_x, centre_y, radius


def _background(scene: Scene, x: Tensor, y: Tensor) -> Tensor:
    """Paint the still background ``[3, pixels, pixels]`` in [0, 1]."""
    if scene.texture == "plain":  # a faint ramp
        pattern = 0.5 * (x * math.cos(scene.phase) + y * math.sin(scene.phase))
    else:
        along = x * math.cos(scene.angle) + y * math.sin(scene.angle)
        pattern = torch.tanh(4 * torch.sin(STRIPES * along + scene.phase))
    base = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1)
    return (base * (1 + 0.35 * pattern) + 0.05 * pattern).clamp(0, 1)
