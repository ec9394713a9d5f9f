# SPDX-License-Identifier: Apache-2.0
"""Look at this machine: versions, devices, which kernel would run on each, and what is wrong."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from dit_sparse.core.machine import environment, processor, version_of
from dit_sparse.errors import NativeUnavailable
from dit_sparse.kernels import native, native_library
from dit_sparse.kernels.canary import check_kernel
from dit_sparse.kernels.dispatch import BY_NAME_ONLY, KERNELS, Backends
from dit_sparse.pipelines import FAMILIES, MODELS
from dit_sparse.strategy.files import shipped_names

CHECKED_HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel on one device.

    Args:
        name: As in ``--kernel``.
        reasons: Why it cannot run there; empty: it can.
        check: What its check against the reference found; None where it passed or was not made.
        by_name_only: Never chosen unless it is asked for.
    """

    name: str
    reasons: tuple[str, ...]
    check: str | None = None
    by_name_only: bool = False

    @property
    def usable(self) -> bool:
        """It can run, and computes what it should."""
        return not self.reasons and self.check is None


@dataclass(frozen=True, slots=True)
class Device:
    """One device and the kernels that were tried on it."""

    name: str
    description: str
    dtype: str
    kernels: tuple[Kernel, ...]

    @property
    def chosen(self) -> str | None:
        """Name of the kernel that would run by default."""
        found = (k.name for k in self.kernels if not k.reasons and not k.by_name_only)
        return next(found, None)


@dataclass(frozen=True, slots=True)
class Native:
    """The library of the native CPU kernel.

    Args:
        library: Its file; None where there is none that can be loaded.
        instruction_sets: Those that it holds and this processor has, best first.
        reason: Why there is none, and how to build it; None where it was loaded.
    """

    library: str | None
    instruction_sets: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that ``dit-sparse doctor`` says."""

    environment: dict[str, Any]
    devices: tuple[Device, ...]
    models: tuple[str, ...]
    strategies: tuple[str, ...]
    native: Native
    problems: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Give everything, ready for JSON."""
        plain = asdict(self)
        for told, device in zip(plain["devices"], self.devices, strict=True):
            told["chosen"] = device.chosen
        return plain


def diagnose() -> Diagnosis:
    """Look at everything; each kernel that can run is checked against the reference."""
    names = ["cpu", *accelerators()]
    devices = tuple(_examine(name) for name in names)
    problems = [problem for device in devices for problem in _problems(device)]
    problems += [problem for problem in (_torchvision(), _ffmpeg()) if problem]
    models = tuple(sorted({*FAMILIES, *MODELS}))
    return Diagnosis(
        environment(), devices, models, shipped_names(), native_state(), tuple(problems)
    )


def accelerators() -> list[str]:
    """Name the devices beside the CPU: "cuda:0", "mps:0", ...; best first."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    return [] if kind is None else [f"{kind.type}:{i}" for i in range(count)]


def native_state() -> Native:
    """Load the native CPU kernel's library, or find out why it cannot be loaded."""
    try:
        library = native_library.load()
    except NativeUnavailable as error:
        return Native(None, reason=str(error))
    return Native(library._name, tuple(native.instruction_sets()))  # noqa: SLF001  (ctypes has no other)


def _examine(name: str) -> Device:
    device = torch.device(name)
    if device.type == "cpu":
        dtype, description = torch.float32, processor()
    elif device.type != "cuda":
        dtype, description = torch.bfloat16, device.type
    else:
        found = torch.cuda.get_device_properties(device)
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        description = (
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, capability "
            f"{found.major}.{found.minor}"
        )
    kernels = []
    for kernel, reasons in Backends().explain(device, dtype):
        by_name = kernel in BY_NAME_ONLY
        wrong = None if reasons or by_name else _check(kernel, device, dtype)
        kernels.append(Kernel(kernel, tuple(reasons), wrong, by_name))
    return Device(name, description, str(dtype).removeprefix("torch."), tuple(kernels))


def _check(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    module = importlib.import_module(KERNELS[kernel])
    try:
        return check_kernel(module, device, dtype, CHECKED_HEAD_DIM)
    except Exception as error:  # noqa: BLE001  (a doctor reports, whatever it is)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _problems(device: Device) -> list[str]:
    found = [
        f"{device.name}: kernel {kernel.name!r} gives wrong results: {kernel.check}; choose "
        "another kernel with --kernel, and please report this"
        for kernel in device.kernels
        if kernel.check is not None
    ]
    if device.chosen is None:
        found.append(f"{device.name}: no kernel is available; see the reasons above")
    return found


def _torchvision() -> str | None:
    """A torchvision that fails to import breaks ``from diffusers import WanPipeline``."""
    if find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # noqa: BLE001  (RuntimeError as often as ImportError)
        why = str(error).strip().splitlines()[0]
        return (
            f"torchvision {version_of('torchvision')} cannot be imported ({why}), which makes "
            f"diffusers pipelines fail; install the build for torch {torch.__version__}, or "
            "uninstall torchvision"
        )
    return None


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return f"ffmpeg is required for mp4 files ({error}); pip install imageio-ffmpeg"
    return None
