# SPDX-License-Identifier: Apache-2.0
"""Table of the model families that the training scripts know; one line and one file each."""

from importlib import import_module

from families.base import Family

FAMILIES = {
    "wan": "wan:Wan",
    "flagship": "flagship:Flagship",
    "cogvideox": "cogvideox:CogVideoX",
    "hunyuan-video": "hunyuan_video:HunyuanVideo",
    "flux": "flux:Flux",
    "pixart": "pixart:PixArt",
}


def make_family(name: str) -> Family:
    """Make the family called ``name``; its file is imported only now."""
    if name not in FAMILIES:
        message = f"family must be one of {', '.join(FAMILIES)}, got {name!r}"
        raise ValueError(message)
    module, attribute = FAMILIES[name].split(":")
    family: Family = getattr(import_module(f"families.{module}"), attribute)()
    return family
