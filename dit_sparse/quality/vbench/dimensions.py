# SPDX-License-Identifier: Apache-2.0
"""VBench's 16 dimensions: what each needs, and how a total is made of them.

Bounds and weights are those of its ``scripts/constant.py``; files lie in its cache folder.
"""

from __future__ import annotations

from typing import NamedTuple


class Dimension(NamedTuple):
    """One dimension.

    Args:
        quality: It counts for the quality score; else for the semantic one.
        low: What counts as 0.
        high: What counts as 1.
        weight: In its score.
        files: Weights it reads, below the cache folder ("torch:": below torch's hub folder).
        custom: It can score clips of any prompt.
        percent: Each clip's own number is out of 100, the overall one out of 1.
    """

    quality: bool
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    files: tuple[str, ...] = ()
    custom: bool = True
    percent: bool = False


_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth",)
DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(
        True, 0.1462, files=("torch:checkpoints/dino_vitbase16_pretrain.pth",)
    ),
    "background_consistency": Dimension(True, 0.2615, files=(_CLIP_B,)),
    "temporal_flickering": Dimension(True, 0.6293),
    "motion_smoothness": Dimension(True, 0.706, 0.9975, files=("amt_model/amt-s.pth",)),
    "dynamic_degree": Dimension(True, weight=0.5, files=("raft_model/models/raft-things.pth",)),
    "aesthetic_quality": Dimension(
        True, files=(_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
    ),
    "imaging_quality": Dimension(
        True, files=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",), percent=True
    ),
    "object_class": Dimension(False, files=_GRIT, custom=False),
    "multiple_objects": Dimension(False, files=_GRIT, custom=False),
    "human_action": Dimension(False, files=("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",)),
    "color": Dimension(False, files=_GRIT, custom=False),
    "spatial_relationship": Dimension(False, files=_GRIT, custom=False),
    "scene": Dimension(
        False, 0.0, 0.8222, files=("caption_model/tag2text_swin_14m.pth",), custom=False
    ),
    "appearance_style": Dimension(False, 0.0009, 0.2855, files=(_CLIP_B,), custom=False),
    "temporal_style": Dimension(False, 0.0, 0.364, files=_VICLIP),
    "overall_consistency": Dimension(False, 0.0, 0.364, files=_VICLIP),
}
LONG_SECONDS = 5.0  # VBench is for shorter clips, VBench-Long for these
