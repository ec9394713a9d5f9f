# SPDX-License-Identifier: Apache-2.0
"""Learn from the pipeline itself how it calls its transformer.

The pipeline is run with a transformer that computes nothing: it notes its arguments and answers
zeros. So the text embeddings, masks, rotary tables and the noise levels of training are those of
sampling, for every family, without a second copy of any pipeline's code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.attach.apply import transformers_of
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.grid import StepGrid, read_grid
from dit_sparse.pipelines import family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

VARYING = {"hidden_states", "timestep", "return_dict"}
PROMPT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


class _EnoughError(Exception):
    """All that was wanted has been noted."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run of a pipeline passed to its transformer.

    Args:
        grid: Its noise levels; None where the run was cut short.
        latents: Shape of one sample as the transformer takes it, without the batch.
        time_dtype: Of the transformer's ``timestep``.
        shared: Arguments that do not depend on the prompt.
        prompt: Those that do, of the conditional pass, one sample.
        uncond: The same of the unconditional pass; None where there is none.
    """

    grid: StepGrid | None
    latents: tuple[int, ...]
    time_dtype: torch.dtype
    shared: dict[str, Any]
    prompt: dict[str, Tensor]
    uncond: dict[str, Tensor] | None


def guidance_arguments(
    pipe: Any, guidance: float | None, true_guidance: float, negative_prompt: str | None
) -> dict[str, Any]:
    """Name the call's arguments for guidance, or say what this pipeline does not take."""
    takes, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    found: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    if "true_cfg_scale" in takes:
        if true_guidance > 1:
            found |= {"true_cfg_scale": true_guidance, "negative_prompt": negative_prompt or ""}
    elif true_guidance != 1:
        raise DistillError(
            f"{name} does not accept true_cfg_scale, got true_guidance {true_guidance}; use "
            "guidance instead"
        )
    elif negative_prompt is not None and "negative_prompt" in takes:
        found["negative_prompt"] = negative_prompt
    return found


def record(
    pipe: Any, arguments: Mapping[str, Any], *, steps: int, whole: bool = True
) -> Recording:
    """Run a pipeline with a transformer that computes nothing.

    Args:
        pipe: Text to video or text to image, of a known family.
        arguments: Of its call, for one sample; without ``num_inference_steps``.
        steps: Of the run.
        whole: Run all steps, to learn the grid; otherwise stop after the first one.

    Raises:
        DistillError: A pipeline that cannot be trained here, or refuses the arguments; says why.
    """
    model, name = _model(pipe), type(pipe).__name__
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    calls: list[dict[str, Any]] = []

    def note(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if not whole and calls and _time(inputs) != _time(calls[0]):
            raise _EnoughError
        calls.append(inputs)
        return (_zeros(model, inputs["hidden_states"]),)

    before = model.__dict__.get("forward")
    model.forward = note
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            pipe(**arguments, num_inference_steps=steps, output_type="latent")
    except _EnoughError:
        pass
    except (ValueError, TypeError) as error:  # what the pipeline itself checks: sizes, embeddings
        raise DistillError(f"{name} rejected this run: {error}") from error
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            model.forward = before
        pipe.set_progress_bar_config()
    if not calls:
        raise DistillError(f"{name} did not call its transformer")
    passes = sum(_time(call) == _time(calls[0]) for call in calls)
    if whole and len(calls) != passes * steps:
        raise DistillError(
            f"{name}: {len(calls)} passes of its transformer in {steps} steps; every step must "
            "have the same number of passes"
        )
    grid = None
    if whole:
        grid = read_grid(pipe.scheduler, [_time(call) for call in calls[::passes]])
    cond, uncond = _branches(name, calls[:passes], batched=family_of(model).batched_cfg)
    shared = {
        key: value
        for key, value in cond.items()
        if key not in {*VARYING, *PROMPT} and value is not None
    }
    return Recording(
        grid,
        tuple(calls[0]["hidden_states"].shape[1:]),
        calls[0]["timestep"].dtype,
        shared,
        _prompt_part(cond),
        None if uncond is None else _prompt_part(uncond),
    )


def _model(pipe: Any) -> Any:
    name = type(pipe).__name__
    models = transformers_of(pipe)
    if len(models) != 1:
        raise DistillError(
            f"{name} has {len(models)} transformers ({', '.join(models)}); training one of "
            "several transformers is not supported yet"
        )
    (model,) = models.values()
    takes = inspect.signature(pipe.__call__).parameters
    if "image" in takes or "video" in takes:
        raise DistillError(
            f"{name} starts from an image or a video; only text-to-video and text-to-image "
            "pipelines can be trained"
        )
    return model


def _time(inputs: dict[str, Any]) -> float:
    return float(inputs["timestep"].flatten()[0])


def _zeros(model: Any, latents: Tensor) -> Tensor:
    """Answer in the shape of an answer: PixArt's has a variance behind the prediction."""
    outer, inner = (getattr(model.config, f"{side}_channels", None) for side in ("out", "in"))
    if outer and inner and outer == 2 * inner:
        return torch.zeros_like(torch.cat([latents, latents], 1))
    return torch.zeros_like(latents)


def prediction(answer: Tensor, latents: Tensor) -> Tensor:
    """Cut a learned variance off the model's answer, where there is one."""
    if answer.shape != latents.shape:
        answer = answer.chunk(2, 1)[0]
    return answer


def _branches(
    name: str, calls: list[dict[str, Any]], *, batched: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Tell the guidance branches of one step apart."""
    batch = calls[0]["hidden_states"].shape[0]
    if len(calls) == 1 and batch == 1:
        return calls[0], None
    if len(calls) == 2 and batch == 1 and not batched:  # the conditional pass comes first
        return calls[0], calls[1]
    if len(calls) == 1 and batch == 2 and batched:
        return _sample(calls[0], 1), _sample(calls[0], 0)
    raise DistillError(
        f"{name}: {len(calls)} passes of {batch} samples in a step; expected one sample, with or "
        "without guidance"
    )


def _sample(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """Cut one sample out of a batch of two."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2:
            return value[index : index + 1]
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        return value

    return {
        key: value if key == "image_rotary_emb" else cut(value) for key, value in inputs.items()
    }


def _prompt_part(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {
        key: inputs[key].detach().clone() for key in PROMPT if isinstance(inputs.get(key), Tensor)
    }
