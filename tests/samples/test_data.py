# SPDX-License-Identifier: Apache-2.0
"""Scenes of several objects follow from their index, say what they show and are read back."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

SAMPLES = Path(__file__).parents[2] / "samples"
CHECKED_PICTURES, CHECKED_CLIPS = 24, 4
INDICES = st.integers(0, 10**9)


@given(index=INDICES, seed=st.integers(0, 1000))
def test_a_picture_follows_from_its_index(index, seed):
    from captions import caption
    from render import picture

    first, scene = picture(index, 32, seed=seed)
    second, again = picture(index, 32, seed=seed)
    assert scene == again
    assert torch.equal(first, second)
    assert caption(index, scene) == caption(index, again)
    assert first.shape == (3, 32, 32)
    assert first.abs().max() <= 1


def test_pictures_differ_by_index_and_by_seed():
    from render import picture

    scenes = {picture(index, 8, seed=seed)[1] for index in range(20) for seed in range(3)}
    assert len(scenes) == 60


@given(index=INDICES)
def test_a_clip_follows_from_its_index_and_moves_what_it_says(index):
    from captions import full_caption
    from render import scene_clip

    video, scene = scene_clip(index, 5, 48)
    assert torch.equal(video, scene_clip(index, 5, 48)[0])
    assert video.shape == (3, 5, 48, 48)
    still = scene.pan is None and all(t.motion == "standing still" for t in scene.things)
    assert torch.equal(video[:, 0], video[:, 4]) == still
    assert ("camera" in full_caption(scene)) == (scene.pan is not None)


@given(index=INDICES, count=st.sampled_from([None, 1, 2, 3]))
def test_captions_name_every_object_once_in_known_words(index, count):
    from captions import caption, full_caption, short_caption, vocabulary
    from scenes import clip_scene, picture_scene

    known = set(vocabulary())
    for scene in (picture_scene(index, count=count), clip_scene(index, count=count)):
        assert count in {None, len(scene.things)}
        colours = [thing.colour for thing in scene.things]
        assert len(set(colours)) == len(colours)
        for text in (full_caption(scene), short_caption(scene, relation=False)):
            words = text.split()
            assert set(words) <= known
            named = [(a, b) for a, b in itertools.pairwise(words) if a in colours]
            assert named == [(thing.colour, thing.shape) for thing in scene.things]
        assert caption(index, scene) == "" or set(caption(index, scene).split()) <= known


@pytest.mark.parametrize(
    ("places", "relation", "words"),
    [
        (("left", "right"), True, "a red circle left of a blue square"),
        (("left", "right"), False, "a red circle on the left and a blue square on the right"),
        (("bottom", "top"), True, "a red circle below a blue square"),
        (("front", "behind"), False, "a red circle in front of a blue square"),
    ],
)
def test_a_place_is_told_by_one_word_or_by_two(places, relation, words):
    from captions import short_caption
    from scenes import Thing, World

    things = tuple(
        Thing(shape, colour, "small", 0.2, (0.0, 0.0), place)
        for shape, colour, place in zip(("circle", "square"), ("red", "blue"), places, strict=True)
    )
    world = World(things, "black", "plain", 0.0, 0.0)
    assert short_caption(world, relation=relation) == words


def test_held_out_objects_never_train():
    from scenes import PLACES, clip_scene, is_held_out_place, picture_scene

    assert not any(picture_scene(index).held_out for index in range(300))
    assert not any(clip_scene(index).held_out for index in range(300))
    assert all(picture_scene(index, held_out=True).held_out for index in range(50))
    from data import COLOURS, SHAPES

    held = [
        (shape, colour, place)
        for shape in SHAPES
        for colour in COLOURS
        for place in PLACES
        if is_held_out_place(shape, colour, place)
    ]
    assert 0 < len(held) < 75 / 4
    for column in range(3):  # each single word stays in training
        total = 75 // len({combination[column] for combination in held} or {0})
        for word in {combination[column] for combination in held}:
            assert sum(combination[column] == word for combination in held) < total


def test_the_first_named_object_stands_in_front():
    from render import draw
    from scenes import Thing, World

    red = Thing("square", "red", "big", 0.4, (0.0, 0.0), "front")
    blue = Thing("square", "blue", "big", 0.4, (0.2, 0.0), "behind")
    world = World((red, blue), "black", "plain", 0.0, 0.0)
    middle = draw(world, 1, 64)[:, 0, 32, 40]  # x about 0.27, inside both
    assert middle[0] > 0.5 > middle[2]
    swapped = draw(dataclasses.replace(world, things=(blue, red)), 1, 64)[:, 0, 32, 40]
    assert swapped[2] > 0.5 > swapped[0]


def test_a_pan_moves_everything_the_other_way():
    from render import draw
    from scenes import Thing, World

    thing = Thing("square", "white", "small", 0.2, (0.0, 0.0), motion="standing still")
    world = World((thing,), "black", "dotted", 1.0, 0.0, pan="right", pan_length=0.5)
    video = draw(world, 5, 64)
    # half a half-width is 16 of 64 pixels: the first frame, moved left, is the last one
    assert torch.allclose(video[:, 0, :, 16:], video[:, 4, :, :-16], atol=1e-4)
    assert not torch.allclose(video[:, 0], video[:, 4], atol=0.1)


def test_visible_shares_see_what_is_covered_and_what_is_cut_off():
    from render import visible_shares
    from scenes import Thing, World

    front = Thing("square", "red", "big", 0.4, (0.0, 0.0), "front")
    behind = Thing("square", "blue", "big", 0.4, (0.344, 0.0), "behind")  # half of 0.4 x 0.86 x 2
    cut = Thing("circle", "green", "small", 0.2, (1.0, 0.8), "right")
    shares = visible_shares(World((front, behind, cut), "black", "plain", 0.0, 0.0))
    assert shares == pytest.approx([1.0, 0.5, 0.5], abs=0.05)


def test_rendered_pictures_are_read_back():
    from check_scenes import count

    counts = count("pictures", CHECKED_PICTURES, 192)
    assert counts["free shape"] == counts["free objects"] > CHECKED_PICTURES
    assert counts["free place or motion"] >= 0.97 * counts["free objects"]
    assert counts["covered place or motion"] >= 0.7 * counts["covered objects"]
    assert counts["whole scene"] >= 0.95 * CHECKED_PICTURES


def test_rendered_clips_are_read_back():
    from check_scenes import count

    counts = count("clips", CHECKED_CLIPS, 96)
    assert counts["free shape"] >= 0.95 * counts["free objects"]
    assert counts["free place or motion"] >= 0.9 * counts["free objects"]
    assert counts["pan"] >= 0.9 * CHECKED_CLIPS


def test_the_reader_does_not_say_yes_to_another_scene():
    from read_scene import read_picture
    from render import picture

    wrong = 0
    for index in range(12):
        image, _ = picture(index, 96, held_out=None, seed=300)
        other = picture(index + 1, 8, held_out=None, seed=300)[1]
        wrong += read_picture((image.permute(1, 2, 0) + 1) / 2, other).right
    assert wrong == 0


@pytest.mark.parametrize("change", ["shape", "colour", "place"])
def test_one_wrong_word_is_told_apart(change):
    from read_scene import read_picture
    from render import draw
    from scenes import Thing, World

    thing = Thing("circle", "red", "big", 0.33, (0.5, 0.0), "right")
    world = World((thing,), "gray", "striped", 0.5, 0.0)
    image = (draw(world, 1, 128)[:, 0].permute(1, 2, 0) + 1) / 2
    assert read_picture(image, world).right
    other = {"shape": "square", "colour": "green", "place": "top"}[change]
    asked = dataclasses.replace(world, things=(dataclasses.replace(thing, **{change: other}),))
    (answer,) = read_picture(image, asked).answers
    wrong = {"shape", "place"} if change == "colour" else set()  # nothing green has a shape
    words = {word for word in ("colour", "shape", "place") if not getattr(answer, word)}
    assert words == {change} | wrong


def test_in_front_is_told_from_behind():
    from read_scene import read_picture
    from render import draw
    from scenes import picture_scene

    told = 0
    for index in range(24):
        world = picture_scene(index, count=2)
        if world.things[0].place != "front":
            continue
        image = (draw(world, 1, 192)[:, 0].permute(1, 2, 0) + 1) / 2
        first, second = world.things
        swapped = (
            dataclasses.replace(second, place="front"),
            dataclasses.replace(first, place="behind"),
        )
        wrong = read_picture(image, dataclasses.replace(world, things=swapped))
        assert not any(answer.place for answer in wrong.answers)
        assert all(answer.colour and answer.shape for answer in wrong.answers)
        told += read_picture(image, world).right
    assert told >= 3


def test_an_empty_picture_shows_nothing():
    from read_scene import read_picture
    from scenes import picture_scene

    world = picture_scene(0)
    reading = read_picture(torch.zeros(64, 64, 3), world)
    assert not any(answer.colour or answer.shape or answer.place for answer in reading.answers)
    assert not reading.right


def test_patches_of_pictures_go_there_and_back():
    from picture_latents import from_patches, to_patches

    image = torch.randn(3, 24, 16)
    assert torch.equal(from_patches(to_patches(image)), image)
    patch = to_patches(image)[1, 2]
    assert torch.equal(patch.view(3, 4, 4), image[:, 4:8, 8:12])
