# SPDX-License-Identifier: Apache-2.0
"""What the training scripts ask of a model family."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from objectives import Objective
from torch import Tensor, nn


def call_settings(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings of a pipeline's call that ``sample_defaults.json`` holds."""
    own = {key: value for key, value in defaults.items() if key not in {"fps", "call"}}
    return {**own, **defaults.get("call", {})}


HALVES = {"decoder": ("decoder", "post_quant_conv"), "encoder": ("encoder", "quant_conv")}


class Space(ABC):
    """A fixed latent space: a map from one video or picture in [-1, 1] to latents and back."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels to latents ``[channels, ...]``, mean 0 and deviation 1 over the data."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Map latents to the nearest pixels."""


class Family(ABC):
    """One architecture with its data, latent space, text side, objective and pipeline."""

    objective: Objective
    sample_defaults: Mapping[str, Any]  # native size and settings of the pipeline's call, and fps
    layer_lists: tuple[str, ...] = ("transformer_blocks",)  # attributes whose layers compile
    adam_names: tuple[str, ...] = ()  # parameters of the transformer that Muon leaves to AdamW
    halves: tuple[str, ...] = tuple(HALVES)  # parts of the autoencoder that train

    @abstractmethod
    def space(self, path: Path) -> Space:
        """Read the latent space from ``path``, or fit and write it where the file is missing."""

    @abstractmethod
    def example(self, index: int, frames: int, pixels: int) -> tuple[Tensor, str]:
        """Render training example ``index`` (pixels in [-1, 1]) and write its caption."""

    @abstractmethod
    def pieces(self, step: int) -> Tensor:
        """Draw the autoencoder's batch of a step: ``[batch, 3, frames, H, W]`` or without frames.

        Each piece ``[3, ...]`` must suit ``space.encode``.
        """

    @abstractmethod
    def make_transformer(self, seed: int = 0) -> nn.Module:
        """Build the transformer with its starting weights."""

    @abstractmethod
    def make_autoencoder(self, seed: int = 0) -> nn.Module:
        """Build the autoencoder with its starting weights."""

    @abstractmethod
    def conditioning(self, captions: list[str], rng: random.Random) -> dict[str, Any]:
        """Encode captions into what `forward` needs beside the latents."""

    @abstractmethod
    def forward(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """Predict the objective's target, shaped like ``noisy`` ``[batch, channels, ...]``."""

    @abstractmethod
    def make_pipeline(self, transformer: nn.Module, vae: nn.Module) -> DiffusionPipeline:
        """Put the pipeline together, with tokenizers, text encoders and scheduler."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027, most families need nothing
        """Change ``model`` for training only; nothing by default."""

    def spread(self, model: nn.Module) -> None:  # noqa: B027, most families need nothing
        """Place small examples as the native size seen coarsely; nothing by default."""

    def unpack(self, latents: Tensor, pixels: int) -> Tensor:  # noqa: ARG002, packed families use it
        """Turn the pipeline's ``output_type="latent"`` into ``[batch, channels, ...]``."""
        return latents

    def compile_layers(self, model: nn.Module) -> None:
        """Compile each transformer layer; layers of one class share the compiled code."""
        for name in self.layer_lists:
            for layer in getattr(model, name):
                layer.compile(dynamic=False)

    @staticmethod
    def half(vae: nn.Module, name: str) -> nn.ModuleList:
        """Return the parts of ``vae`` that one half's training changes."""
        parts = [getattr(vae, part, None) for part in HALVES[name]]
        return nn.ModuleList([part for part in parts if part is not None])
