# SPDX-License-Identifier: Apache-2.0
"""Identify what a result depends on, so that stored results are reused only for the same inputs.

``pipeline_identity`` covers every component of a pipeline by content: class, config, all bytes of
all weights, tokenizer files. Paths do not count. ``evaluate``, ``profile`` and ``distill`` store
an identity beside their results and compare it before they reuse any (``changed``).

Weights are hashed whole with SHA-256, from memory, in threads: no sampling, and no cache of hashes
by path or date, which a copied file would defeat. It costs less than loading the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dit_sparse._version import __version__
from dit_sparse.core.reading import load_json, visible

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "triton")
_CHUNK = 2**26  # bytes that leave a GPU at once
_THREADS = 8
_DIGITS = 16
# Of a tokenizer's arguments: where it was loaded from, not what it is.
_ORIGIN = {"name_or_path", "is_local", "local_files_only", "from_slow"}
_SHOWN = 3  # differences that a message lists


def pipeline_identity(pipe: Any) -> dict[str, Any]:
    """Identify a Diffusers pipeline by the content of all its components, ready for JSON.

    Args:
        pipe: Any pipeline; what it holds now counts, adapters and merged LoRAs included.
    """
    parts = pipe.components
    settings = {key: value for key, value in pipe.config.items() if key not in parts}
    found = {"class": type(pipe).__name__, "config": plain(settings)}
    return found | {name: component_identity(part) for name, part in sorted(parts.items())}


def component_identity(part: Any) -> Any:
    """Identify one component: a model, scheduler, tokenizer or processor."""
    if part is None:
        return None
    found: dict[str, Any] = {"class": type(part).__name__}
    config = getattr(part, "config", None)
    if config is not None:
        found["config"] = plain(config.to_dict() if hasattr(config, "to_dict") else config)
    if isinstance(part, nn.Module):
        found["weights"] = weights_digest(part)
        found["settings"] = _module_settings(part)
    elif hasattr(part, "get_vocab"):
        found |= _tokenizer(part)
    elif hasattr(part, "set_shift"):  # not in the config of flow-matching schedulers
        found["shift"] = plain(part.shift)
    elif config is None:  # a processor, which may hold a tokenizer
        held = part.to_dict() if hasattr(part, "to_dict") else {}
        found["content"] = plain(held | {k: v for k, v in vars(part).items() if k not in held})
    return found


def weights_digest(model: nn.Module) -> str:
    """Hash all parameters and buffers of a model by name, dtype, shape and bytes."""
    state = sorted(model.state_dict().items())
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda item: _entry_digest(model, *item), state)
        return _hash(dict(zip((key for key, _ in state), digests, strict=True)))


def tensor_digest(value: Tensor) -> str:
    """Hash a tensor by dtype, shape and bytes, wherever it lies; quantized ones by their parts."""
    if _wraps_tensors(value):
        quantized: Any = value
        names, _ = quantized.__tensor_flatten__()
        return _hash({name: tensor_digest(getattr(quantized, name)) for name in names})
    whole = value.detach().as_subclass(Tensor)
    digest = hashlib.sha256(f"{whole.dtype} {tuple(whole.shape)} ".encode())
    flat = whole.reshape(-1)
    if flat.stride(0) != 1:  # a single number cut out of a longer tensor
        flat = flat.clone(memory_format=torch.contiguous_format)
    for part in flat.view(torch.uint8).split(_CHUNK):
        digest.update(memoryview(part.cpu().numpy()))
    return digest.hexdigest()[:_DIGITS]


def file_digest(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:_DIGITS]


def text_digest(texts: Any) -> str:
    """Hash plain data, such as a list of prompts."""
    return _hash(plain(texts))


def versions() -> dict[str, str | None]:
    """Name the versions that numbers depend on; None where a package is not installed."""
    return {"dit_sparse": __version__, **{name: _version(name) for name in PACKAGES}}


def plain(value: Any) -> Any:
    """Turn a value into JSON data that is equal where the content is equal.

    Private keys ("_...") are left out; tensors, arrays and pictures become hashes.
    """
    if isinstance(value, str):
        return visible(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        named = ((str(key), item) for key, item in value.items())
        return {
            key: plain(item)
            for key, item in named
            if not key.startswith("_") and key != "transformers_version"
        }
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {tensor_digest(value)}"
    if isinstance(value, Path):
        return file_digest(value) if value.is_file() else str(value)
    if hasattr(value, "tobytes"):  # an array or a picture
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        form = getattr(value, "dtype", None) or getattr(value, "mode", None)
        return f"{shape} {form} {hashlib.sha256(value.tobytes()).hexdigest()[:_DIGITS]}"
    if hasattr(value, "get_vocab"):
        return component_identity(value)
    if hasattr(value, "to_dict"):
        return {"class": type(value).__name__, **plain(value.to_dict())}
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def changed(recorded: Any, now: Mapping[str, Any], what: str) -> str | None:
    """Say why stored results may not be reused; None: their inputs are the present ones.

    Args:
        recorded: The identity that is stored with them.
        now: The present one.
        what: The results, in the plural: "clips".
    """
    remedy = f"choose another output, or add --fresh (fresh=True) to delete these {what}"
    if not isinstance(recorded, Mapping):
        return (
            f"contains {what} from an earlier version of dit-sparse, which did not record all of "
            f"their inputs; {remedy}"
        )
    found = differences(recorded, plain(now))
    if not found:
        return None
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    listed = "; ".join(found[:_SHOWN])
    return (
        f"contains {what} made with other inputs: {listed}{more}; restore these inputs, {remedy}"
    )


def remember(path: Path, now: Mapping[str, Any], what: str) -> str | None:
    """Record an identity in a file; where one is recorded, say like ``changed`` if it differs.

    Args:
        path: A JSON file beside the results.
        now: The present identity.
        what: The results, in the plural.
    """
    if not path.exists():
        path.write_text(json.dumps(plain(now), indent=1) + "\n", encoding="utf-8")
        return None
    try:
        recorded = load_json(path)
    except (OSError, ValueError, RecursionError):
        recorded = None
    why = changed(recorded, now, what)
    return None if why is None else f"{path.parent}: {why}"


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """List where two identities differ, one text for each key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        inner = f"{path}." if path else ""
        return [
            text
            for key in dict.fromkeys((*before, *now))
            for text in differences(before.get(key), now.get(key), f"{inner}{key}")
        ]
    if isinstance(before, list) and isinstance(now, list):
        if len(before) == len(now):
            pairs = enumerate(zip(before, now, strict=True))
            return [text for i, pair in pairs for text in differences(*pair, f"{path}[{i}]")]
        return [f"{path}: {len(before)} entries, now {len(now)}"]
    if before == now and type(before) is type(now):
        return []
    return [f"{path}: {_short(before)}, now {_short(now)}"]


