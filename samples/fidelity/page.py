# SPDX-License-Identifier: Apache-2.0
"""Make ``docs/benchmarks/fidelity.md`` and its plots from what ``run.py`` wrote.

python samples/fidelity/page.py
"""

import json
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import jinja2
import matplotlib as mpl
from findings import FINDINGS

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "fidelity"
PAGE = RESULTS.with_suffix(".md")
SETTINGS = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
)

TEMPLATE = """\
# What sparse attention costs in quality, method by method

Small models, trained for this repository, stand in for the real ones: **the order of methods and
the figures are theirs, and say little about real checkpoints.** Each pair is a sparse clip and the
dense clip of the same prompt, seed and kernel. Medians over pairs, the worst pair beside them.
`make fidelity MODELS=wan-tiny` makes a model's part anew (two hours of one CPU core), without
`MODELS` all five are made; `fidelity/*.json` has every pair.

- *density*: of all pairs, measured over all calls of the generation, steps on which a method
  searches or refreshes counted as 1. Text is exact in every method; where it stands in one
  sequence with the video (or picture), methods are set to one share of the video's own pairs.
  Every step and layer is sparse, which is harder than any published setting: those leave the first
  steps and layers dense.
- *right*: clips (or pictures) in which the checker (`samples/train/checker.py`, `read_scene.py`)
  reads all that the prompt says.
- A dash under LPIPS: those arms were added without its weights. The data have the command of
  every arm that was added later.
- *mixed*: `dit-sparse profile`, least error at that density, over all methods; searched on other
  prompts and seeds. `sparse_vdit`: its own rule per head, epsilon (and lambda, where that is not
  enough) set for the density.
- `centroid`: our own method, one density for all heads. `svg2+means` and `tiles+means` (where they
  were measured): `svg2` and `composed` with means of what is dropped.
- *mixed ahead*: the mean paired difference in PSNR between the mix and this method, in dB, and its
  standard error. A difference within two standard errors of 0 is not significant. Rows are ordered
  by mean PSNR, which is the same order; one pair can change a median of ten by several dB.
- *earlier mix*: what the profiler found before it screened candidates, and had clusters and means
  among them; measured by the same command then. Where a table has no newer mix, *mixed ahead* is
  of this one.
- *noise floor*: dense again with another SDPA backend.
- Made again later on a processor of the same kind, search included, three arms of the first pair
  of wan-tiny, flux-tiny and cogvideox-tiny had the same density and PSNR to the last digit.
{% if summary %}
## Summary

Mean PSNR of the mix, in dB, and its mean paired differences with standard errors: to `centroid`,
to the best other row of its table (by mean PSNR), and to the best method alone.

| model | density | mix | to `centroid` | to the best other row | to the best single method |
|---|---|---|---|---|---|
{% for row in summary -%}
| {{ row | join(" | ") }} |
{% endfor %}{% endif %}
{%- for model in models %}
## {{ model.model }}

{{ model.pairs }} pairs ({{ model.prompts | length }} prompts, {{ model.seeds | length }} seeds); \
{{ model.settings }}. Dense clips right: {{ model.dense_right }}.
{% if model.floor %}Noise floor: PSNR {{ "%.1f" | format(model.floor.psnr) }} dB, \
SSIM {{ "%.4f" | format(model.floor.ssim) }}.
{% endif %}
![PSNR over density](fidelity/{{ model.model }}.png)

![the first pair, dense above every method](fidelity/{{ model.model }}-strip.png)

The first pair, dense on top{% if model.added %}; it shows the first run, before arms were added\
{% endif %}.
{% for density in model.densities %}
### Density {{ density }}{% if model.video_share < 1 %} of the video's pairs, \
{{ "%.3f" | format(1 - model.video_share * (1 - density)) }} of all{% endif %}

| method | density | PSNR | worst | SSIM | worst | LPIPS | worst | right | mixed ahead |
|---|---|---|---|---|---|---|---|---|---|
{% for row in model.tables[density] -%}
| {{ row.label }} | {{ row.density }} | {{ row.psnr }} | {{ row.psnr_worst }} | {{ row.ssim }} | \
{{ row.ssim_worst }} | {{ row.lpips }} | {{ row.lpips_worst }} | {{ row.right }} | \
{{ row.ahead }} |
{% endfor %}
{% for name, why in model.absent[density] %}{{ name }}: not in the table, {{ why }}.
{% endfor %}{% endfor %}
{% if model.made_of %}### What was chosen per head

Share of all heads, layers and steps.

| strategy | made of |
|---|---|
{% for name, share in model.made_of -%}
| {{ name }} | {{ share }} |
{% endfor %}
{% endif %}### What is to be made of it

{{ model.findings }}
{% endfor %}"""


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Give medians and the worst over pairs."""
    found: dict[str, Any] = {"density": median(row["density"] for row in rows)}
    for name, worst in (("psnr", min), ("ssim", min), ("lpips_alex", max)):
        values = [row[name] for row in rows]
        known = all(value is not None for value in values)
        found[name] = median(values) if known else None
        found[f"{name}_worst"] = worst(values) if known else None
    found["right"] = sum(row["right"] for row in rows)
    found["pairs"] = len(rows)
    found["each_psnr"] = [row["psnr"] for row in rows]
    return found


def ahead(mixed: dict[str, Any], arm: dict[str, Any]) -> str:
    """Give the mean of the mix's PSNR minus the arm's, paired, and its standard error, in dB."""
    if mixed is arm:
        return "-"
    pairs = zip(mixed["each_psnr"], arm["each_psnr"], strict=True)
    apart = [one - other for one, other in pairs]
    return f"{mean(apart):+.1f} ± {stdev(apart) / sqrt(len(apart)):.1f}"


def table(arms: dict[str, Any], density: float) -> list[dict[str, str]]:
    """Write the rows of one density, the best mean PSNR first."""
    suffix = f"-{100 * density:g}"
    chosen = {name: arm for name, arm in arms.items() if name.endswith(suffix)}
    mixed = chosen.get(f"mixed{suffix}", chosen.get(f"earlier mix{suffix}"))
    rows = []
    for name, arm in sorted(chosen.items(), key=lambda pair: -mean(pair[1]["each_psnr"])):
        label = name.removesuffix(suffix)
        row = {
            "label": f"**{label}**" if label == "mixed" else label,
            "density": f"{arm['density']:.3f}",
            "right": f"{arm['right']}/{arm['pairs']}",
            "ahead": ahead(arm if mixed is None else mixed, arm),
        }
        for key, short, form in (
            ("psnr", "psnr", ".2f"),
            ("ssim", "ssim", ".3f"),
            ("lpips_alex", "lpips", ".3f"),
        ):
            for part in ("", "_worst"):
                value = arm[key + part]
                row[short + part] = "-" if value is None else format(value, form)
        rows.append(row)
    return rows


def summary(models: list[dict[str, Any]]) -> list[list[str]]:
    """Write a row for each table that has our own method: what the mix is worth."""
    rows = []
    for model in models:
        for density in model["densities"]:
            suffix = f"-{100 * density:g}"
            arms = {
                name.removesuffix(suffix): arm
                for name, arm in model["summed"].items()
                if name.endswith(suffix)
            }
            if not {"mixed", "centroid"} <= set(arms):
                continue
            mixed, own = arms.pop("mixed"), arms.pop("centroid")
            ranked = sorted(arms, key=lambda name: -mean(arms[name]["each_psnr"]))
            single = [name for name in ranked if name not in {"earlier mix", "sparse_vdit"}]
            others = (f"{ahead(mixed, arms[one])} ({one})" for one in (ranked[0], single[0]))
            level = f"{mean(mixed['each_psnr']):.1f}"
            rows.append([model["model"], f"{density:g}", level, ahead(mixed, own), *others])
    return rows


def made_of(told: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Write each strategy's name and its shares, most pairs kept first."""
    rows = []
    for arm, shares in sorted(told.items(), key=_by_method_and_density):
        method, _, percent = arm.rpartition("-")
        parts = (
            f"{name.removeprefix(f'{method}:')} {share:.0%}" for name, share in shares.items()
        )
        rows.append((f"{method}, density {float(percent) / 100:g}", ", ".join(parts)))
    return rows


