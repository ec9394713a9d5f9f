# SPDX-License-Identifier: Apache-2.0
"""The page of a map: one file, everything inside, a click on a head shows its choice.

``page.html#error`` opens it coloured by error, and so on. ``data_of`` gives the form of the data
that its script (``templates/atlas.js``) reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dit_sparse.core.pages import render
from dit_sparse.inspect.colours import RAMPS, colour_of

if TYPE_CHECKING:
    from dit_sparse.inspect.atlas import Atlas

TEMPLATE = Path(__file__).parent / "templates" / "atlas.html"


def page(atlas: Atlas, picture: str = "") -> str:
    """Write the page.

    Args:
        atlas: What it shows.
        picture: Address of the map as a picture, for browsers without scripts.
    """
    return render(
        TEMPLATE,
        atlas=atlas,
        kind="strategy" if atlas.choices else "attention atlas",
        data=_inline(data_of(atlas)),
        picture=picture,
    )


def data_of(atlas: Atlas) -> dict[str, Any]:
    """Give what the script reads, as plain data; lists over spots are in the spots' order."""
    layout = atlas.layout
    methods = {choice.method for choice in atlas.choices}
    return {
        "stages": list(layout.stages),
        "bands": [str(band) for band in layout.bands],
        "lengths": [band.stop - band.start for band in layout.bands],
        "layers": layout.layers,
        "heads": layout.heads,
        "choices": [
            {
                "method": choice.method,
                "name": choice.name,
                "text": choice.text,
                "kept": choice.kept,
                "seen": choice.seen,
                "why": choice.why,
            }
            for choice in atlas.choices
        ],
        "choice_of": atlas.choice_of,
        "quantities": [
            {
                "name": quantity.name,
                "values": [None if v is None else float(f"{v:.4g}") for v in quantity.values],
                "good": quantity.good,
                "note": quantity.note,
                "share": quantity.share,
                "top": quantity.top,
            }
            for quantity in atlas.quantities
        ],
        "candidates": None
        if atlas.candidates is None
        else {"names": atlas.candidates.names, "columns": atlas.candidates.columns},
        "pictures": atlas.pictures.addresses,
        "attention": atlas.attention,
        "kept": atlas.kept,
        "seen": atlas.seen,
        "no_attention": _no_attention(atlas),
        "colours": {method: colour_of(method) for method in sorted(methods)},
        "ramps": RAMPS,
    }


def _no_attention(atlas: Atlas) -> str:
    if atlas.attention:
        return "Attention map: omitted to limit the page size."
    return (
        "Attention map: not available, because a search does not store it; use --model with "
        "--prompt to create it from a dense run."
    )


def _inline(data: dict[str, Any]) -> Markup:
    """Write strict JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704  (escaped above)
