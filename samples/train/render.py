# SPDX-License-Identifier: Apache-2.0
"""Draw the scenes of ``scenes.py`` as pictures and clips."""

import math

import torch
from data import BACKGROUNDS, COLOURS, STRIPES, signed_distance
from scenes import Thing, World, clip_scene, picture_scene
from torch import Tensor

DOTS = 6.0  # rows of dots per half picture width
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


def picture(
    index: int,
    pixels: int = 384,
    *,
    held_out: bool | None = False,
    count: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, World]:
    """Render picture ``index``: ``[3, pixels, pixels]`` in [-1, 1], and its scene."""
    world = picture_scene(index, held_out=held_out, count=count, seed=seed)
    return draw(world, 1, pixels)[:, 0], world


def scene_clip(
    index: int,
    frames: int = 33,
    pixels: int = 128,
    *,
    held_out: bool | None = False,
    count: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, World]:
    """Render clip ``index``: ``[3, frames, pixels, pixels]`` in [-1, 1], and its scene."""
    world = clip_scene(index, held_out=held_out, count=count, seed=seed)
    return draw(world, frames, pixels), world


def draw(world: World, frames: int, pixels: int) -> Tensor:
    """Draw ``world``: float32 ``[3, frames, pixels, pixels]`` in [-1, 1], edges one pixel wide."""
    x, y, time, (pan_x, pan_y) = _coordinates(world, frames, pixels)
    video = _background(world, x + pan_x, y + pan_y)  # [3, frames, pixels, pixels]
    for thing in reversed(world.things):
        alpha, dx, dy, radius = _outline(thing, x + pan_x, y + pan_y, time, pixels)
        shade = 1 - 0.12 * ((dx + dy) / (radius + 0.05)).clamp(-1, 1)
        colour = (torch.tensor(COLOURS[thing.colour]).view(3, 1, 1, 1) * shade).clamp(0, 1)
        video = video * (1 - alpha) + colour * alpha
    return video * 2 - 1


def visible_shares(world: World, frames: int = 1, pixels: int = 64) -> list[float]:
    """Give per object the share of its area that is inside the picture and not hidden."""
    wide = 2 * pixels  # a picture of twice the width around the true one, to see what is cut off
    x, y, time, (pan_x, pan_y) = _coordinates(world, frames, wide, extent=2.0)
    inside = (x.abs() < 1) & (y.abs() < 1)
    free = torch.ones(frames, wide, wide)
    shares = []
    for thing in world.things:
        alpha = _outline(thing, x + pan_x, y + pan_y, time, pixels)[0]
        shares.append(((alpha * free * inside).sum() / alpha.sum()).item())
        free = free * (1 - alpha)
    return shares


def _coordinates(
    world: World, frames: int, pixels: int, extent: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Give x and y of every pixel, the time of every frame and how far the camera has turned."""
    edge = extent * (1 - 1 / pixels)
    axis = torch.linspace(-edge, edge, pixels)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    time = (
        torch.linspace(0, 1, frames).view(-1, 1, 1) if frames > 1 else torch.full((1, 1, 1), 0.5)
    )
    right, down = DIRECTIONS[world.pan] if world.pan else (0.0, 0.0)
    turned = world.pan_length * (time - 0.5)
    return x, y, time, (right * turned, down * turned)


def _outline(
    thing: Thing, x: Tensor, y: Tensor, time: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the object's cover ``[frames, H, W]``, the way from its centre, and its radius."""
    motion = thing.motion or ""
    radius = torch.full_like(time, thing.radius)
    if motion == "growing":
        radius = radius * (0.5 + time)
    right, down = DIRECTIONS.get(motion.removeprefix("moving "), (0.0, 0.0))
    way = thing.travel * (time - 0.5)
    dx, dy = x - (thing.centre[0] + right * way), y - (thing.centre[1] + down * way)
    distance = signed_distance(thing.shape, dx, dy, radius)
    return (0.5 - distance * pixels / 2.4).clamp(0, 1), dx, dy, radius


def _background(world: World, x: Tensor, y: Tensor) -> Tensor:
    """Paint the background ``[3, frames, H, W]`` in [0, 1] at the places the camera sees."""
    if world.texture == "plain":  # a faint ramp
        pattern = 0.5 * (x * math.cos(world.phase) + y * math.sin(world.phase))
    elif world.texture == "striped":
        along = x * math.cos(world.angle) + y * math.sin(world.angle)
        pattern = torch.tanh(4 * torch.sin(STRIPES * along + world.phase))
    else:
        pattern = _dots(x, y, world.phase)
    base = torch.tensor(BACKGROUNDS[world.background]).view(3, 1, 1, 1)
    return (base * (1 + 0.35 * pattern) + 0.05 * pattern).clamp(0, 1)


def _dots(x: Tensor, y: Tensor, phase: float) -> Tensor:
    """Put a soft dot at a random place of every cell, so that no shift looks like another."""
    column, row = torch.floor(x * DOTS / 2), torch.floor(y * DOTS / 2)

    def scatter(a: float, b: float) -> Tensor:  # a number in [0, 1) per cell
        return (torch.sin(a * column + b * row + phase) * 43758.5453).remainder(1)

    dx = x * DOTS / 2 - column - (0.25 + 0.5 * scatter(12.9898, 78.233))
    dy = y * DOTS / 2 - row - (0.25 + 0.5 * scatter(39.3468, 11.135))
    size = 0.12 + 0.12 * scatter(73.156, 52.235)
    return 1.3 * torch.sigmoid(30 * (size - torch.sqrt(dx * dx + dy * dy + 1e-9))) - 0.3
