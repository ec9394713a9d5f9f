# SPDX-License-Identifier: Apache-2.0
"""The table of models for people: what is served, how, how far it was tried, and what is not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_sparse.pipelines import FAMILIES, MODELS, family_by_name
from dit_sparse.pipelines.declined import DECLINED
from dit_sparse.pipelines.family import Unsized

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dit_sparse.pipelines.family import Family

PIPELINES = "pipelines, every method"
PIPELINE = "its transformer and a pipeline"
MODEL = "its transformer"
# Classes of MODELS that were run in a pipeline too (tests/models/pipes.py).
PIPED = frozenset(
    {
        "AnyFlowTransformer3DModel",
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "ErnieImageTransformer2DModel",
        "Flux2Transformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Krea2Transformer2DModel",
        "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MochiTransformer3DModel",
        "OvisImageTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "ZImageTransformer2DModel",
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """What there is to know of one transformer class.

    Args:
        class_name: In diffusers.
        pipelines: Of diffusers that run it.
        layers: Pattern of the module paths whose attention is taken over; "" where declined.
        text: Where text stands in the sequence.
        grid: Forward argument that tells frames, height and width in tokens.
        tested: What was tried on tiny models of the real class with random weights.
        forecast: Height, width and frames that ``forecast`` takes where it is told none; or why
            it cannot count this class.
        note: What stays dense or was not run all the same.
        reason: Why it is declined; "" where it is served.
    """

    class_name: str
    pipelines: tuple[str, ...] = ()
    layers: str = ""
    text: str = ""
    grid: str = ""
    tested: str = ""
    forecast: str = ""
    note: str = ""
    reason: str = ""

    @property
    def served(self) -> bool:
        """Whether it can be enabled."""
        return not self.reason


def rows() -> list[Row]:
    """Give every class that is known: first what pipelines were tried of, declined ones last."""
    served = [
        *(_served(name, PIPELINES) for name in sorted(FAMILIES)),
        *(_served(name, PIPELINE if name in PIPED else MODEL) for name in sorted(MODELS)),
    ]
    return [*served, *(Row(name, reason=DECLINED[name]) for name in sorted(DECLINED))]


def _served(class_name: str, tested: str) -> Row:
    family = family_by_name(class_name)
    return Row(
        class_name,
        family.pipelines,
        family.attention,
        text_place(family),
        family.grid_source,
        tested,
        _forecast(family),
        family.note,
    )


def _forecast(family: Family) -> str:
    """Give the usual size in pixels, or why nothing can be counted."""
    if isinstance(family.example, Unsized):
        return f"no: {family.example.reason}"
    usual = family.usual
    frames = f" x {usual.num_frames}" if usual.num_frames > 1 else ""
    return f"{usual.height} x {usual.width}{frames}"


def text_place(family: Family) -> str:
    """Say where text stands, and whether it may be padded or cut."""
    if family.text_free:
        return "none"
    place = "first" if family.text_first else "last"
    remarks = ["padding masked"] * family.text_padding + ["length varies"] * family.text_varies
    return f"{place} ({', '.join(remarks)})" if remarks else place


def markdown(found: list[Row]) -> str:
    """Render two Markdown tables: what is served, and what is declined."""
    served = [
        [
            "class",
            "pipelines",
            "attention replaced",
            "text",
            "grid source",
            "forecast at",
            "tried with",
        ],
        *(
            [
                f"`{row.class_name}`",
                ", ".join(f"`{name}`" for name in row.pipelines) or "modular",
                f"`{row.layers}`",
                row.text,
                row.grid,
                row.forecast,
                row.tested + (f"; {row.note}" if row.note else ""),
            ]
            for row in found
            if row.served
        ),
    ]
    declined = [
        ["class", "reason"],
        *([f"`{row.class_name}`", row.reason] for row in found if not row.served),
    ]
    return f"{_table(served)}\n{_table(declined)}"


def short_markdown(found: list[Row]) -> str:
    """Render one short Markdown table: classes by where their text stands, and the declined."""
    places = {
        "none": "video or image only",
        "last": "video or image, then text",
        "first": "text, then video or image",
    }
    lines = [
        [
            "tokens of the main attention",
            "classes, without the suffix `Transformer2DModel` or `Transformer3DModel`",
        ]
    ]
    for place, words in places.items():
        named = (row for row in found if row.served and row.text.split(" ")[0] == place)
        lines.append([words, _names(named)])
    lines.append(
        ["declined (reasons in the models page)", _names(row for row in found if not row.served)]
    )
    return _table(lines)


def _names(found: Iterable[Row]) -> str:
    names = []
    for row in found:
        short = re.sub(r"(Transformer)?[123]DModel$|Transformer$", "", row.class_name)
        names.append(f"**{short}**" if row.tested == PIPELINES else short)
    return ", ".join(names)


def _table(lines: list[list[str]]) -> str:
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    made = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in made)
