# SPDX-License-Identifier: Apache-2.0
"""Make ``docs/benchmarks/distillation.md``, its curves and strips from what ``run.py`` wrote.

python samples/distillation/page.py [CLIPS]

CLIPS is ``run.py``'s folder of clips; without it strips and videos stay as they are.
"""

import csv
import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from findings import FINDINGS

from dit_sparse.core.video import frame_strip, write_mp4, write_png

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "distillation"
PAGE = RESULTS.with_suffix(".md")
WORDS = ("colour", "shape", "motion", "right")
SHAPES = ("circle", "square", "triangle")
STUDENT, RIVAL = "sparse student", "sparse, {steps} steps"
WINDOW = 10  # iterations of the curves' running mean
SHOWN, FPS = 4, 12.0  # clips of an arm in the video

TEMPLATE = """\
# Sparse step distillation on a small model

A small model, trained for this repository, stands in for the real ones: the figures are its own.
What is shown is that the training works and what it buys against no training at equal steps and
density. `distillation/*.json` has every clip's figures. To make it anew (hours on a CPU):

    accelerate launch -m dit_sparse.distill samples/distillation/sparse.yaml
    accelerate launch -m dit_sparse.distill samples/distillation/dense.yaml
    python samples/distillation/run.py samples/wan-tiny
    python samples/distillation/page.py outputs/distillation/clips

`samples/distillation/student` is the sparse student, ready to load; its card says how.

- *passes*: of the transformer for one clip; guidance doubles them, students need none.
- *right*: clips in which the checker reads colour, shape and motion as the prompt says; *overlap*:
  of what is seen with the best of the three outlines, 1 is a perfect shape.
- *PSNR, SSIM, LPIPS*: to the teacher's clip of the same prompt and noise. A student is not asked
  to make that very clip, only one like it, so these say how near, not how good.
- *time*: processor seconds of one clip on a shared CPU, decoding included.
{% for model in models %}
## {{ model.model }}

{{ model.clips }} prompts, half of them of combinations that neither the model nor the students
were trained on. Strategy: {{ model.told }}.

| arm | steps | passes | density | right | colour | shape | motion | overlap | PSNR | SSIM | \
LPIPS | sharpness | time |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{% for row in model.rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
*Sparse student* against *{{ model.rival }}*, clip by clip of the same prompt and noise: better in

| {% for name in model.better %}{{ name }} | {% endfor %}right, it alone | right, the other alone |
|{% for name in model.better %}---|{% endfor %}---|---|
| {% for count in model.better.values() %}{{ count }} of {{ model.clips }} | {% endfor %}\
{{ model.alone[0] }} | {{ model.alone[1] }} |

Where the shape is read right, and all words, by what was asked for:

| arm |{% for name in model.asked %} {{ name }} |{% endfor %}
|---|{% for name in model.asked %}---|{% endfor %}
{% for row in model.by_asked -%}
| {{ row | join(" | ") }} |
{% endfor %}
![losses](distillation/{{ model.model }}-curves.png)

![one prompt, arm by arm](distillation/{{ model.model }}-strip.png)

The first {{ clips_shown }} prompts side by side, arms in the table's order from the top:
[video](distillation/{{ model.model }}.mp4).

{{ model.findings }}
{% endfor %}"""


def number(value: float | None, form: str) -> str:
    """Write a number, or a dash."""
    return "-" if value is None else format(value, form)


def middle(rows: list[dict[str, Any]], key: str) -> float | None:
    """Give the median of what is known."""
    values = [row[key] for row in rows if row[key] is not None]
    return median(values) if values else None


def row_of(name: str, arm: dict[str, Any]) -> list[str]:
    """Write an arm's row."""
    rows = arm["rows"]
    count = {word: sum(row[word] for row in rows) for word in WORDS}
    same = name == "teacher"
    cells = [name, str(arm["steps"]), str(arm["steps"] * (1 + arm["guided"]))]
    cells.append(f"{mean(row['density'] for row in rows):.2f}")
    cells += [f"**{count['right']}/{len(rows)}**"]
    cells += [f"{count[word]}" for word in ("colour", "shape", "motion")]
    cells.append(f"{mean(row['overlap'] for row in rows):.2f}")
    for key, form in (("psnr", ".1f"), ("ssim", ".3f"), ("lpips_alex", ".3f")):
        cells.append("-" if same else number(middle(rows, key), form))
    cells.append(number(middle(rows, "sharpness_ratio"), ".2f"))
    cells.append(f"{median(row['processor_seconds'] for row in rows):.1f}")
    return cells


