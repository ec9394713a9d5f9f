# SPDX-License-Identifier: Apache-2.0
"""Load a pipeline by folder or Hub id, and find out what its call takes."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dit_sparse.cli.console import ERR, UserError, first_line
from dit_sparse.cli.lora import merge_loras
from dit_sparse.core.reading import load_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from dit_sparse.cli.lora import Lora

DEFAULTS_NAME = "sample_defaults.json"
DEFAULT_FPS = 16.0
FLAGS = {
    "height": "--height",
    "width": "--width",
    "num_frames": "--frames",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "negative_prompt": "--negative-prompt",
}
OURS = (  # arguments of a call that the commands set
    "prompt",
    "prompt_2",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "callback",
    "callback_on_step_end",
    "prompt_embeds",
)

Pixels = Annotated[int, Field(ge=1, le=16384)]
Count = Annotated[int, Field(ge=1, le=10_000)]


class SampleDefaults(BaseModel):
    """``sample_defaults.json`` in a model folder: what ``generate`` uses where it is told nothing.

    One JSON object; every key may be left out, then the pipeline's own default holds; an unknown
    key is an error. Diffusers does not read this file.

        {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 20,
         "guidance_scale": 4.0, "fps": 12}

    Args:
        height: Pixels, 1 to 16384.
        width: Pixels, 1 to 16384.
        num_frames: Frames of a video, from 1; not for image models.
        num_inference_steps: Denoising steps, from 1.
        guidance_scale: Classifier-free guidance, from 0.
        negative_prompt: What guidance leads away from.
        fps: Frames per second of the files for people, above 0, to 240.
        call: Other arguments of the pipeline's call, such as ``{"true_cfg_scale": 4.0}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    height: Pixels | None = None
    width: Pixels | None = None
    num_frames: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    negative_prompt: str | None = None
    fps: Annotated[float, Field(gt=0, le=240)] | None = None
    call: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> SampleDefaults:
        """Read the file of a model folder; no file, no defaults."""
        path = folder / DEFAULTS_NAME
        if not path.is_file():
            return cls()
        try:
            return cls.model_validate(load_json(path), strict=True)
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, found["loc"])) or "content"
            takes = ", ".join(cls.model_fields)
            raise UserError(f"{path}: {key}: {found['msg']}; allowed keys: {takes}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person asked for; None: the model folder's default, else the pipeline's own."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    call: dict[str, Any] = field(default_factory=dict)  # other arguments of the pipeline's call

    def over(self, defaults: SampleDefaults) -> dict[str, Any]:
        """Give what is set, the person's word before the folder's."""
        asked = {key: value for key, value in asdict(self).items() if value is not None}
        given = defaults.model_dump(exclude={"fps"}, exclude_none=True)
        others = {**given.pop("call"), **asked.pop("call")}
        for key in others:
            if key in FLAGS or key in OURS:
                instead = (
                    f"use {FLAGS[key]} instead" if key in FLAGS else "set by dit-sparse, remove it"
                )
                raise UserError(f"--call {key}: {instead}")
        return {**given, **asked, **others}


def local_folder(model: str) -> Path | None:
    """Find the folder ``model`` names; None: it is a Hub id. Checks what can be checked early."""
    path = Path(model).expanduser()
    with contextlib.suppress(OSError, ValueError):  # too long or odd to be a path
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise UserError(
                    f"{model}: not a Diffusers pipeline folder, model_index.json is missing"
                )
            return path
        if path.exists():
            raise UserError(f"{model}: is a file; give a Diffusers pipeline folder")
        first = Path(model.partition("/")[0])
        if "/" in model and first.is_dir():  # the Hub is not asked for what looks like a path
            near = get_close_matches(path.name, [p.name for p in first.iterdir()], n=1)
            hint = f"; did you mean {first / near[0]}?" if near else ""
            raise UserError(f"{model}: folder not found in {first}{hint}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise UserError(f"{model!r:.200}: folder not found, and not a valid Hub id (owner/name)")
    return None


def load(model: str, device: str, dtype: torch.dtype, loras: Sequence[Lora] = ()) -> Any:
    """Load a pipeline with its adapters onto a device; no code that comes with it is run."""
    import diffusers
    import transformers
    from diffusers.pipelines import pipeline_utils

    from dit_sparse.strategy.hub import fetch

    key = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    if local_folder(model) is not None:  # nothing to wait for but the disk: one line is enough
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        status: Any = ERR.status(f"loading {model}")
    else:
        status = contextlib.nullcontext()
    try:
        with status, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if local_folder(model) is None:
                fetch(model, "model_index.json")  # a wrong name is told without retries
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(local_folder(model) or model), use_safetensors=True, **{key: dtype}
            )
            merge_loras(pipe, loras)
            return pipe.to(device)
    except UserError:
        raise
    except Exception as error:  # whatever is wrong here is wrong with what was named
        raise UserError(f"{model}: cannot be loaded: {first_line(error)}") from error


def machine(device: str, dtype: str, index: int | None = None) -> tuple[str, torch.dtype]:
    """Settle on a device and a dtype; ``index`` is this process's GPU where there are several."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError(
            f"--device cuda: torch {torch.__version__} finds no GPU; use --device cpu, or run "
            "'dit-sparse doctor' for details"
        )
    on_gpu = there and device != "cpu"
    name = dtype
    if name == "auto":
        name = "float32"
        if on_gpu:
            name = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    found: torch.dtype = getattr(torch, name)
    gpu = "cuda" if index is None else f"cuda:{index}"
    return gpu if on_gpu else "cpu", found


def call_arguments(pipe: Any, prompt: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments of one call, or say what this pipeline does not take or lacks."""
    name = type(pipe).__name__
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt" not in takes:
        raise UserError(
            f"{name} does not take a prompt; use a text-to-image or text-to-video pipeline"
        )
    needs = [
        key
        for key, parameter in takes.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and key != "prompt"
    ]
    if needs:
        raise UserError(
            f"{name} requires {', '.join(needs)} in addition to the prompt; only text-to-image "
            "and text-to-video pipelines are supported"
        )
    for key in settings:
        if key not in takes:
            flag = f"{FLAGS[key]} ({key})" if key in FLAGS else f"--call {key}"
            raise UserError(f"{name} does not accept {flag}; remove it")
    for part in ("tokenizer", "text_encoder"):
        if part in pipe.components and pipe.components[part] is None:
            raise UserError(
                f"{name} was saved without its {part}, so it cannot encode a prompt; save the "
                "complete pipeline"
            )
    return {"prompt": prompt, **settings}


def effective(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add the pipeline's own defaults: what the call will really use, where that can be known."""
    takes = inspect.signature(pipe.__call__).parameters
    own = {key: takes[key].default for key in FLAGS if key in takes}
    return {**own, **{key: value for key, value in arguments.items() if key != "prompt"}}
