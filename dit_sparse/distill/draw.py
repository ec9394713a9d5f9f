# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on nothing but their name: (seed, iteration, purpose, sample).

There is no generator whose state would have to be kept: a resumed run, and one that is spread over
other processes, draws the very same numbers. All are drawn on the CPU, so the device is no matter.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, iteration: int | str, purpose: str, index: int) -> torch.Generator:
    """Make the generator of one name.

    Args:
        seed: Of the run.
        iteration: 0-based update; any name of what is drawn together.
        purpose: What is drawn.
        index: The sample (or group of samples) within the whole batch of all processes.
    """
    name = f"{seed}/{iteration}/{purpose}/{index}".encode()
    number = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


class Draw:
    """Draws for one iteration of one run."""

    def __init__(self, seed: int, iteration: int, part: int = 0) -> None:
        """Remember the first parts of every name; ``part`` is the critic's update within it."""
        self.seed, self.iteration = seed, f"{iteration}.{part}"

    def normal(self, purpose: str, indices: list[int], shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal fp32 ``[samples, *shape]``, each sample from its own name."""
        return torch.stack([torch.randn(shape, generator=self._of(purpose, i)) for i in indices])

    def uniform(self, purpose: str, indices: list[int]) -> Tensor:
        """Draw float64 ``[samples]`` from [0, 1), each from its own name."""
        return torch.cat(
            [torch.rand(1, dtype=torch.float64, generator=self._of(purpose, i)) for i in indices]
        )

    def integer(self, purpose: str, index: int, below: int) -> int:
        """Draw a whole number from [0, below)."""
        return int(torch.randint(below, (1,), generator=self._of(purpose, index)))

    def _of(self, purpose: str, index: int) -> torch.Generator:
        return generator(self.seed, self.iteration, purpose, index)


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """Shuffle ``count`` items for one pass over them."""
    order = torch.randperm(count, generator=generator(seed, f"epoch {epoch}", "order", 0))
    return [int(i) for i in order]
