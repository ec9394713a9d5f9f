# SPDX-License-Identifier: Apache-2.0
"""Describe the scenes of ``scenes.py`` in words.

A picture: ``a big red circle on the left and a blue square at the top over a gray background``,
``a red circle left of a blue square``, ``a red circle in front of a blue square``.
A clip: ``a red circle moving up and a blue square standing still while the camera pans left``.
"""

import random

from data import BACKGROUNDS, COLOURS, EMPTY_SHARE, SHAPES
from scenes import DEPTHS, OPPOSITES, PANS, SCENE_MOTIONS, SCENE_TEXTURES, SIZES, Thing, World

PLACE_WORDS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
RELATION_WORDS = {
    "left": "left of",
    "right": "right of",
    "top": "above",
    "bottom": "below",
    "front": "in front of",
}


def vocabulary() -> list[str]:
    """List every word of every caption, sorted."""
    phrases = [*PLACE_WORDS.values(), *RELATION_WORDS.values(), *SCENE_MOTIONS]
    phrases += [*COLOURS, *BACKGROUNDS, *SHAPES, *SCENE_TEXTURES, *SIZES, *PANS]
    phrases.append("a and over background while the camera pans")
    return sorted({word for phrase in phrases for word in phrase.split()})


def full_caption(world: World, *, relation: bool = True) -> str:
    """Write every word; ``relation`` says which of two objects' places are told by one word."""
    sizes = [True] * len(world.things)
    return _write(world, sizes, relation=relation, background=True, texture=True)


def short_caption(world: World, *, relation: bool = True) -> str:
    """Write what the checker reads back: shapes, colours and places or motions, and the pan."""
    sizes = [False] * len(world.things)
    return _write(world, sizes, relation=relation, background=False, texture=False)


def caption(index: int, world: World, *, seed: int = 0) -> str:
    """Write the training caption of scene ``index``: parts of it, or all of it, are left out."""
    rng = random.Random(f"scene caption {seed}/{index}")
    if rng.random() < EMPTY_SHARE:
        return ""
    return _write(
        world,
        [rng.random() < 0.5 for _ in world.things],
        relation=rng.random() < 0.5,
        background=rng.random() < 0.6,
        texture=rng.random() < 0.6,
    )


def _write(
    world: World, sizes: list[bool], *, relation: bool, background: bool, texture: bool
) -> str:
    """Put the chosen parts together."""
    names = [
        f"a {thing.size} {thing.colour} {thing.shape}"
        if size
        else f"a {thing.colour} {thing.shape}"
        for thing, size in zip(world.things, sizes, strict=True)
    ]
    places = tuple(thing.place for thing in world.things)
    related = places in {*OPPOSITES, *(pair[::-1] for pair in OPPOSITES)}
    if related and (relation or places == DEPTHS):
        words = [names[0], RELATION_WORDS[str(places[0])], names[1]]
    else:
        told = [f"{name} {_where(thing)}" for name, thing in zip(names, world.things, strict=True)]
        words = [" and ".join(told)]
    if background:
        words += ["over a", world.background, *([world.texture] if texture else []), "background"]
    if world.pan:
        words += ["while the camera pans", world.pan]
    return " ".join(words)


def _where(thing: Thing) -> str:
    """Say where an object is, or how it moves."""
    return thing.motion if thing.motion is not None else PLACE_WORDS[str(thing.place)]
