# SPDX-License-Identifier: Apache-2.0
"""Measure where each head of one attention call looks, and name its role.

All shares are of the video (or picture) queries' softmax mass; a share is told beside the one that
uniform attention would have, as a small window holds little by its size alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.inspect.mass import SHARES

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.call import AttentionCall
    from dit_sparse.inspect.mass import HeadMass

NEAR = 2  # latent rows and columns to either side that count as the same place
STRIPE = 0.25  # share of the key tokens that the heaviest columns are
QUARTER = SHARES.index(0.25)
ROWS = 512  # queries at a time

# A role is named where a head has so much more of its mass there than uniform attention would.
DIAGONAL = 0.5  # of the mass that could be gained: (share - uniform) / (1 - uniform)
FRAME = 0.2
STRIPED = 0.35
SKIPPABLE = 0.5  # relative error of the output when every query gets the mean value
SHARP = 0.55  # mass of the best quarter of key blocks


@dataclass(frozen=True)
class Head:
    """Where one head looks.

    Args:
        top25: Mass that each query block finds in its heaviest quarter of key blocks, mean.
        local: Mass on the same place in the same frame.
        temporal: Mass on the same place in other frames; 0 for a picture.
        frame: Mass on the query's own frame; for a picture, all but the text's.
        stripe: Mass on the quarter of key tokens that all queries together look at most.
        text: Mass on text.
        entropy: Of the softmax, over that of uniform attention.
        mean_error: Relative L2 error of the output if every query got the mean value.
        power: Root mean square of the output.
        role: See ``role``.
    """

    top25: float
    local: float
    temporal: float
    frame: float
    stripe: float
    text: float
    entropy: float
    mean_error: float
    power: float
    role: str

    def to_dict(self) -> dict[str, Any]:
        """Give plain data, four digits."""
        return {
            key: value if isinstance(value, str) else float(f"{value:.4g}")
            for key, value in asdict(self).items()
        }


def uniform_shares(call: AttentionCall) -> dict[str, float]:
    """Give what uniform attention has of each share."""
    near, same_frame = _places(call)
    count = call.key.shape[1]
    local = (near & same_frame).double().sum(1).mean().item() / count
    return {
        "top25": 0.25,
        "local": local,
        "temporal": near.double().sum(1).mean().item() / count - local,
        "frame": same_frame.double().sum(1).mean().item() / count,
        "stripe": STRIPE,
    }


def measure(call: AttentionCall, masses: list[HeadMass]) -> list[Head]:
    """Measure all heads of a call, first sample; fp32, queries in pieces.

    Args:
        call: All heads of one layer.
        masses: Its block mass, from ``attention_mass``.
    """
    near, same_frame = _places(call)
    uniform = uniform_shares(call)
    video = _video(call)
    keys = call.key.shape[1]
    found = []
    for head in range(call.query.shape[2]):
        query = call.query[0, video, head].float()
        key, value = call.key[0, :, head].float(), call.value[0, :, head].float()
        sums = torch.zeros(5, dtype=torch.float64)
        columns = torch.zeros(keys, dtype=torch.float64)
        outputs = []
        for start in range(0, len(query), ROWS):
            part = slice(start, start + ROWS)
            weight = (query[part] @ key.T * call.scale).softmax(-1)
            own, frame = near[part], same_frame[part]
            text = torch.ones(keys, dtype=torch.bool)
            text[video] = False
            entropy = -(weight * weight.clamp(min=1e-30).log()).sum()
            parts = [
                (weight * (own & frame)).sum(),
                (weight * (own & ~frame)).sum(),
                (weight * frame).sum(),
                weight[:, text].sum(),
                entropy,
            ]
            sums += torch.stack(parts).double()
            columns += weight.sum(0).double()
            outputs.append(weight @ value)
        output = torch.cat(outputs)
        mean = (output - value.mean(0)).norm() / output.norm().clamp(min=1e-30)
        local, temporal, frame, text, entropy = (sums / len(query)).tolist()
        stripe = columns.topk(round(STRIPE * keys)).values.sum().item() / len(query)
        shares = {
            "top25": masses[head].heaviest[QUARTER],
            "local": local,
            "temporal": temporal,
            "frame": frame,
            "stripe": stripe,
            "mean_error": mean.item(),
        }
        found.append(
            Head(
                **shares,
                text=text,
                entropy=entropy / torch.tensor(float(keys)).log().item(),
                power=output.square().mean().sqrt().item(),
                role=role(shares, uniform),
            )
        )
    return found


def role(shares: dict[str, float], uniform: dict[str, float]) -> str:
    """Name what a head does.

    In this order: "skippable" (the mean value would nearly do), "diagonal" (its own place in its
    own frame), "multi-diagonal" (its own place in all frames), "frame" (anywhere in its own
    frame; a video's), "stripe" (the same keys whatever the query), "sharp" (few blocks, none of
    the above), "diffuse".
    """

    def gained(*names: str) -> float:
        even = sum(uniform[name] for name in names)
        return (sum(shares[name] for name in names) - even) / (1 - even) if even < 1 else 0.0

    if shares["mean_error"] < SKIPPABLE:
        return "skippable"
    if gained("local") >= DIAGONAL:
        return "diagonal"
    if gained("local", "temporal") >= DIAGONAL:
        return "multi-diagonal"
    if uniform["temporal"] > 0 and gained("frame") >= FRAME:  # a picture is all one frame
        return "frame"
    if gained("stripe") >= STRIPED:
        return "stripe"
    return "sharp" if shares["top25"] >= SHARP else "diffuse"


def _video(call: AttentionCall) -> Tensor:
    """Mark the tokens that are no text: bool ``[seq_len]``."""
    grid = call.grid
    video = torch.ones(call.key.shape[1], dtype=torch.bool)
    if grid.text_length:
        text = slice(0, grid.text_length) if grid.text_first else slice(-grid.text_length, None)
        video[text] = False
    return video


def _places(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Compare places: same place (any frame) and same frame, bool ``[video, seq_len]``."""
    grid = call.grid
    frames, rows, columns = torch.meshgrid(
        *(torch.arange(side) for side in (grid.frames, grid.height, grid.width)), indexing="ij"
    )
    frames, rows, columns = frames.flatten(), rows.flatten(), columns.flatten()
    near = ((rows[:, None] - rows).abs() <= NEAR) & ((columns[:, None] - columns).abs() <= NEAR)
    same = frames[:, None] == frames
    video = _video(call)
    wide = torch.zeros(len(frames), len(video), dtype=torch.bool)
    wide_same = wide.clone()
    wide[:, video], wide_same[:, video] = near, same
    return wide, wide_same
