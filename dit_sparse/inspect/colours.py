# SPDX-License-Identifier: Apache-2.0
"""The colours of the page and of the picture: one for each method, ramps for numbers."""

from __future__ import annotations

from dit_sparse.methods import METHODS

# Told apart on white and on dark, by most kinds of colour blindness too: hue and lightness change.
_PALETTE = ("#2457c5", "#e07b00", "#1b9e77", "#c2185b", "#7e57c2", "#6d4c41", "#00a5cf", "#b7a000",
            "#37474f", "#d84315", "#7cb342", "#ad7fa8", "#004d40", "#f06292")  # fmt: skip
# From 0 to the end of the scale; "low": less is better.
RAMPS = {
    "low": [[238, 245, 240], [253, 204, 138], [215, 48, 31]],
    "high": [[247, 244, 240], [161, 217, 155], [0, 109, 44]],
    "none": [[240, 244, 250], [107, 174, 214], [8, 69, 148]],
}
UNKNOWN = "#c9ced6"


def colour_of(method: str) -> str:
    """Give a method's colour, by its place in the table."""
    if method == "dense":
        return "#d5dae1"
    names = [name for name in METHODS if name != "dense"]
    return _PALETTE[names.index(method) % len(_PALETTE)]


def mixed(ramp: list[list[int]], share: float) -> tuple[int, int, int]:
    """Give the colour at a share of a ramp."""
    at = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(at), len(ramp) - 2)
    rest = at - low
    red, green, blue = (
        round(a + (b - a) * rest) for a, b in zip(ramp[low], ramp[low + 1], strict=True)
    )
    return red, green, blue
