# SPDX-License-Identifier: Apache-2.0
"""Training configuration: one YAML file, checked before any work.

Past 300 lines, as the docstrings of its settings alone are 120.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_sparse.core.reading import load_text, refuse_controls
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.grid import Renoise
from dit_sparse.distill.losses import CriticWeight, StudentWeight
from dit_sparse.strategy import Strategy

MAX_CONFIG = 2**20  # bytes of a config file, which has a few thousand

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
MAX_DEPTH, MAX_VALUES = 32, 100_000  # of a config; a strategy written out in it is 6 deep
TOO_DEEP = (
    f"nested more than {MAX_DEPTH} levels deep; see docs/distill.md for a training configuration"
)
FREE = ("iterations", "checkpoint_every", "keep")  # may change when a run is resumed


class Form(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Size(Form):
    """Of what is generated.

    Args:
        height: Pixels.
        width: Pixels.
        num_frames: Frames of a video; left out for pictures.
    """

    height: Annotated[int, Field(ge=1, le=16384)]
    width: Annotated[int, Field(ge=1, le=16384)]
    num_frames: Annotated[int, Field(ge=1, le=10_000)] | None = None


class Data(Form):
    """What is trained on.

    Args:
        prompts: For ``distill``: a text file, one prompt a line.
        clips: For ``finetune``: a folder of videos or pictures, each with a caption in a text
            file of the same name (``cat.mp4``, ``cat.txt``).
        negative_prompt: What guidance leads away from; the pipeline's own default where left out.
        cache: Where encoded prompts and clips are kept; ``cache`` in the output where left out.
    """

    prompts: Path | None = None
    clips: Path | None = None
    negative_prompt: str | None = None
    cache: Path | None = None


class Lora(Form):
    """The adapters. More rank learns more and costs memory.

    Args:
        rank: From 1; BLADE has 64.
        alpha: Scale times rank; BLADE has 64.
        targets: Names of the adapted modules; the default is BLADE's. In Wan and PixArt it meets
            cross-attention too.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 64
    alpha: Positive = 64.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Train(Form):
    """The loop, for both tasks.

    Args:
        iterations: Updates of the student.
        batch: Samples in one update, over all processes; what one process has to do of it is
            accumulated. The number of processes so changes nothing but time.
        micro_batch: Samples in one pass of the model; they share the drawn step.
        student_lr: Learning rate, BLADE's where left out.
        critic_lr: Likewise.
        warmup: Iterations in which the student's rate rises to its value.
        schedule: "constant" after that, or "cosine": falls to 0 at the last iteration (so that
            ``iterations`` then may not change on resuming).
        betas: Of AdamW.
        weight_decay: Of AdamW.
        eps: Of AdamW.
        gradient_clip: Largest norm of a role's gradient.
        dtype: Of the base weights; adapters and their optimizer are always fp32.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        checkpoint_every: Iterations between checkpoints.
        keep: Newest checkpoints to keep, from 1.
        tensorboard: Write TensorBoard's files beside the CSV.
    """

    iterations: Count = 300
    batch: Count = 80
    micro_batch: Count = 1
    student_lr: Positive = 1e-4
    critic_lr: Positive = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 5
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Share, Share] = (0.0, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    eps: Positive = 1e-8
    gradient_clip: Positive = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    checkpoint_every: Count = 15
    keep: Count = 2
    tensorboard: bool = False


class Distill(Form):
    """Sparsity-aware trajectory distribution matching (BLADE's settings for Wan, but as noted).

    Args:
        steps: K, the student's steps.
        eta: Share of the predicted noise between steps, [0, 1]; 1 adds no fresh noise.
        guidance: Of the teacher: the pipeline's ``guidance_scale``.
        true_guidance: The ``true_cfg_scale`` of pipelines that have one (HunyuanVideo, FLUX):
            their ``guidance`` is told to the model and is not two passes.
        sparse_critic: The critic runs the student's sparse attention, as in the released code;
            false: it is dense, as in the paper's figure.
        critic_updates: Updates of the critic for each of the student's.
        critic_regularization: Pull of the critic to the teacher, lambda; 0.5 for CogVideoX.
        critic_weight: See ``losses.critic_loss``.
        critic_skip_above: No critic update whose mean loss is above; null: never skip.
        student_weight: See ``losses.student_loss``; "teacher_distance" for CogVideoX.
        huber: c / sqrt(elements of a sample).
        renoise: Levels to which a step's result is noised again: from the step's end up to
            ``renoise_top`` ("overlapping", as released) or to the step's start ("disjoint").
        renoise_top: Share of the whole range of times, (0, 1].
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 8
    eta: Share = 0.9
    guidance: Annotated[float, Field(ge=0)] | None = 5.0
    true_guidance: Annotated[float, Field(ge=1)] = 1.0
    sparse_critic: bool = True
    critic_updates: Annotated[int, Field(ge=1, le=100)] = 1
    critic_regularization: Annotated[float, Field(ge=0)] = 0.0
    critic_weight: CriticWeight = "inverse_variance"
    critic_skip_above: Positive | None = 2.0
    student_weight: StudentWeight = "none"
    huber: Annotated[float, Field(ge=0)] = 1e-3 / 128
    renoise: Renoise = "overlapping"
    renoise_top: Annotated[float, Field(gt=0, le=1)] = 0.98

    @property
    def teacher_scale(self) -> float:
        """Weight of the teacher's guidance, where it has two branches."""
        return self.true_guidance if self.true_guidance > 1 else float(self.guidance or 1.0)


class Finetune(Form):
    """Training with the model's own loss.

    Args:
        steps: Steps of sampling later on, for the strategy's dense steps.
        guidance: The ``guidance_scale`` of sampling later on.
        sigma: How levels are drawn: evenly, or by a logit-normal.
        logit_mean: Of the logit-normal.
        logit_std: Of the logit-normal.
        shift: Moves the levels of flow matching upwards, as a scheduler's shift does; > 0.
        caption_dropout: Share of samples that are trained without their caption.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance: Annotated[float, Field(ge=0)] | None = 5.0
    sigma: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: Positive = 1.0
    shift: Positive = 1.0
    caption_dropout: Share = 0.1


class Config(Form):
    """One training run.

    Args:
        task: "distill" or "finetune"; the section of that name may be left out.
        model: Folder or Hub id of a Diffusers pipeline.
        output: Folder for checkpoints, logs and the result.
        strategy: A strategy's name or file, or a mapping with ``method`` and its settings; null:
            nothing is sparse (a dense student).
        size: Of what is generated.
        data: What is trained on.
        seed: Of everything that is drawn.
        device: "auto", "cpu" or "cuda".
        kernel: Attention kernel; the best that has gradients where left out.
        lora: The adapters; null: all weights are trained, in three copies.
        train: The loop.
        distill: The method of distillation.
        finetune: The method of fine-tuning.
    """

    task: Literal["distill", "finetune"]
    model: str
    output: Path
    strategy: str | dict[str, Any] | None
    size: Size
    data: Data = Data()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernel: str | None = None
    lora: Lora | None = Lora()
    train: Train = Train()
    distill: Distill = Distill()
    finetune: Finetune = Finetune()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        wanted = "prompts" if self.task == "distill" else "clips"
        if getattr(self.data, wanted) is None:
            raise ValueError(f"data.{wanted}: missing; required for task {self.task}")
        if self.train.batch % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch: must divide train.batch ({self.train.batch}), got "
                f"{self.train.micro_batch}"
            )
        return self

    @property
    def steps(self) -> int:
        """Steps of the sampling run."""
        return self.distill.steps if self.task == "distill" else self.finetune.steps

    @property
    def cache(self) -> Path:
        """Where encoded data are kept."""
        return self.data.cache or self.output / "cache"

    def make_strategy(self) -> Strategy | None:
        """Read the strategy; ``StrategyError`` where it cannot be."""
        if self.strategy is None or isinstance(self.strategy, str):
            return None if self.strategy is None else Strategy.coerce(self.strategy)
        if "schema_version" in self.strategy:
            return Strategy.from_dict(self.strategy)
        options = dict(self.strategy)
        method = options.pop("method", None)
        if not isinstance(method, str):
            raise DistillError(
                "strategy: method is missing; give a name, a file, or a mapping such as "
                "{method: blade, density: 0.17}"
            )
        return Strategy.single(method, **options)

    def fixed(self) -> dict[str, Any]:
        """Give the settings that may not change between a checkpoint and its resumption.

        Paths are left out: the content of what they name counts (``inputs.py``).
        """
        named = {"prompts", "clips", "cache"}
        aside: Any = {"output": True, "device": True, "model": True, "strategy": True}
        data = self.model_dump(mode="json", exclude={**aside, "data": named})
        free = FREE if self.train.schedule == "constant" else FREE[1:]
        for key in free:
            data["train"].pop(key)
        return data


def read_config(path: Path) -> Config:
    """Read a config file.

    Raises:
        DistillError: It cannot be read, or a key is unknown, missing or wrong; names the key.
    """
    import yaml

    try:
        data = yaml.safe_load(load_text(path, MAX_CONFIG))
    except RecursionError as error:
        raise DistillError(f"{path}: {TOO_DEEP}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DistillError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise DistillError(
            f"{path}: must be a mapping of keys and values, got {type(data).__name__}"
        )
    _bound(data, path)
    try:
        refuse_controls(data)
    except ValueError as error:
        raise DistillError(f"{path}: cannot be read: {error}") from error
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise DistillError(f"{path}: {_explain(error)}") from error
    config.make_strategy()
    return config


def _bound(data: Any, path: Path) -> None:
    """Refuse what a few YAML aliases can expand to: values without end, or without number."""
    level, count = [data], 0
    for _ in range(MAX_DEPTH):
        inner = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        count += len(inner)
        if not inner:
            return
        if count > MAX_VALUES:
            raise DistillError(
                f"{path}: more than {MAX_VALUES} values once its aliases are expanded; see "
                "docs/distill.md for a training configuration"
            )
        level = inner
    raise DistillError(f"{path}: {TOO_DEEP}")


def _explain(error: ValidationError) -> str:
    """Say what is wrong with the first key."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"])
    if found["type"] != "extra_forbidden":
        message = str(found["msg"]).removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    section: Any = Config
    for part in found["loc"][:-1]:
        annotation = section.model_fields[str(part)].annotation
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    keys = ", ".join(section.model_fields)
    return f"{place}: unknown key; {place.rpartition('.')[0] or 'the file'} takes: {keys}"
