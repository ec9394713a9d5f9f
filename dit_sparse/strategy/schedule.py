# SPDX-License-Identifier: Apache-2.0
"""Which steps and layers stay dense whatever the method: the method-independent schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from dit_sparse.methods.steps import step_at

MAX_COUNT = 1_000_000  # steps: a larger number is a typing error
MAX_INDEX = 4095  # layers and heads: the largest models have about a hundred of either


def count(value: Any, word: str, most: int = MAX_COUNT) -> int:
    """Check one index or count: an int (no bool) in ``[0, most]``."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{word} must be a whole number from 0 to {most}, got {value!r:.80}")
    return value


def indices(value: Any, word: str) -> tuple[int, ...]:
    """Check a list of different indices; returned ascending."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        first = list(range(min(value, 3)))
        raise ValueError(
            f"{word} must be a list of indices, got {value}; the first {value} are "
            f"{str(first)[:-1]}{', ...' if value > 3 else ''}]"
        )
    if not isinstance(value, list | tuple):
        raise ValueError(f"{word} must be a list of indices, got {value!r:.80}")  # noqa: TRY004
    found = sorted(count(item, f"an index in {word}", MAX_INDEX) for item in value)
    doubled = [a for a, b in pairwise(found) if a == b]
    if doubled:
        raise ValueError(f"{word} names {doubled[0]} more than once")
    return tuple(found)


def _steps(value: Any) -> int | float:
    if isinstance(value, float):
        if not 0 <= value < 1:
            raise ValueError(
                "must be a whole number of steps or a fraction of the run in [0, 1), "
                f"got {value!r}; write {max(round(value), 0) if abs(value) < 1e6 else 0} for steps"
            )
        return value
    return count(value, "a number of steps")


Steps = Annotated[int | float, BeforeValidator(_steps)]


class Schedule(BaseModel):
    """Steps and layers that run the model's own dense attention.

    More dense steps cost speed and buy fidelity, more than any other setting does: the first
    steps decide the composition of the picture.

    Args:
        dense_warmup_steps: Leading dense steps: an int counts them, a float below 1 is a fraction
            of the run, rounded half up. Where they reach the end of a short run, all of it is
            dense (and the report says so).
        dense_last_steps: The same for the last steps.
        dense_layers: Indices of the layers that are dense on every step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dense_warmup_steps: Steps = 0
    dense_last_steps: Steps = 0
    dense_layers: Annotated[
        tuple[int, ...], BeforeValidator(lambda value: indices(value, "dense_layers"))
    ] = ()

    def sparse_steps(self, num_steps: int) -> range:
        """Give the steps of a run that are not dense throughout; empty where there are none."""
        first, last = (
            value if isinstance(value, int) else step_at(value, num_steps)
            for value in (self.dense_warmup_steps, self.dense_last_steps)
        )
        return range(first, max(first, num_steps - last))

    def is_dense(self, layer: int, step: int, num_steps: int) -> bool:
        """Say whether this layer runs dense at this 0-based step, whatever the rules say."""
        return layer in self.dense_layers or step not in self.sparse_steps(num_steps)
