# SPDX-License-Identifier: Apache-2.0
"""The generalised Hilbert curve through a box: neighbours on the curve are neighbours in space.

Source: the recursion of Jakub Cerveny's "gilbert" curve for boxes of any size, which BLADE
(arXiv:2508.10774) orders its tokens by. Where an extent is odd a few steps are longer than one.
The order is exactly the reference's, as BLADE's released weights were trained on its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import LatentsGrid

Vector = tuple[int, int, int]
Box = tuple[Vector, Vector, Vector, Vector]


def gilbert_order(grid: LatentsGrid) -> Tensor:
    """Order all tokens: video along the curve, text where it was.

    Returns:
        ``permutation[slot] = token``, int64 ``[1, 1, tokens]``.
    """
    at = curve(grid.width, grid.height, grid.frames)
    video = at[:, 0] + grid.width * (at[:, 1] + grid.height * at[:, 2])
    order = torch.arange(grid.tokens)
    order[grid.video_start : grid.video_start + grid.video_tokens] = video + grid.video_start
    return order[None, None]


def curve(width: int, height: int, depth: int) -> Tensor:
    """Walk through every (x, y, z) of the box once, along its longest side on the whole.

    Returns:
        Places in the order of the walk, int64 ``[tokens, 3]``.
    """
    x, y, z = (width, 0, 0), (0, height, 0), (0, 0, depth)
    if width >= height and width >= depth:
        axes = (x, y, z)
    elif height >= width and height >= depth:
        axes = (y, x, z)
    else:
        axes = (z, x, y)
    return _walk(*axes, {})


def _walk(a: Vector, b: Vector, c: Vector, known: dict[tuple[Vector, ...], Tensor]) -> Tensor:
    """Walk through a box from its first corner at 0; boxes of the same axes are walked once."""
    if (a, b, c) in known:
        return known[a, b, c]
    extents = [abs(sum(axis)) for axis in (a, b, c)]
    lines = [axis for axis, extent in zip((a, b, c), extents, strict=True) if extent > 1]
    if 0 in extents:
        walked = torch.empty(0, 3, dtype=torch.int64)
    elif len(lines) <= 1:
        unit = torch.tensor(_unit(lines[0]) if lines else (0, 0, 0))
        walked = torch.arange(max(extents))[:, None] * unit
    else:
        boxes = _split((0, 0, 0), a, b, c)
        walked = torch.cat([torch.tensor(at) + _walk(u, v, w, known) for at, u, v, w in boxes])
    known[a, b, c] = walked
    return walked


def _split(start: Vector, a: Vector, b: Vector, c: Vector) -> list[Box]:
    """Cut a box, crossed from ``start`` along ``a``, into boxes that are crossed one by one."""
    width, height, depth = (abs(sum(axis)) for axis in (a, b, c))
    a_half, b_half, c_half = _half(a), _half(b), _half(c)
    a_rest, b_rest, c_rest = _less(a, a_half), _less(b, b_half), _less(c, c_half)
    a_end = _less(a, _unit(a))  # from the box's first token to its last along a
    if 2 * width > 3 * height and 2 * width > 3 * depth:  # long: cut across a
        return [(start, a_half, b, c), (_sum(start, a_half), a_rest, b, c)]
    b_turn = _less(b_half, _unit(b))
    c_turn = _less(c_half, _unit(c))
    c_end = _less(c, _unit(c))
    if 3 * height > 4 * depth:  # flat in c: up, across, down
        return [
            (start, b_half, c, a_half),
            (_sum(start, b_half), a, b_rest, c),
            (_sum(start, a_end, b_turn), _minus(b_half), c, _minus(a_rest)),
        ]
    if 3 * depth > 4 * height:  # flat in b
        return [
            (start, c_half, a_half, b),
            (_sum(start, c_half), a, b, c_rest),
            (_sum(start, a_end, c_turn), _minus(c_half), _minus(a_rest), b),
        ]
    return [
        (start, b_half, c_half, a_half),
        (_sum(start, b_half), c, a_half, b_rest),
        (_sum(start, b_turn, c_end), a, _minus(b_half), _minus(c_rest)),
        (_sum(start, a_end, b_half, c_end), _minus(c), _minus(a_rest), b_rest),
        (_sum(start, a_end, b_turn), _minus(b_half), c_half, _minus(a_rest)),
    ]


def _half(axis: Vector) -> Vector:
    """Halve an axis as the reference curve does, so that its order is this one's.

    Each signed component is rounded down, so that an odd axis which runs backwards is cut after
    its larger part; where the half is odd and the axis longer than 2, one step is added to it.
    """
    half = (axis[0] // 2, axis[1] // 2, axis[2] // 2)
    if abs(sum(half)) % 2 and abs(sum(axis)) > 2:
        half = _sum(half, _unit(axis))
    return half


def _unit(axis: Vector) -> Vector:
    return tuple((n > 0) - (n < 0) for n in axis)  # type: ignore[return-value]


def _times(axis: Vector, factor: int) -> Vector:
    return (axis[0] * factor, axis[1] * factor, axis[2] * factor)


def _minus(axis: Vector) -> Vector:
    return _times(axis, -1)


def _sum(*vectors: Vector) -> Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))  # type: ignore[return-value]


def _less(one: Vector, other: Vector) -> Vector:
    return _sum(one, _minus(other))