def beside(student: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the clips in which the student is better than another arm."""
    pairs = list(zip(student, other, strict=True))
    return {
        "better": {
            name: sum(sign * (one[key] - two[key]) > 0 for one, two in pairs)
            for key, name, sign in (
                ("overlap", "overlap", 1),
                ("psnr", "PSNR", 1),
                ("ssim", "SSIM", 1),
                ("lpips_alex", "LPIPS", -1),
            )
            if all(row[key] is not None for row in (*student, *other))
        },
        "alone": [
            sum(one["right"] > two["right"] for one, two in pairs),
            sum(one["right"] < two["right"] for one, two in pairs),
        ],
    }


def by_asked(arms: dict[str, Any]) -> dict[str, Any]:
    """Count shapes read right by the shape asked for, and all words right on held-out prompts."""
    rows = []
    for name, arm in arms.items():
        cells = [name]
        for shape in SHAPES:
            of_it = [row for row in arm["rows"] if shape in row["prompt"]]
            cells.append(f"{sum(row['shape'] for row in of_it)} of {len(of_it)}")
        held = [row for row in arm["rows"] if row["held_out"]]
        rows.append([*cells, f"{sum(row['right'] for row in held)} of {len(held)}"])
    return {"asked": [*SHAPES, "all words, held-out combinations"], "by_asked": rows}


def draw_curves(name: str) -> None:
    """Draw both students' losses over iterations."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for student, colour in (("dense", "tab:gray"), ("sparse", "tab:blue")):
        with (RESULTS / f"{name}-{student}.csv").open() as file:
            rows = list(csv.DictReader(file))
        for axis, key in zip(axes, ("student_loss", "critic_loss"), strict=True):
            values = np.array([float(row[key]) for row in rows])
            steps = np.arange(1, len(values) + 1)
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
            smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
            axis.plot(steps[WINDOW - 1 :], smooth, color=colour, label=f"{student} student")
            axis.set(title=key.replace("_", " "), xlabel="iteration")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{name}-curves.png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def draw_strip(name: str, clips: Path, arms: dict[str, Any], at: int = 3) -> None:
    """Draw one prompt's clip of every arm."""
    rows = {name: np.load(clips / arm["folder"] / f"{at:03}.npy") for name, arm in arms.items()}
    prompt = arms["teacher"]["rows"][at]["prompt"]
    write_png(RESULTS / f"{name}-strip.png", frame_strip(rows, f"{prompt}, seed {at}", 8))


def draw_video(name: str, clips: Path, arms: dict[str, Any]) -> None:
    """Put the first prompts' clips of all arms into one video: a row for each arm."""
    rows = [
        np.concatenate(
            [np.load(clips / arm["folder"] / f"{at:03}.npy") for at in range(SHOWN)], axis=2
        )
        for arm in arms.values()
    ]
    write_mp4(RESULTS / f"{name}.mp4", np.concatenate(rows, axis=1), FPS)


def model_of(path: Path, clips: Path | None) -> dict[str, Any]:
    """Read one model's results and prepare its part."""
    told: dict[str, Any] = json.loads(path.read_text())
    draw_curves(told["model"])
    if clips is not None:
        draw_strip(told["model"], clips, told["arms"])
        draw_video(told["model"], clips, told["arms"])
    rows = [row_of(name, arm) for name, arm in told["arms"].items()]
    arms = told["arms"]
    rival = RIVAL.format(steps=arms[STUDENT]["steps"])
    strategy = ", ".join(f"{key} {value}" for key, value in told["strategy"].items())
    return {
        **told,
        "told": strategy,
        "rival": rival,
        **beside(arms[STUDENT]["rows"], arms[rival]["rows"]),
        **by_asked(arms),
        "rows": rows,
        "findings": FINDINGS.get(told["model"], "").strip(),
    }


def main() -> None:
    """Write the page."""
    clips = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    models = [model_of(path, clips) for path in sorted(RESULTS.glob("*.json"))]
    environment = jinja2.Environment(autoescape=False)  # noqa: S701, Markdown from our own data
    text = environment.from_string(TEMPLATE).render(models=models, clips_shown=SHOWN)
    PAGE.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
