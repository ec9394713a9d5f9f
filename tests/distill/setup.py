# SPDX-License-Identifier: Apache-2.0
"""A whole training run on a tiny pipeline: config, conditions and trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import Accelerator

from dit_sparse.distill.conditions import Conditions, encode
from dit_sparse.distill.config import Config
from dit_sparse.distill.shard import Sharding
from dit_sparse.distill.train import Trainer
from tests import tiny

BLADE = {"method": "blade", "density": 0.5, "floor": 0.0, "block_size": 16, "samples": 4}
BLADE_G = {**BLADE, "pooled": 4}


def config(folder: Any, **changes: Any) -> Config:
    """Make a small config; ``train`` and ``distill`` are merged into the small ones."""
    train = {
        "iterations": 3, "batch": 2, "dtype": "float32", "gradient_checkpointing": False,
        "checkpoint_every": 1, "student_lr": 1e-3, "critic_lr": 1e-3, "warmup": 1,
    }  # fmt: skip
    data = {
        "task": "distill",
        "model": "tiny",
        "output": str(folder),
        "strategy": BLADE_G,
        "size": {"height": 64, "width": 96, "num_frames": 9},
        "data": {"prompts": "none.txt"},
        "device": "cpu",
        "lora": {"rank": 4, "alpha": 4},
        **changes,
        "train": {**train, **changes.get("train", {})},
        "distill": {"steps": 3, "critic_skip_above": None, **changes.get("distill", {})},
    }
    return Config.model_validate(data)


def pipeline(name: str = "wan") -> tuple[Any, dict[str, Any]]:
    """Make a tiny pipeline whose attention is peaked."""
    pipe, args = tiny.PIPELINES[name]()
    return tiny.stretch(pipe), args


def prompts(args: dict[str, Any], count: int = 3) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cut a call's arguments into prompts and what they share; the first prompt is the call's."""
    own = args["prompt_embeds"]
    made = [own, *(tiny.normal(*own.shape, seed=50 + i) for i in range(count - 1))]
    rest = {key: value for key, value in args.items() if key != "prompt_embeds"}
    return [{"prompt_embeds": each} for each in made], rest


def conditions(pipe: Any, args: dict[str, Any], folder: Any, steps: int = 3) -> Conditions:
    """Encode three prompts."""
    texts, shared = prompts(args)
    return encode(pipe, texts, shared, folder, steps=steps)


def trainer(
    folder: Any, name: str = "wan", *, sharding: Sharding | None = None, **changes: Any
) -> Trainer:
    """Make a trainer on a tiny pipeline."""
    settings = config(folder, **changes)
    pipe, args = pipeline(name)
    known = conditions(pipe, args, settings.cache, settings.steps)
    if settings.train.dtype == "bfloat16":  # loaded, as some modules then stay in fp32
        kind = type(pipe.transformer)
        with tempfile.TemporaryDirectory() as place:
            pipe.transformer.save_pretrained(place)
            pipe.transformer = kind.from_pretrained(place, torch_dtype=torch.bfloat16)
    return Trainer(settings, pipe, known, Accelerator(cpu=True), sharding=sharding)


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    """Copy all that a run has trained, moments included."""
    found: dict[str, torch.Tensor] = {}
    for update in made.updates.values():
        found |= {key: value.detach().clone() for key, value in update.state().items()}
    return found
