# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 again, natively 33 frames of 192x192 pixels: wan-tiny with wider feed-forward layers."""

from pathlib import Path
from types import MappingProxyType

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from latents import FRAMES, PIXELS, LatentSpace
from positions import spread_positions
from text import PIPELINE_TOKENS
from torch import nn

from families.wan import HEAD_DIM, HEADS, Wan

LATENTS = Path(__file__).parents[1] / "wan-latents.safetensors"
WAN = Path(__file__).parents[2] / "wan-tiny"


class Flagship(Wan):
    """Starts from wan-tiny's weights (see ``from_wan.py``) and shares its latents and VAE.

    A smaller or shorter clip is the native one seen coarsely: its tokens get the positions of the
    native tokens that they stand for, so that the native size interpolates.
    """

    sample_defaults = MappingProxyType(
        {
            "height": 192,
            "width": 192,
            "num_frames": 33,
            "num_inference_steps": 20,
            "guidance_scale": 4.0,
            "fps": 12,
            "call": {"max_sequence_length": 64},
        }
    )
    halves = ()  # wan-tiny's are kept
    padded_lengths = (64, 64, 64, PIPELINE_TOKENS)  # WanPipeline pads to 512 by default
    ffn_dim = 4 * HEADS * HEAD_DIM

    def space(self, path: Path) -> LatentSpace:  # noqa: ARG002, the map is fixed by the VAE
        """Read the latent space that wan-tiny's VAE decodes."""
        return LatentSpace.load(LATENTS)

    def make_autoencoder(self, seed: int = 0) -> AutoencoderKLWan:  # noqa: ARG002, it is trained
        """Load wan-tiny's."""
        return AutoencoderKLWan.from_pretrained(WAN, subfolder="vae")

    def spread(self, model: WanTransformer3DModel) -> None:
        """Give clips of every size the positions of the native one."""
        native = self.sample_defaults
        frames = 1 + (native["num_frames"] - 1) // FRAMES
        spread_positions(model, (frames, native["height"] // PIXELS, native["width"] // PIXELS))

    def prepare(self, model: nn.Module) -> None:
        """Collapse the padding of texts; spread the positions of small clips."""
        super().prepare(model)
        self.spread(model)