def _module_settings(model: nn.Module) -> dict[str, Any]:
    """Collect what changes a model's output and is in neither its config nor its weights."""
    found: dict[str, Any] = {
        key: value
        for key, value in vars(model).items()
        if key.startswith(("use_", "tile_")) and isinstance(value, bool | int | float)
    }
    processors = getattr(model, "attn_processors", {}).values()
    backends = {f"{type(p).__name__} {getattr(p, '_attention_backend', None)}" for p in processors}
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    adapters = {
        name: [plain(module.active_adapters), plain(module.scaling)]
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and isinstance(getattr(module, "scaling", 0), dict)
    }
    found |= {"attention": sorted(backends) or implementation}
    return found | ({"adapters": _hash(adapters)} if adapters else {})


def _tokenizer(part: Any) -> dict[str, Any]:
    """Identify a tokenizer by its backend, or by its vocabulary and files."""
    given = {
        key: value
        for key, value in getattr(part, "init_kwargs", {}).items()
        if key not in _ORIGIN and not key.endswith("_file")
    }
    now = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map")
    given |= {key: getattr(part, key) for key in now if hasattr(part, key)}
    backend = getattr(part, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for key in ("truncation", "padding"):  # left by the latest call
            content.pop(key, None)
    else:
        named = getattr(part, "init_kwargs", {}).values()
        files = [Path(value) for value in named if isinstance(value, str) and _is_file(value)]
        content = {"vocab": part.get_vocab(), "files": [file_digest(path) for path in files]}
    added = given.pop("added_tokens_decoder", None)
    return {"settings": plain(given), "content": _hash([content, plain(added)])}


def _wraps_tensors(value: object) -> bool:
    return is_traceable_wrapper_subclass(value)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path
        return False


def _entry_digest(model: nn.Module, name: str, value: Any) -> str:
    """Hash one entry of a state dict; quantizers put more than tensors there."""
    if not isinstance(value, Tensor):
        return text_digest(value)
    return tensor_digest(_resident(model, name, value) if value.is_meta else value)


def _resident(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Find the numbers of a weight that accelerate keeps elsewhere (sequential offload)."""
    path, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "weights_map", None) is not None:
            found: Tensor = one.weights_map[leaf]
            return found
    return value  # a model without numbers: its shape is all there is


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_DIGITS]


def _short(value: Any) -> str:
    text = "not recorded" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."
