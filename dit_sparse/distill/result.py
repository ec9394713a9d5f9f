# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: weights that Diffusers loads, the strategy beside them, and a card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dit_sparse._version import __version__
from dit_sparse.distill.errors import DistillError
from dit_sparse.strategy.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from dit_sparse.distill.conditions import Conditions
    from dit_sparse.distill.config import Config
    from dit_sparse.distill.networks import Networks
    from dit_sparse.strategy import Strategy


def save_result(
    folder: Path,
    config: Config,
    pipe: Any,
    networks: Networks,
    conditions: Conditions,
    strategy: Strategy | None,
) -> None:
    """Write the student, its strategy and a card into ``folder``.

    With LoRA: ``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights(folder)``. A
    pipeline without that method (PixArt), or a student of whole weights: ``transformer/``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        as_lora = networks.lora is not None and hasattr(pipe, "save_lora_weights")
        if as_lora:
            _save_lora(folder, pipe, networks)
        else:
            _merged(networks).save_pretrained(str(folder / "transformer"))
    except OSError as error:
        raise DistillError(
            f"{folder}: cannot be written: {error.strerror or error}; the checkpoints are "
            "intact. Free space and run the same command again"
        ) from error
    if strategy is not None:
        strategy.save_pretrained(folder)
    write_text(folder / "README.md", card(config, pipe, conditions, strategy, as_lora=as_lora))


def _save_lora(folder: Path, pipe: Any, networks: Networks) -> None:
    from peft.utils import get_peft_model_state_dict

    model = networks.models["student"]
    layers = {
        key: value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(model, adapter_name="student").items()
    }
    config = model.peft_config["student"]
    # Without the defaults: an older peft refuses settings that it does not know.
    defaults = type(config)().to_dict()
    needed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}  # diffusers reads them by name
    settings = {k: v for k, v in config.to_dict().items() if k in needed or v != defaults[k]}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    pipe.save_lora_weights(
        str(folder),
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=plain,
    )


def _merged(networks: Networks) -> Any:
    """Make a plain model of the student."""
    model = networks.models["student"]
    if networks.lora is None:
        return model
    weights = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight
            delta = module.get_delta_weight("student").to(base.device)
            weights[f"{path}.weight"] = (base.float() + delta.float()).to(base.dtype)
    state = {
        key.replace(".base_layer.", "."): value
        for key, value in model.state_dict().items()
        if ".lora_" not in key
    }
    plain = type(model).from_config(model.config).to(networks.dtype)
    plain.load_state_dict(state | weights)
    return plain


def card(
    config: Config,
    pipe: Any,
    conditions: Conditions,
    strategy: Strategy | None,
    *,
    as_lora: bool,
) -> str:
    """Say how the result is used, and how it was made."""
    name = type(pipe).__name__
    size = ", ".join(f"{k}={v}" for k, v in config.size.model_dump(exclude_none=True).items())
    guidance = sampling_guidance(config, conditions)
    load = f'pipe = {name}.from_pretrained("{config.model}")'
    if as_lora:
        load += '\npipe.load_lora_weights("THIS FOLDER")'
    else:
        kind = type(pipe.transformer).__name__
        load = (
            f'transformer = {kind}.from_pretrained("THIS FOLDER/transformer")\n'
            f'pipe = {name}.from_pretrained("{config.model}", transformer=transformer)'
        )
    if strategy is not None:
        load += '\npipe.enable_sparse_attention("THIS FOLDER")'
    call = f"pipe(prompt, {size}, num_inference_steps={config.steps}{guidance})"
    times = ", ".join(f"{float(t):.4f}" for t in conditions.grid.times)
    kind = "Distilled to few steps" if config.task == "distill" else "Fine-tuned"
    sparse = "dense attention" if strategy is None else f"sparse attention {strategy.name!r}"
    settings = json.dumps(config.model_dump(mode="json"), indent=2)
    return f"""# {kind} with {sparse}

    import dit_sparse
    from diffusers import {name}

    {load.replace(chr(10), chr(10) + "    ")}
    {call}

Use the pipeline's own scheduler, {type(pipe.scheduler).__name__}, with its settings and this
number of steps. Otherwise the model runs at noise levels that it was not trained at.

Noise levels of the {config.steps} steps ({conditions.grid.objective.kind}): {times}.

Trained with dit_sparse {__version__}, {config.train.iterations} iterations. All settings:

```json
{settings}
```
"""


def sampling_guidance(config: Config, conditions: Conditions) -> str:
    """Write the guidance argument of sampling: none is left to do where it was distilled in."""
    if config.task == "distill" and conditions.first.uncond is not None:
        if config.distill.true_guidance == 1:
            return ", guidance_scale=1.0"
        return f", guidance_scale={config.distill.guidance}, true_cfg_scale=1.0"
    own = config.distill if config.task == "distill" else config.finetune
    return "" if own.guidance is None else f", guidance_scale={own.guidance}"
