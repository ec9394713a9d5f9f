# SPDX-License-Identifier: Apache-2.0
"""Small pictures inside a page: palette PNGs as data addresses, equal ones once, in a budget."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.inspect.draw import DROPPED, KEPT

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 3_500_000  # bytes of addresses in one page
LEVELS = 32  # colours of a picture
SIDE, BIN = 48, 64  # pixels of a map's side at most, tokens of one at least: blocks stay sharp
FRAMES = 12  # frames of a token grid that are shown, evenly spread
FRAME_SIDE = 64  # pixels of a frame's longer side at most
GAP = 1  # pixels between frames
# From little to much mass: pale, blue, violet, red, yellow.
HEAT = ((247, 249, 252), (176, 205, 236), (96, 125, 200), (128, 60, 150), (205, 60, 90),
        (250, 160, 60), (253, 231, 120))  # fmt: skip


class Pictures:
    """Pictures by number, up to a budget.

    Args:
        budget: Bytes of all addresses together; what does not fit is left out and counted.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.addresses: list[str] = []
        self.left_out = 0
        self._room = budget
        self._known: dict[str, int] = {}

    def add(self, address: str) -> int | None:
        """Keep a picture; None: it does not fit."""
        if address in self._known:
            return self._known[address]
        if len(address) > self._room:
            self.left_out += 1
            return None
        self._room -= len(address)
        self._known[address] = len(self.addresses)
        self.addresses.append(address)
        return self._known[address]


def map_side(tokens: int) -> int:
    """Give the pixels of a map's side for a sequence."""
    return min(SIDE, -(-tokens // BIN))


def kept_picture(kept_map: Tensor) -> str:
    """Draw shares of kept pairs in [0, 1], queries down, keys across."""
    side = min(SIDE, kept_map.shape[0])
    # The square root shows thin lines that fill a small share of a bin.
    return _address(np.sqrt(_shrunk(kept_map.numpy(), side)), (DROPPED, KEPT))


def mass_picture(mass: Tensor) -> str:
    """Draw softmax mass, queries down, keys across; the scale ends at the map's largest."""
    values = _shrunk(mass.numpy(), min(SIDE, mass.shape[0]))
    return _address(np.sqrt(values / max(float(values.max()), 1e-30)), HEAT)


def seen_picture(seen: Tensor) -> str:
    """Draw the tokens that one query reads, frames side by side: bool ``[frames, h, w]``."""
    frames, height, width = seen.shape
    shown = np.unique(np.linspace(0, frames - 1, min(FRAMES, frames)).round().astype(int))
    scale = max(1, -(-max(height, width) // FRAME_SIDE))
    rows, columns = -(-height // scale), -(-width // scale)
    picture = np.ones((rows, len(shown) * (columns + GAP) - GAP))
    for i, frame in enumerate(shown):
        one = _shrunk(seen[int(frame)].double().numpy(), rows, columns)
        picture[:, i * (columns + GAP) : i * (columns + GAP) + columns] = np.sqrt(one) * 0.999
    return _address(picture, (DROPPED, KEPT), border=(255, 255, 255))


def _shrunk(
    values: np.ndarray[Any, Any], rows: int, columns: int | None = None
) -> np.ndarray[Any, Any]:
    """Average over equal bins of both axes."""
    for axis, count in ((0, rows), (1, columns or rows)):
        size = values.shape[axis]
        cuts = np.arange(count) * size // count
        ends = np.append(cuts[1:], size)
        shape = [1, 1]
        shape[axis] = count
        values = np.add.reduceat(values, cuts, axis) / (ends - cuts).reshape(shape)
    return values


def _address(
    values: np.ndarray[Any, Any],
    stops: tuple[tuple[int, int, int], ...],
    border: tuple[int, int, int] | None = None,
) -> str:
    """Write values in [0, 1] as a PNG; 1 exactly is ``border`` where one is given."""
    from PIL import Image

    levels = np.clip(np.floor(np.asarray(values) * LEVELS), 0, LEVELS - 1).astype(np.uint8)
    if border is not None:
        levels[np.asarray(values) == 1] = LEVELS
    picture = Image.frombytes("P", (levels.shape[1], levels.shape[0]), levels.tobytes())
    places = np.linspace(0, len(stops) - 1, LEVELS)
    colours = np.array(stops, float)
    low = np.floor(places).astype(int).clip(0, len(stops) - 2)
    mixed = colours[low] + (colours[low + 1] - colours[low]) * (places - low)[:, None]
    table = [*mixed.round().astype(int).flatten().tolist(), *(border or (0, 0, 0))]
    picture.putpalette(table)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
