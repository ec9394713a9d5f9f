# SPDX-License-Identifier: Apache-2.0
"""Read every object of a scene back from a clip: colour, shape, motion, and the camera's pan.

A few frames are read like pictures (``read_scene.py``). The background's drift from one to the
next, found by matching the pixels that no object covers, is the camera's; what an outline drifts
beyond that is the object's own motion.
"""

import torch
from read_scene import SIDE, Answer, Found, SceneReading, colour_masks, find, has_extras
from scenes import World
from torch import Tensor, nn

READ_FRAMES = 5  # evenly spaced
MIN_DRIFT = 0.22  # half picture widths over a clip, of a shape that moves
MIN_GROWTH = 1.5  # of the radius
MIN_PAN = 0.2  # half picture widths over a clip
LEAST_AREA = 0.0015  # share of a frame; an object that grows starts small
COARSE = SIDE // 2  # pixels per side that the background is followed at
REACH = 5  # pixels of these that it may drift between two frames


def read_clip(video: Tensor, world: World) -> SceneReading:
    """Compare a clip ``[frames, H, W, 3]``, [0, 1], with the scene that was asked for."""
    chosen = torch.linspace(0, len(video) - 1, READ_FRAMES).round().long()
    frames = [video[number] for number in chosen]
    masks = [colour_masks(frame) for frame in frames]
    drifts = background_drifts(frames, masks)  # [READ_FRAMES, 2]
    answers = []
    for thing in world.things:
        found = [find(mask, thing.colour, LEAST_AREA) for mask in masks]
        seen = [
            (number, one) for number, one in enumerate(found) if one is not None and _whole(one)
        ]
        seen = seen or [(number, one) for number, one in enumerate(found) if one is not None]
        names = [one.shape for _, one in seen]
        shape = max(set(names), key=names.count) if names else None
        motion = _motion(seen, drifts)
        answers.append(Answer(bool(seen), shape == thing.shape, motion == thing.motion))
    extras = any(has_extras(mask, world) for mask in masks)
    return SceneReading(tuple(answers), extras, _direction(drifts[-1]) == _seen_pan(world))


def _whole(one: Found) -> bool:
    """Say whether an outline lies inside the frame and its fit is good."""
    reach = max(abs(value) for value in one.centre) + 0.8 * one.radius
    return one.shape is not None and reach < 1


def _motion(seen: list[tuple[int, Found]], drifts: Tensor) -> str | None:
    """Name the motion from the first to the last frame that shows the object."""
    if len(seen) < 2 or seen[-1][0] - seen[0][0] < 2:
        return None
    (first, start), (last, end) = seen[0], seen[-1]
    share = (READ_FRAMES - 1) / (last - first)  # to the whole clip
    moved = torch.tensor(end.centre) - torch.tensor(start.centre) - drifts[last] + drifts[first]
    right, down = (moved * share).tolist()
    if max(abs(right), abs(down)) < MIN_DRIFT:
        growth = (end.radius / start.radius) ** share
        return "growing" if growth >= MIN_GROWTH else "standing still"
    if abs(right) >= abs(down):
        return "moving right" if right > 0 else "moving left"
    return "moving down" if down > 0 else "moving up"


def background_drifts(frames: list[Tensor], masks: list[dict[str, Tensor]]) -> Tensor:
    """Follow the background: its place in every frame ``[frames, 2]`` (x, y), first at 0."""
    free = []
    for mask in masks:  # without the objects and their edges
        objects = torch.stack(list(mask.values())).any(dim=0)[None, None].float()
        free.append(nn.functional.max_pool2d(objects, 7, 2, 3)[0, 0] == 0)
    small = [_shrink(frame) for frame in frames]
    places = [torch.zeros(2)]
    for number in range(1, len(frames)):
        pair = slice(number - 1, number + 1)
        places.append(places[-1] + _shift(small[pair], free[pair]) * 2 / COARSE)
    return torch.stack(places)


def _shrink(frame: Tensor) -> Tensor:
    """Average ``[H, W, 3]`` to ``[3, COARSE, COARSE]``."""
    return nn.functional.interpolate(
        frame.permute(2, 0, 1)[None].float(), (COARSE, COARSE), mode="area"
    )[0]


def _shift(pair: list[Tensor], free: list[Tensor]) -> Tensor:
    """Find the shift (x, y), in pixels, that best carries the first frame onto the second."""
    best, least = torch.zeros(2), float("inf")
    inner = slice(REACH, COARSE - REACH)
    steps = sorted(range(-REACH, REACH + 1), key=abs)  # of equal fits the shortest is taken
    for x, y in ((x, y) for x in steps for y in steps):
        rows, columns = (slice(REACH - way, COARSE - REACH - way) for way in (y, x))
        both = free[0][rows, columns] & free[1][inner, inner]
        apart = (pair[0][:, rows, columns] - pair[1][:, inner, inner]).square().sum(dim=0)
        error = (
            (apart * both).sum() / both.sum().clamp(min=1) if both.any() else apart.new_ones(())
        )
        cost = error.item() * (1 + 0.01 * (abs(x) + abs(y))) + 1e-7 * (abs(x) + abs(y))
        if cost < least:
            best, least = torch.tensor([float(x), float(y)]), cost
    return best


def _direction(drift: Tensor) -> str | None:
    """Name where the background has gone; None where it stays."""
    right, down = drift.tolist()
    if max(abs(right), abs(down)) < MIN_PAN:
        return None
    if abs(right) >= abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _seen_pan(world: World) -> str | None:
    """Name where the background goes while the camera pans the other way."""
    opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
    return opposite[world.pan] if world.pan else None
