# SPDX-License-Identifier: Apache-2.0
"""Walk two clips side by side, and what a meter is: it sees each pair of frames once.

Frames are read as they come and never all held, so clips of any length can be measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from dit_sparse.quality.scores import Scores

    Frame = NDArray[np.uint8]  # [height, width, 3]


class Meter(ABC):
    """Measures one thing over a pair of clips, a frame of each at a time.

    Class attributes: ``costly``, whether ``every`` thins its frames out.
    """

    costly: ClassVar[bool] = False

    @abstractmethod
    def update(self, dense: Frame, sparse: Frame) -> None:
        """Take the next frame of each, ``[height, width, 3]`` uint8, RGB."""

    @abstractmethod
    def finish(self) -> list[Scores]:
        """Give the rows; called once, after the last frame."""

    def close(self) -> None:  # noqa: B027, most meters hold nothing
        """Free what is held outside this process; also called after an exception."""


def pairs(reference: Iterable[Frame], test: Iterable[Frame]) -> Iterator[tuple[Frame, Frame]]:
    """Walk both clips side by side; say which frame does not fit.

    Raises:
        QualityInputError: No frames, different counts, sizes or types.
    """
    missing = object()
    left, right = iter(reference), iter(test)
    for number in count():
        one: Any = next(left, missing)
        other: Any = next(right, missing)
        if one is missing and other is missing:
            if number == 0:
                raise QualityInputError("both clips are empty, so there are no frames to compare")
            return
        if one is missing or other is missing:
            short, long = ("reference", "test") if one is missing else ("test", "reference")
            raise QualityInputError(f"the {short} has {number} frames, the {long} has more")
        for name, frame in (("reference", one), ("test", other)):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise QualityInputError(
                    f"frame {number} of the {name} must be uint8 [height, width, 3], got "
                    f"{frame.dtype} {tuple(frame.shape)}"
                )
        if one.shape != other.shape or 0 in one.shape:
            raise QualityInputError(
                f"frame {number} is {one.shape[1]} x {one.shape[0]} in the reference, "
                f"{other.shape[1]} x {other.shape[0]} in the test; frames are never rescaled, so "
                "use the same size"
            )
        yield one, other
