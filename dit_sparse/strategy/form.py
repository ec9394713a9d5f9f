# SPDX-License-Identifier: Apache-2.0
"""The parts of a strategy file: what it is for, who does what, and how it was found."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from dit_sparse.core.grid import MAX_TOKENS
from dit_sparse.core.reading import refuse_controls
from dit_sparse.methods import method_class
from dit_sparse.methods.params import build_method, params_of
from dit_sparse.methods.steps import step_at
from dit_sparse.strategy.schedule import indices

if TYPE_CHECKING:
    from dit_sparse.core.call import Method

FORM = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _plain_text(value: str) -> str:
    refuse_controls(value)
    if "\n" in value or "\t" in value:
        raise ValueError(f"must be a single line without tabs, got {value!r:.80}")
    return value


Line = Annotated[str, AfterValidator(_plain_text)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]


def _everywhere(word: str) -> BeforeValidator:
    def check(value: Any) -> Literal["all"] | tuple[int, ...]:
        if value == "all":
            return "all"
        if isinstance(value, str):
            raise ValueError(f'must be "all" or a list of indices, got {value!r:.80}')  # noqa: TRY004
        found = indices(value, word)
        if not found:
            raise ValueError(f'{word} must contain at least one index, or be "all"; got []')
        return found

    return BeforeValidator(check)


def _band(value: Any) -> tuple[float, float]:
    numbers = (
        tuple(float(part) for part in value if type(part) in {int, float})
        if isinstance(value, list | tuple)
        else ()
    )
    if len(numbers) != 2 or len(value) != 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise ValueError(
            "must be [start, stop) as fractions of the run, 0 <= start < stop <= 1, "
            f"got {value!r:.80}; the whole run is [0.0, 1.0]"
        )
    return numbers[0], numbers[1]


class Model(BaseModel):
    """The model a strategy was made for: transformer class names, hash of its config or None."""

    model_config = FORM

    classes: Annotated[tuple[Line, ...], Field(strict=False, min_length=1)]
    config_hash: Line | None = None


class Grid(BaseModel):
    """The latents grid a strategy was measured at, in tokens after patchify."""

    model_config = FORM

    frames: Positive
    height: Positive
    width: Positive
    text: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        tokens = self.frames * self.height * self.width + self.text
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"{self.frames} x {self.height} x {self.width} + {self.text} are {tokens:,} "
                f"tokens; the maximum is {MAX_TOKENS:,}. Give the size in tokens after patchify, "
                "not in pixels"
            )
        return self


class Receipt(BaseModel):
    """How a strategy was found and what was measured with it.

    Args:
        published: The settings of a paper or its code, not measured here.
        source: Where they come from, or who made them by hand.
        command: The command that found them.
        prompts: Prompts it was searched or measured on.
        seeds: Seeds of those generations.
        device: Name of the device.
        kernel: Attention kernel that ran.
        versions: Versions of the packages that matter, by name.
        measured: Measured figures by name ("density", "psnr_db", "relative_error").
        note: Anything a reader must know.
    """

    model_config = FORM

    published: bool = False
    source: str | None = None
    command: str | None = None
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    seeds: Annotated[tuple[int, ...], Field(strict=False)] = ()
    device: str | None = None
    kernel: str | None = None
    versions: dict[str, str] = {}
    measured: dict[str, float] = {}
    note: str | None = None

    @model_validator(mode="after")
    def _plain(self) -> Self:
        refuse_controls(self.model_dump())
        return self


class Rule(BaseModel):
    """One method for some layers, heads and steps.

    Args:
        layers: Indices of transformer blocks, or "all".
        heads: Indices of heads, or "all".
        steps: ``[start, stop)`` as fractions of the run; each is rounded half up to a step, so
            bands that touch as fractions touch as steps.
        stage: Name of the transformer in a pipeline with two ("transformer", "transformer_2");
            None: both.
        method: A name from the table of methods.
        params: The method's params; those left out get their defaults, and are then written out.
    """

    model_config = FORM

    layers: Annotated[Literal["all"] | tuple[int, ...], _everywhere("layers")] = "all"
    heads: Annotated[Literal["all"] | tuple[int, ...], _everywhere("heads")] = "all"
    steps: Annotated[tuple[float, float], BeforeValidator(_band)] = (0.0, 1.0)
    stage: Literal["transformer", "transformer_2"] | None = None
    method: str
    params: Annotated[dict[str, Any], Field(validate_default=True)] = {}

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        method_class(name)
        return name

    @field_validator("params")
    @classmethod
    def _complete(cls, params: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "method" not in info.data:  # its own error says what is wrong
            return params
        return params_of(build_method(info.data["method"], params))

    @cached_property
    def instance(self) -> Method:
        """The method with these params, built once."""
        return build_method(self.method, self.params)

    def covers(self, layer: int, step: int, num_steps: int, stage: str) -> bool:
        """Say whether the rule speaks about this layer and step of this stage."""
        return (
            (self.layers == "all" or layer in self.layers)
            and self.stage in {None, stage}
            and step_at(self.steps[0], num_steps) <= step < step_at(self.steps[1], num_steps)
        )
