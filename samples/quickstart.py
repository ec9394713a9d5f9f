# SPDX-License-Identifier: Apache-2.0
"""Generate one clip dense and one sparse with the shipped small model, and print what ran.

Run from the repository's root: ``python samples/quickstart.py``. Takes under a minute on a CPU.
"""

from pathlib import Path

import torch
from diffusers import WanPipeline

import dit_sparse  # noqa: F401  (gives every pipeline enable_sparse_attention)

MODEL = Path(__file__).parent / "wan-tiny"
SIZE = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 20}


def main() -> None:
    """Generate twice from one seed and compare."""
    pipe = WanPipeline.from_pretrained(MODEL)

    def clip() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = pipe("a red circle moving right", generator=generator, output_type="pt", **SIZE)
        return torch.as_tensor(call.frames[0])

    dense = clip()
    pipe.enable_sparse_attention("wan-tiny.adaspa", probe=32)
    sparse = clip()
    print(pipe.sparse_attention.report())
    pipe.disable_sparse_attention()
    error = (dense - sparse).square().mean().clamp(min=1e-10)
    print(f"PSNR against the dense clip: {-10 * error.log10():.1f} dB")


if __name__ == "__main__":
    main()
