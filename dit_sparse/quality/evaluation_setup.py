# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is of: model, prompts, seeds, strategies; what each clip depends on."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.files import plain

if TYPE_CHECKING:
    from dit_sparse.core.video import Frames

SCHEMA_VERSION = 2  # 1 did not record the whole pipeline
DENSE, FLOOR = "dense", "floor"


@dataclass(frozen=True)
class Made:
    """One clip that was generated, and what it took.

    Args:
        frames: ``[frames, height, width, 3]`` uint8.
        facts: Ready for JSON: "seconds", "processor_seconds", "attention_seconds", "density",
            "kernels", "reasons" and the like.
    """

    frames: Frames
    facts: dict[str, Any]


class Generator(Protocol):
    """Makes one clip: ``arm`` is "dense", "floor" or a strategy's label."""

    def __call__(self, arm: str, prompt: str, seed: int) -> Made:
        """Generate."""


@dataclass(frozen=True)
class Setup:
    """What an evaluation is of.

    Args:
        model: As the user named it.
        prompts: What to show; each once.
        seeds: Of the noise; each once.
        strategies: Content of each strategy file, by label.
        call: Settings of every call, precision, device: for the report.
        fps: Of the files.
        identity: Everything else that clips and their times depend on, by content: pipeline,
            versions, machine.
        floor: The dense arm's second attention backend; None: no noise floor.
        metrics: Rows to measure; None: the usual ones.
        every: Costly rows look at every so many frames.
        about: Facts for the report that clips do not depend on.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strategies: dict[str, dict[str, Any]]
    call: dict[str, Any]
    fps: float
    identity: dict[str, Any] = field(default_factory=dict)
    floor: str | None = None
    metrics: tuple[str, ...] | None = None
    every: int = 1
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("prompts", self.prompts), ("seeds", self.seeds)):
            if not values:
                raise QualityInputError(f"{name}: at least one is required")
            twice = sorted({str(v) for v in values if values.count(v) > 1})
            if twice:
                raise QualityInputError(f"{name}: duplicate value {twice[0]!r:.100}")
        if not self.strategies:
            raise QualityInputError("strategies: at least one is required")
        for label in self.strategies:
            if label in {DENSE, FLOOR} or not re.fullmatch(r"[\w.+-]{1,80}", label):
                raise QualityInputError(
                    f"strategy {label!r:.100}: its name is used as a file name, so it must have "
                    "1 to 80 letters, digits or . _ + -, and must not be 'dense' or 'floor'"
                )

    @property
    def arms(self) -> tuple[str, ...]:
        """The clips of one pair, in the order in which they are made."""
        return (DENSE, *([FLOOR] if self.floor else []), *self.strategies)

    def jobs(self) -> list[Job]:
        """Give all (prompt, seed), numbered alike in every process."""
        return [
            Job(i, prompt, seed) for i, prompt in enumerate(self.prompts) for seed in self.seeds
        ]

    def shared(self) -> dict[str, Any]:
        """Give what all clips of a folder must have in common."""
        return {"call": self.call, "fps": self.fps, "floor": self.floor, **self.identity}

    def fingerprint(self, arm: str, job: Job) -> str:
        """Name what a clip depends on."""
        what = {
            "call": self.call,
            "identity": self.identity,
            "prompt": job.prompt,
            "seed": job.seed,
            "fps": self.fps,
            "arm": self.floor if arm == FLOOR else self.strategies.get(arm, arm),
        }
        text = json.dumps(plain(what), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "dit_sparse.evaluation",
            "model": self.model,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "strategies": self.strategies,
            "call": self.call,
            "fps": self.fps,
            "identity": self.identity,
            "floor": self.floor,
            "metrics": None if self.metrics is None else list(self.metrics),
            "every": self.every,
            "about": self.about,
        }


@dataclass(frozen=True)
class Job:
    """One prompt with one seed."""

    index: int
    prompt: str
    seed: int

    @property
    def key(self) -> str:
        """Name its folder."""
        return f"p{self.index:03d}-s{self.seed}"
