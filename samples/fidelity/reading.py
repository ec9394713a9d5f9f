# SPDX-License-Identifier: Apache-2.0
"""Read a stored clip back with the sample models' checker: does it show what the prompt says?"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dit_sparse.quality.clips import open_clip

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from checker import check
from data import COLOURS, MOTIONS, SHAPES

Reader = Callable[[str, Path], bool]


def reader_of(model: str) -> Reader:
    """Give the reader of a sample model's clips."""
    return {"wan-tiny": one_shape}[model]


def one_shape(prompt: str, clip: Path) -> bool:
    """Say whether colour, shape and motion of the one object are all right."""
    words = [
        next(word for word in known if word in prompt) for known in (COLOURS, SHAPES, MOTIONS)
    ]
    frames = torch.from_numpy(np.stack(list(open_clip(clip).read())))
    return check(frames.float() / 255).matches(*words)
