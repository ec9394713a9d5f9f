# SPDX-License-Identifier: Apache-2.0
"""The small models: what each is asked for, and how a clip or picture is read back."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dit_sparse.quality.clips import open_clip

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from checker import check
from data import COLOURS, MOTIONS, SHAPES
from evaluate_pictures import question
from read_scene import read_picture

Reader = Callable[[str, Path], bool]


@dataclass(frozen=True, slots=True)
class Kind:
    """Prompts of models that were trained alike, and their reader.

    Args:
        calibration: Prompts that knobs are set and heads are profiled on.
        held_out: Prompts of the tables.
        read: Says whether a stored clip shows all that its prompt says.
    """

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    read: Reader


def one_shape(prompt: str, clip: Path) -> bool:
    """Say whether colour, shape and motion of the one object are all right."""
    words = [
        next(word for word in known if word in prompt) for known in (COLOURS, SHAPES, MOTIONS)
    ]
    frames = torch.from_numpy(np.stack(list(open_clip(clip).read())))
    return check(frames.float() / 255).matches(*words)


def scene(prompt: str, picture: Path) -> bool:
    """Say whether every object's colour, shape and place are right, and nothing else is there."""
    world, relation = SCENES[prompt]
    frame = torch.from_numpy(next(iter(open_clip(picture).read())).copy())
    return read_picture(frame.float() / 255, world, relation=relation).right


SCENES = {prompt: (world, relation) for world, prompt, relation in map(question, range(50))}

CLIPS = Kind(
    calibration=(
        "a big blue square moving left over a gray plain background",
        "a small yellow triangle moving up",
        "a green circle growing over a maroon striped background",
    ),
    held_out=(
        "a red circle moving right",
        "a small blue square moving up over a black plain background",
        "a big yellow triangle moving down",
        "a white circle moving left over a gray striped background",
        "a green triangle growing over a navy plain background",
    ),
    read=one_shape,
)
PICTURES = Kind(
    calibration=(
        "a small white triangle above a big yellow square over a black plain background",
        "a yellow circle right of a green triangle",
        "a small white square at the top over a maroon plain background",
    ),
    held_out=(
        "a small green circle on the left over a gray striped background",
        "a green square on the left and a blue circle on the right",
        "a red square right of a yellow triangle",
        "a big blue triangle above a small yellow circle over a navy plain background",
        "a green circle on the right and a white square at the top and a red triangle on the left",
    ),
    read=scene,
)
MODELS = {
    "cogvideox-tiny": CLIPS,
    "flux-tiny": PICTURES,
    "hunyuan-video-tiny": CLIPS,
    "pixart-tiny": PICTURES,
    "wan-tiny": CLIPS,
}
