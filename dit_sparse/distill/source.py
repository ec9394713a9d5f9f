# SPDX-License-Identifier: Apache-2.0
"""Load the pipeline of a run, and make its data: the way from a config to a trainer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.distill import checkpoint
from dit_sparse.distill.clips import encode_clips, hash_clips, list_clips
from dit_sparse.distill.conditions import Conditions, encode, free_encoders, read_prompts
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.inputs import encoding_inputs, inputs_of
from dit_sparse.distill.record import guidance_arguments
from dit_sparse.distill.shard import check_sharding, read_sharding
from dit_sparse.distill.train import CHECKPOINTS, Trainer
from dit_sparse.strategy import config_hash
from dit_sparse.strategy.identity import pipeline_identity

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.distill.config import Config


def load_pipeline(config: Config) -> Any:
    """Load a pipeline into the host's memory; no code that comes with it is run."""
    import diffusers
    from diffusers.pipelines import pipeline_utils

    dtype = getattr(torch, config.train.dtype)
    key = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    diffusers.utils.logging.disable_progress_bar()
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            config.model, use_safetensors=True, **{key: dtype}
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistillError(f"model: {config.model}: cannot be loaded: {first}") from error


def without_weights(model: Any, device: torch.device) -> Any:
    """Make a model that can be asked for its config, dtype and device, and not be run.

    The encoders work while it stands in the transformer's place, so that neither waits in the
    device's memory for the other.
    """
    with torch.device("meta"):
        empty = type(model).from_config(dict(model.config))
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    for path, module in empty.named_modules():
        for name in list(module._parameters):  # noqa: SLF001
            dtype = dtypes.get(f"{path}.{name}".removeprefix("."))
            if dtype is not None:
                nothing = torch.empty(0, dtype=dtype, device=device)
                module.register_parameter(name, torch.nn.Parameter(nothing, requires_grad=False))
        for name, value in list(module._buffers.items()):  # noqa: SLF001
            if value is not None:
                module.register_buffer(name, torch.empty(0, dtype=value.dtype, device=device))
    return empty


def prepare(config: Config, accelerator: Any, *, fresh: bool = False) -> Trainer:
    """Make everything that a run needs; each thing is refused before the next is made.

    Args:
        config: What to do.
        accelerator: Device and other processes.
        fresh: Drop the checkpoints in the output folder.
    """
    sharding = read_sharding(accelerator)
    if config.device == "cuda" and accelerator.device.type != "cuda":
        raise DistillError(
            f"device: cuda was requested, but torch {torch.__version__} and accelerate use "
            f"{accelerator.device}; run 'dit-sparse doctor' for details"
        )
    strategy = config.make_strategy()
    clips: list[Path] = []
    if config.task == "distill":
        assert config.data.prompts is not None
        texts = read_prompts(config.data.prompts)
    else:
        assert config.data.clips is not None
        found = list_clips(config.data.clips)
        clips, texts = [path for path, _ in found], [caption for _, caption in found]
    pipe = load_pipeline(config)
    if sharding is not None:
        check_sharding(config, pipe, accelerator.num_processes)
    own = config.distill if config.task == "distill" else config.finetune
    arguments = {
        **config.size.model_dump(exclude_none=True),
        **guidance_arguments(
            pipe, own.guidance, getattr(own, "true_guidance", 1.0), config.data.negative_prompt
        ),
    }
    if strategy is not None:
        _check_strategy(pipe, strategy)
    identity, hashes = pipeline_identity(pipe), hash_clips(clips)
    inputs = inputs_of(config, identity, texts, hashes)
    _check_output(config, inputs, accelerator, fresh=fresh)
    process = accelerator.process_index, accelerator.num_processes
    transformer = pipe.transformer
    pipe.transformer = without_weights(transformer, accelerator.device)
    pipe.to(accelerator.device)
    fingerprint = encoding_inputs(identity)
    conditions: Conditions = encode(
        pipe,
        [{"prompt": text} for text in texts],
        arguments,
        config.cache,
        steps=config.steps,
        fingerprint=fingerprint,
        tell=_tell("encoding prompts") if accelerator.is_main_process else None,
        process=process,
        wait=accelerator.wait_for_everyone,
    )
    free_encoders(pipe)
    latents = encode_clips(
        pipe,
        clips,
        config.size,
        config.cache,
        conditions.first.latents,
        fingerprint=fingerprint,
        hashes=hashes,
        tell=_tell("encoding clips") if accelerator.is_main_process else None,
        process=process,
        wait=accelerator.wait_for_everyone,
    )
    pipe.vae.to("cpu")
    pipe.transformer = transformer
    if sharding is None:  # otherwise it goes there block by block
        transformer.to(accelerator.device)
    return Trainer(config, pipe, conditions, accelerator, latents, sharding, inputs)


def _check_output(config: Config, inputs: Any, accelerator: Any, *, fresh: bool) -> None:
    """Refuse checkpoints of other inputs before any work, or drop them."""
    folder = config.output / CHECKPOINTS
    if fresh:
        if accelerator.is_main_process:
            checkpoint.drop(folder)
        accelerator.wait_for_everyone()
    checkpoint.verify(folder, inputs)


def _check_strategy(pipe: Any, strategy: Any) -> None:
    """Say early what attaching would say late."""
    from dit_sparse.distill.attention import check_trainable
    from dit_sparse.pipelines import family_of
    from dit_sparse.pipelines.family import heads_of

    check_trainable(strategy)
    modules = family_of(pipe.transformer).attention_modules(pipe.transformer)
    strategy.validate_for(
        type(pipe.transformer).__name__,
        num_layers=len(modules),
        num_heads=heads_of(modules[0][1]),
        stages=("transformer",),
        config_hash=config_hash(pipe.transformer.config),
    )


def _tell(what: str) -> Any:
    def tell(done: int, of: int) -> None:
        end = "\n" if done == of else ""
        sys.stderr.write(f"\r{what}: {done} of {of}{end}")
        sys.stderr.flush()

    return tell
