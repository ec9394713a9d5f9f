# SPDX-License-Identifier: Apache-2.0
"""The schema of the files in a store: checked once when a file is read."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_sparse.profiler.cost import CostModel
from dit_sparse.profiler.measure import Measured
from dit_sparse.profiler.shortlist import Screened

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Plain data with known keys; further keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Exact(BaseModel):
    """Plain data with these keys and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class About(Part):
    """What every unit of a search has in common."""

    grid: tuple[Count, Count, Count, Index, bool]
    num_steps: Count
    layers: Count
    batch: Count
    heads: Count
    head_dim: Count


class Call(Part):
    """One captured call."""

    stage: str
    layer: Index
    step: Index
    band: Index
    power: list[float]
    found: list[Measured]


class Unit(Part):
    """All calls of one prompt with one seed."""

    about: About
    steps: dict[str, list[Index]]
    kernel: str | None
    calls: list[Call]

    @model_validator(mode="after")
    def _one_number_per_head(self) -> Unit:
        heads = self.about.heads
        for i, call in enumerate(self.calls):
            lists: list[tuple[str, list[float] | None]] = [("power", call.power)]
            for each in call.found:
                lists += [(name, getattr(each, name)) for name in _PER_HEAD]
            for name, values in lists:
                if values is not None and len(values) != heads:
                    raise ValueError(
                        f"calls[{i}]: {name} must have one number for each of {heads} heads, "
                        f"got {len(values)}"
                    )
            if call.stage not in self.steps:
                raise ValueError(f"calls[{i}]: stage {call.stage!r:.80} is not in steps")
        return self


class Costs(Exact):
    """Measured times."""

    model: CostModel
    agreement: dict[str, float]
    timed_on: str


class Chosen(Part):
    """The choices of one band: stage, layer, band, a candidate for each head."""

    choices: list[tuple[str, Index, Index, list[Index]]]


class Check(Exact):
    """A finished strategy beside dense."""

    measured_attention_speedup: float
    latents_relative_error: float


class Listed(Exact):
    """A candidate of the shortlist."""

    name: str
    method: str
    params: dict[str, Any]


class Shortlist(Exact):
    """What the screening chose, and what it saw."""

    candidates: Annotated[list[Listed], Field(min_length=1)]
    screened: list[Screened]


_PER_HEAD = ("error", "doubt", "recall", "density", "computed")
SCHEMAS: dict[str, type[BaseModel]] = {
    r"unit-.*": Unit,
    r"shortlist\.json": Shortlist,
    r"costs\.json": Costs,
    r"chosen-.*": Chosen,
    r"check-.*": Check,
}


def check_schema(name: str, data: dict[str, Any]) -> None:
    """Check what a file of this name holds; ``ValueError`` names the key."""
    for pattern, schema in SCHEMAS.items():
        if re.fullmatch(pattern, name):
            try:
                schema.model_validate_json(json.dumps(data))  # as JSON, lists may be tuples
            except ValidationError as error:
                raise ValueError(_first(error)) from None


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in detail["loc"])
    where = f"{where.lstrip('.')}: " if where else ""
    if detail["type"] == "missing":
        return f"{where}this key is missing"
    if detail["type"] == "value_error":
        return f"{where}{detail['ctx']['error']}"
    return f"{where}{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {detail['input']!r:.80}"
