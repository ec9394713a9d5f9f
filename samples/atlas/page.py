# SPDX-License-Identifier: Apache-2.0
"""Make ``docs/atlas.md`` and its pictures from what ``run.py`` wrote.

python samples/atlas/page.py
"""

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2
import matplotlib as mpl
from findings import FINDINGS

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "atlas"
PAGE = ROOT / "docs" / "atlas.md"
ROLES = ("diagonal", "multi-diagonal", "frame", "stripe", "sharp", "diffuse", "skippable")

TEMPLATE = """\
# Attention atlas of the small models

This page shows where each head of the shipped small models attends, and how this changes over
layers and steps, compared with the same architecture with random weights. These models were
trained for this repository and do not represent other models. Two things carry over: the method,
and the finding that random weights say nothing about sparse attention.
`python samples/atlas/run.py samples/<model>` measures (one prompt, the conditional pass, exact
softmax), and `python samples/atlas/page.py` writes this page; `docs/benchmarks/atlas/*.json`
contains every head.

- *best quarter*: the mean softmax mass that a block of 64 queries gives to the heaviest quarter
  of its key blocks. Uniform attention has 0.25, so nothing can be dropped for free.
- Roles of heads, by where a query attends: *diagonal*: to its own position (within 2 latent
  pixels) in its own frame; *multi-diagonal*: to its own position in all frames; *frame*:
  anywhere in its own frame; *stripe*: to the same keys for every query; *skippable*: the mean
  value approximates the output to within half of its norm; *sharp*: to few blocks, none of the
  above; *diffuse*: the rest. Thresholds are in [`heads.py`](../samples/atlas/heads.py).
{% for model in models %}
## {{ model.model }}

{{ model.layers }} layers x {{ model.heads }} heads, {{ model.tokens }} tokens \
({{ model.grid[0] }} x {{ model.grid[1] }} x {{ model.grid[2] }}\
{% if model.grid[3] %} and {{ model.grid[3] }} of text{% endif %}), \
{{ model.call.num_inference_steps }} steps.

![best quarter, by layer and head](benchmarks/atlas/{{ model.model }}.png)

| weights | step | best quarter: mean | least | most | same frame | entropy | \
{% for role in roles %}{{ role }} | {% endfor %}
|---|---|---|---|---|---|---|{% for role in roles %}---|{% endfor %}
{% for row in model.rows -%}
| {{ row.weights }} | {{ row.step }} | {{ row.top }} | {{ row.least }} | {{ row.most }} | \
{{ row.frame }} | {{ row.entropy }} | {% for role in roles %}{{ row.roles[role] }} | {% endfor %}
{% endfor %}
![one head per role](benchmarks/atlas/{{ model.model }}-maps.png)

{{ model.changes }}
{{ model.findings }}
{% endfor %}"""


def heads_of(part: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """List all heads of a step, layer by layer."""
    layers = sorted(part[step], key=lambda each: each["layer"])
    return [head for layer in layers for head in layer["heads"]]


def rows_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Sum up each step."""
    rows = []
    for weights in ("trained", "random"):
        for step in sorted(told[weights], key=int):
            heads = heads_of(told[weights], step)
            tops = [head["top25"] for head in heads]
            count = Counter(head["role"] for head in heads)
            rows.append(
                {
                    "weights": weights,
                    "step": step,
                    "top": f"{mean(tops):.2f}",
                    "least": f"{min(tops):.2f}",
                    "most": f"{max(tops):.2f}",
                    "frame": f"{mean(head['frame'] for head in heads):.2f}",
                    "entropy": f"{mean(head['entropy'] for head in heads):.2f}",
                    "roles": {role: count[role] for role in ROLES},
                }
            )
    return rows


def changes(told: dict[str, Any]) -> str:
    """Say how many heads change their role between the steps."""
    steps = sorted(told["trained"], key=int)
    by_step = [[head["role"] for head in heads_of(told["trained"], step)] for step in steps]
    moved = sum(len(set(roles)) > 1 for roles in zip(*by_step, strict=True))
    return f"{moved} of {len(by_step[0])} heads change their role between these steps."


def draw(told: dict[str, Any], path: Path) -> None:
    """Map best-quarter mass by layer and head, steps side by side, random weights last."""
    steps = sorted(told["trained"], key=int)
    parts = [("trained", step) for step in steps] + [("random", steps[0])]
    figure, axes = plt.subplots(1, len(parts), figsize=(2.4 * len(parts) + 0.8, 3.4))
    image = None
    for axis, (weights, step) in zip(axes, parts, strict=True):
        layers = sorted(told[weights][step], key=lambda each: each["layer"])
        values = [[head["top25"] for head in layer["heads"]] for layer in layers]
        image = axis.imshow(values, vmin=0.25, vmax=1.0, cmap="viridis", aspect="auto")
        axis.set(title=f"{weights}, step {step}", xlabel="head")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value < 0.7 else "black"
                axis.text(column, row, f"{value:.2f}"[1:] if value < 1 else "1", fontsize=7,
                          ha="center", va="center", color=colour)  # fmt: skip
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="mass in the best quarter of key blocks")
    figure.savefig(path, dpi=100, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


def model_of(path: Path) -> dict[str, Any]:
    """Read one model's results and prepare its part."""
    told = json.loads(path.read_text())
    draw(told, path.with_suffix(".png"))
    first = next(iter(told["trained"].values()))
    frames, height, width, text = told["grid"]
    return told | {
        "layers": len(first),
        "heads": len(first[0]["heads"]),
        "tokens": frames * height * width + text,
        "rows": rows_of(told),
        "changes": changes(told),
        "findings": FINDINGS.get(told["model"], "").strip(),
    }


def main() -> None:
    """Write the page."""
    models = [model_of(path) for path in sorted(RESULTS.glob("*.json"))]
    environment = jinja2.Environment(autoescape=False)  # noqa: S701, Markdown from our own data
    text = environment.from_string(TEMPLATE).render(models=models, roles=ROLES)
    PAGE.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
