# SPDX-License-Identifier: Apache-2.0
"""VBench's consistency of subject and background, with feature models from the user's own folders.

Huang et al. 2024 (VBench): features of each frame against those of the frame before and of the
first frame. Models are loaded through Transformers from a local folder; nothing is downloaded.
Preparation follows the official evaluator: DINO sees frames whose shorter side is 224, uncropped,
so its position table is stretched as DINO's own code does it; CLIP sees a 224 x 224 centre.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (torch's own short name)

from dit_sparse.quality.errors import QualityInputError
from dit_sparse.quality.pairs import Meter
from dit_sparse.quality.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dit_sparse.quality.pairs import Frame

    Extract = Callable[[Tensor], Tensor]  # [1, 3, height, width], levels of 255 -> [channels]

Model = Literal["dino", "clip"]
SIDE = 224  # pixels
CONSISTENCY = (
    "VBench's {what}_consistency formula with features of the given {model} folder: mean over "
    "frames of (max(0, cos to the frame before) + max(0, cos to frame 0)) / 2; sparse less dense"
)
TEXTS = {
    "dino": CONSISTENCY.format(what="subject", model="DINO (ViT)"),
    "clip": CONSISTENCY.format(what="background", model="CLIP"),
}
_MEAN_STD = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class Consistency(Meter):
    """Consistency of each clip, and the sparse one's less the dense one's.

    Args:
        name: The row's.
        definition: The row's.
        extract: Gives a frame's feature.
        source: Which model.
    """

    costly = True

    def __init__(self, name: str, definition: str, extract: Extract, source: str) -> None:
        self._name, self._definition, self._source = name, definition, source
        self._extract = extract
        self._clips = (Chain(), Chain())

    @torch.inference_mode()
    def update(self, dense: Frame, sparse: Frame) -> None:
        """Take the next frame of each."""
        for chain, frame in zip(self._clips, (dense, sparse), strict=True):
            pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
            chain.add(self._extract(pixels))

    def finish(self) -> list[Scores]:
        """Give the row."""
        one, other = (chain.values for chain in self._clips)
        if not one:
            reason = "needs 2 measured frames"
            return [Scores(self._name, self._definition, "", None, reason=reason, better="zero")]
        dense, sparse = fmean(one), fmean(other)
        return [
            Scores(
                self._name,
                self._definition,
                "",
                sparse - dense,
                tuple(s - d for d, s in zip(one, other, strict=True)),
                better="zero",
                dense=dense,
                sparse=sparse,
                source=self._source,
                first=1,
            )
        ]


class Chain:
    """One clip's similarities, each in [0, 1], kept with two features only."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._first: Tensor | None = None
        self._before: Tensor | None = None

    def add(self, feature: Tensor) -> None:
        """Compare with the frame before and with frame 0."""
        unit = F.normalize(feature.reshape(-1).double().cpu(), dim=0)
        if self._first is None or self._before is None:
            self._first = unit
        else:
            # Unit vectors are rounded: without the upper limit a cosine reaches 1 + 2e-16.
            near = [
                min(1.0, max(0.0, float(unit @ other))) for other in (self._before, self._first)
            ]
            self.values.append(sum(near) / 2)
        self._before = unit


def load_extractor(model: Model, folder: Path, device: str = "cpu") -> Extract:
    """Load a feature model from a local Transformers folder.

    Raises:
        QualityInputError: It cannot be loaded as what it is said to be.
    """
    import transformers

    name = "ViTModel" if model == "dino" else "CLIPVisionModelWithProjection"
    try:
        network: Any = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # whatever is wrong here is wrong with the folder
        raise QualityInputError(
            f"{folder}: cannot be loaded as {name}: {str(error).splitlines()[0]}"
        ) from error
    network = network.eval().requires_grad_(requires_grad=False).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in _MEAN_STD[model])
    if model == "dino":
        stretch(network.embeddings)

    def extract(pixels: Tensor) -> Tensor:
        ready = dino_frame(pixels) if model == "dino" else clip_frame(pixels)
        ready = (ready.to(device) / 255 - mean) / std
        if model == "dino":
            found = network(pixel_values=ready, interpolate_pos_encoding=True)
            return torch.as_tensor(found.last_hidden_state[0, 0])
        return torch.as_tensor(network(pixel_values=ready).image_embeds[0])

    return extract


def dino_frame(pixels: Tensor) -> Tensor:
    """Resize ``[1, 3, height, width]`` so that the shorter side is 224."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = [SIDE * side // short for side in (height, width)]
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


def clip_frame(pixels: Tensor) -> Tensor:
    """Resize likewise, bicubic, and cut out the centre."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = [SIDE * side // short for side in (height, width)]
    whole = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False).clamp(0, 255)
    top, left = (round((side - SIDE) / 2) for side in size)
    return whole[..., top : top + SIDE, left : left + SIDE]


def stretch(embeddings: Any) -> None:
    """Let a ViT stretch its position table as DINO's own code does: by a factor, 0.1 too large."""

    def positions(tokens: Tensor, height: int, width: int) -> Tensor:
        table: Tensor = embeddings.position_embeddings
        count = table.shape[1] - 1
        if tokens.shape[1] - 1 == count and height == width:
            return table
        side = round(count**0.5)
        patch = embeddings.patch_embeddings.projection.kernel_size
        rows, columns = height // patch[0], width // patch[1]
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
        if grid.shape[-2:] != (rows, columns):
            raise QualityInputError(
                f"position table of {tuple(grid.shape[-2:])} for {rows} x {columns} patches"
            )
        return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), 1)

    embeddings.interpolate_pos_encoding = positions
