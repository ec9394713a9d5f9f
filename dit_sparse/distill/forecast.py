# SPDX-License-Identifier: Apache-2.0
"""Say what an iteration will take of memory and time: no weights, no GPU.

Time: floating-point operations of one pass (``pipelines.size``) at the rates and the kernel
efficiency that ``forecast/generation.py`` assumes, times the passes of an iteration. Memory:
weights, adapters with their optimizer, and the activations that autograd keeps, counted by
running the model with its adapters on tensors without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.core.reading import load_json
from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.networks import _add_adapters
from dit_sparse.forecast.generation import ATTENTION_RATE, EFFICIENCY, OTHER_RATE, PLANNING
from dit_sparse.forecast.generation import forecast as forecast_sampling
from dit_sparse.pipelines.known import KNOWN_MODELS
from dit_sparse.pipelines.size import model_size

if TYPE_CHECKING:
    from dit_sparse.distill.config import Config
    from dit_sparse.pipelines.size import ModelSize
    from dit_sparse.strategy import Strategy

GIB = 2**30
# Time of a backward pass in forward passes. Frozen weights need no gradient of their own, which
# halves what linear layers do; attention's own is two and a half times its forward pass.
LINEAR_BACK = {"lora": 1.0, "full": 2.0}
ATTENTION_BACK = 2.5


@dataclass(frozen=True)
class TrainingForecast:
    """What to expect of one run on one device.

    Args:
        model: Its name.
        tokens: Of one sample.
        batch: Samples of an iteration, on one device.
        passes: Passes of the model for one sample by kind, forward and backward apart.
        seconds: Of one iteration.
        memory: Bytes by what they are for.
        density: Kept share of pairs in the sparse passes, and where it is from.
        assumed: What the figures stand on.
    """

    model: str
    tokens: int
    batch: int
    passes: dict[str, float]
    seconds: float
    memory: dict[str, float]
    density: tuple[float, str]
    assumed: tuple[str, ...]

    def text(self) -> str:
        """Write it for people."""
        lines = [
            f"{self.model}: {self.tokens:,} tokens per sample, {self.batch} samples per iteration",
            f"time: {self.seconds:.1f} s per iteration (forecast, not measured)",
            *(f"  {count:5.2f} x {name}" for name, count in self.passes.items()),
            f"memory: {sum(self.memory.values()) / GIB:.1f} GiB (forecast, not measured)",
            *(f"  {size / GIB:7.2f} GiB {name}" for name, size in self.memory.items()),
            "assumed:",
            *(f"  {line}" for line in self.assumed),
        ]
        return "\n".join(lines) + "\n"


def forecast(config: Config, device_memory: float = 141e9) -> TrainingForecast:
    """Forecast a config; ``device_memory`` in bytes is only compared with (H200: 141 GB).

    ``model`` may be a folder or one of the names in ``pipelines/known.py``.
    """
    found, vae = _model_config(config.model)
    size = model_size(
        found, config.size.height, config.size.width, config.size.num_frames or 1, vae=vae
    )
    strategy = config.make_strategy()
    told = forecast_sampling(size, strategy, num_steps=config.steps)
    share = told.sparse_share if strategy is not None else 0.0
    density = told.density + _pooled_share(strategy)
    sparse = 1 - share + share * (density / EFFICIENCY + PLANNING)
    passes, seconds = _time(config, size, sparse)
    memory = _memory(config, size, found)
    batch = config.train.batch
    back = LINEAR_BACK["lora" if config.lora else "full"]
    assumed = [
        f"{ATTENTION_RATE:.0f} TFLOP/s in attention, {OTHER_RATE:.0f} TFLOP/s elsewhere",
        "one device processes the whole batch; several devices share it",
        f"kernel efficiency {EFFICIENCY}, planning {PLANNING:.0%} of dense attention",
        f"density {density:.3f} ({told.density_from}; pooled keys included)",
        f"{share:.0%} of the student's attention is sparse",
        f"backward takes {ATTENTION_BACK} forward passes in attention, {back:.0f} elsewhere",
        "not counted: VAE, text encoders (freed before training), data, CUDA's own memory",
    ]
    if sum(memory.values()) > device_memory:
        assumed.append(
            f"this does not fit into {device_memory / GIB:.0f} GiB: a smaller micro_batch, "
            "gradient_checkpointing, lora"
        )
    return TrainingForecast(
        config.model,
        size.grid.tokens,
        batch,
        passes,
        seconds * batch,
        memory,
        (density, told.density_from),
        tuple(assumed),
    )


def _pooled_share(strategy: Strategy | None) -> float:
    """Give what pooled keys add to the density, at most."""
    rules = strategy.rules if strategy else ()
    return max((rule.instance.extra_density for rule in rules), default=0.0)


def walk_length(steps: int) -> float:
    """Mean passes of a rollout to the later of two steps, each drawn evenly from ``steps``."""
    return sum(max(i, j) for i in range(steps) for j in range(steps)) / steps**2


def _time(config: Config, size: ModelSize, sparse: float) -> tuple[dict[str, float], float]:
    """Count passes of one sample, and their seconds."""
    linear, attention = (
        size.other_flops / OTHER_RATE / 1e12,
        size.attention_flops / ATTENTION_RATE / 1e12,
    )
    back = LINEAR_BACK["lora" if config.lora else "full"]
    again = 1 if config.train.gradient_checkpointing else 0

    def forward(part: float) -> float:
        return linear + part * attention

    def backward(part: float) -> float:
        return linear * (back + again) + part * attention * (ATTENTION_BACK + again)

    if config.task == "finetune":
        passes = {"student forward": 1.0, "student backward": 1.0}
        return passes, forward(sparse) + backward(sparse)
    own = config.distill
    steps, updates = own.steps, own.critic_updates
    alone = (steps - 1) / 2  # a rollout to one drawn step
    walk = walk_length(steps) + (updates - 1) * alone
    critic = sparse if own.sparse_critic else 1.0
    guided = 2.0 if _two_branches(config, size) else 1.0
    teacher = guided + (updates if own.critic_regularization > 0 else 0)
    passes = {
        "student forward without gradient": walk + updates,
        "student forward and backward": 1.0,
        "critic forward and backward": float(updates),
        "critic forward": 1.0,
        "teacher forward (dense)": teacher,
    }
    seconds = (
        (walk + updates + 1) * forward(sparse)
        + backward(sparse)
        + (updates + 1) * forward(critic)
        + updates * backward(critic)
        + teacher * forward(1.0)
    )
    return passes, seconds


def _two_branches(config: Config, size: ModelSize) -> bool:
    """Guess whether the teacher is guided by two passes."""
    if size.family.name in {"flux", "hunyuan_video"}:
        return config.distill.true_guidance > 1
    return (config.distill.guidance or 0) > 1


def _memory(config: Config, size: ModelSize, found: dict[str, Any]) -> dict[str, float]:
    import diffusers

    dtype = getattr(torch, config.train.dtype)
    with torch.device("meta"):
        model = getattr(diffusers, size.class_name).from_config(dict(found))
        torch.nn.Module.to(model, dtype)
    model.requires_grad_(config.lora is None)
    trained = float(size.parameters)
    if config.lora is not None:
        _add_adapters(model, config.lora, ("student",), 0)
        trained = float(sum(p.numel() for n, p in model.named_parameters() if ".student." in n))
    count = 2 if config.task == "distill" else 1
    kept = _saved_bytes(model, size, dtype) * config.train.micro_batch
    if config.train.gradient_checkpointing:
        width = size.heads * size.head_dim
        hidden = size.grid.tokens * width * dtype.itemsize * config.train.micro_batch
        kept = kept / size.layers + hidden * size.layers
    whole = float(size.parameters * dtype.itemsize)
    rounded = {}
    if config.lora is None and dtype != torch.float32:
        rounded[f"trained weights in compute precision, {config.train.dtype}"] = count * whole
    return {
        f"frozen weights, {config.train.dtype}": whole,
        **rounded,
        f"trained weights, gradients and AdamW's moments, fp32, {count} x {trained / 1e6:.1f} M": (
            count * trained * 16
        ),
        "activations of one pass with gradient": kept,
    }


def _saved_bytes(model: Any, size: ModelSize, dtype: torch.dtype) -> float:
    """Sum what autograd keeps of one pass of one sample, weights and score tables left out."""
    grid = size.grid
    weights = {p.untyped_storage()._cdata for p in model.parameters()}  # noqa: SLF001
    seen: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        # Attention on tensors without data is spelled out; a kernel keeps no table of scores.
        if key not in weights and tensor.numel() < grid.tokens**2:
            seen[key] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs = size.family.example(model.config, *_latents(size, model), grid.text_length or 512)
    inputs = {key: _cast(value, dtype) for key, value in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(**inputs)
    return float(sum(seen.values()))


def _latents(size: ModelSize, model: Any) -> tuple[int, int, int]:
    """Find the latents' extents from the tokens'."""
    config, grid = model.config, size.grid
    patch = getattr(config, "patch_size", 1)
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    if size.class_name == "FluxTransformer2DModel":
        patch = (1, 2, 2)  # packed by the pipeline
    return grid.frames * patch[0], grid.height * patch[1], grid.width * patch[2]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta", dtype if value.is_floating_point() else None)
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return value


def _model_config(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name].config, None
    folder = Path(name)
    path = folder / "transformer" / "config.json"
    if not path.is_file():
        raise DistillError(
            f"model: {name}: no {path}; give a folder or one of: {', '.join(KNOWN_MODELS)}"
        )
    vae = folder / "vae" / "config.json"
    try:
        return load_json(path), load_json(vae) if vae.is_file() else None
    except (OSError, ValueError) as error:
        raise DistillError(f"model: {name}: its configs cannot be read: {error}") from error
