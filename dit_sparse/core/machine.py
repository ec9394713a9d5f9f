# SPDX-License-Identifier: Apache-2.0
"""What numbers depend on: versions, processor, GPUs, threads. Results carry it with them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dit_sparse._version import __version__
from dit_sparse.errors import UnsupportedError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "numpy")

OLDEST_TORCH = (2, 9)  # as pyproject.toml has it


def check_torch() -> None:
    """Raise ``UnsupportedError`` where torch is too old, with what to install."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise UnsupportedError(
            f"dit_sparse needs torch >= {wanted}, got {torch.__version__}; "
            f"run: pip install --upgrade 'torch>={wanted}'"
        )


def widest_float(device: torch.device) -> torch.dtype:
    """Give the dtype for sums of many terms: float64; float32 on devices that may not have it."""
    return torch.float64 if device.type in {"cpu", "cuda", "meta"} else torch.float32


def environment() -> dict[str, Any]:
    """Name what numbers depend on: versions, processor, GPUs, threads."""
    return {
        "dit_sparse": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "processor": processor(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
