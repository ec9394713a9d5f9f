# SPDX-License-Identifier: Apache-2.0
"""The page of a map: one file, everything inside, a click on a head shows its choice."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dit_sparse._version import __version__
from dit_sparse.inspect.colours import RAMPS, colour_of
from dit_sparse.inspect.script import CSS, SCRIPT
from dit_sparse.quality.report.style import CSS as COMMON
from dit_sparse.reading import visible

if TYPE_CHECKING:
    from jinja2 import Template

    from dit_sparse.inspect.atlas import Atlas

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dit_sparse {{ version }}">
<title>{{ atlas.title }}</title><style>{{ css }}</style></head><body><main>
<header><div class="kicker">dit_sparse · {{ kind }}</div><h1>{{ atlas.title }}</h1>
{% for line in atlas.lines %}<div class="sub">{{ line }}</div>{% endfor %}</header>
{% for note in atlas.notes %}<div class="note">{{ note }}</div>{% endfor %}
<section class="card"><h2>Layers down, heads across</h2>
<div class="pick" id="pick"></div><div class="maps" id="maps"></div>
<div class="legend" id="legend"></div>
<noscript><p>The map is drawn by a script, which this browser does not run.</p>
{% if picture %}<img class="still" alt="the map" src="{{ picture }}">{% endif %}
</noscript></section>
<section class="card" id="spot"></section>
{% if atlas.facts %}<section class="card"><h2>Where it comes from</h2><dl>
{% for name, value in atlas.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl></section>{% endif %}
<footer>Made by dit_sparse {{ version }}. Click a square, or walk with the arrow keys.</footer>
</main>
<script type="application/json" id="data">{{ data }}</script><script>{{ script }}</script>
</body></html>
"""


def page(atlas: Atlas, picture: str = "") -> str:
    """Write the page.

    Args:
        atlas: What it shows.
        picture: Address of the map as a picture, for browsers without scripts.
    """
    return _template().render(
        atlas=atlas,
        kind="strategy" if atlas.choices else "attention atlas",
        version=__version__,
        css=Markup(COMMON + CSS),  # noqa: S704  (ours)
        script=Markup(SCRIPT),  # noqa: S704
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
        return "Attention map: left out, to keep the page small."
    return (
        "Attention map: not there; a search does not keep it, --model with --prompt makes it from "
        "a dense run."
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    ).from_string(PAGE)


def _inline(data: dict[str, Any]) -> Markup:
    """Write strict JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704  (escaped above)