def _by_method_and_density(arm: tuple[str, Any]) -> tuple[str, float]:
    method, _, percent = arm[0].rpartition("-")
    return method, -float(percent)


def plot(told: dict[str, Any], arms: dict[str, Any], path: Path) -> None:
    """Draw PSNR over density, a line per method."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    methods = sorted({name.rpartition("-")[0] for name in arms}, key=lambda m: (m != "mixed", m))
    for number, method in enumerate(methods):
        points = sorted(
            (arm["density"], arm["psnr"])
            for name, arm in arms.items()
            if name.rpartition("-")[0] == method
        )
        style = {"color": plt.get_cmap("tab20")(number), "linewidth": 1.2}
        if method == "mixed":
            style = {"color": "black", "linewidth": 2.5}
        marker = "osv^D<>phX*P"[number % 12]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=method, **style)
    axes.set(xlabel="density, searches included", ylabel="PSNR to the dense clip, dB")
    axes.set_title(f"{told['model']}: medians over {len(told['arms']['dense'])} pairs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def model_of(path: Path) -> dict[str, Any]:
    """Read one model's results and prepare its part of the page."""
    told = json.loads(path.read_text())
    arms = {name: summed(rows) for name, rows in told["arms"].items() if name != "dense"}
    floor = arms.pop("floor", None)
    told["summed"] = arms
    plot(told, arms, path.with_suffix(".png"))
    dense = told["arms"]["dense"]
    told["pairs"] = len(dense)
    told["dense_right"] = f"{sum(row['right'] for row in dense)}/{len(dense)}"
    told["floor"] = floor
    told["settings"] = ", ".join(f"{k} {told['call'][k]}" for k in SETTINGS if k in told["call"])
    told["tables"] = {density: table(arms, density) for density in told["densities"]}
    told["absent"] = {
        density: [
            (name.rpartition("-")[0], why)
            for name, why in told["missing"].items()
            if name.endswith(f"-{100 * density:g}")
        ]
        for density in told["densities"]
    }
    told["made_of"] = made_of(told.get("made_of", {}))
    told["findings"] = FINDINGS.get(told["model"], "").strip()
    return told


def main() -> None:
    """Write the page."""
    models = [model_of(path) for path in sorted(RESULTS.glob("*.json"))]
    environment = jinja2.Environment(autoescape=False)  # noqa: S701, Markdown from our own data
    PAGE.write_text(
        environment.from_string(TEMPLATE).render(models=models, summary=summary(models))
    )


if __name__ == "__main__":
    main()
