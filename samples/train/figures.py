# SPDX-License-Identifier: Apache-2.0
"""Draw the model card's figures: the loss curve and a strip of frames per prompt."""

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageDraw

CURVE_SIZE = (480, 240)
MARGIN = (40, 12, 12, 24)  # left, top, right, bottom
SMOOTHING = 40  # steps
ROWS = 8  # clips on the strip: the first of the evaluation, none chosen by hand


def draw_curve(log: Path, target: Path) -> None:
    """Plot the smoothed loss over the steps, one colour per number of tokens."""
    with log.open(newline="") as file:
        rows = [(int(r["step"]), int(r["tokens"]), float(r["loss"])) for r in csv.DictReader(file)]
    left, top = MARGIN[:2]
    right, bottom = CURVE_SIZE[0] - MARGIN[2], CURVE_SIZE[1] - MARGIN[3]
    last, highest = rows[-1][0], 1.0
    image = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for loss in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = bottom - (bottom - top) * loss / highest
        draw.line([(left - 3, height), (left, height)], fill="black")
        draw.text((6, height - 6), f"{loss:.2f}", fill="black")
    draw.text((right - 70, bottom + 6), f"{last} steps", fill="black")
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c")
    for row, (tokens, colour) in enumerate(
        zip(sorted({r[1] for r in rows}), colours, strict=False)
    ):
        points, average = [], None
        for step, size, loss in rows:
            if size != tokens:
                continue
            average = loss if average is None else average + (loss - average) / SMOOTHING
            height = bottom - (bottom - top) * min(average, highest) / highest
            points.append((left + (right - left) * step / last, height))
        draw.line(points, fill=colour, width=2)
        draw.text((right - 110, top + 14 * row), f"{tokens} tokens", fill=colour)
    image.save(target, optimize=True)


def draw_strip(evaluation: Path, target: Path) -> None:
    """Put the first clips that ``evaluate.py`` saved below each other."""
    strips = [Image.open(path) for path in sorted(evaluation.glob("[0-9]*.png"))[:ROWS]]
    width, height = strips[0].size
    image = Image.new("RGB", (width, height * len(strips)))
    for row, strip in enumerate(strips):
        image.paste(strip, (0, row * height))
    image.resize((width // 2, height * len(strips) // 2)).save(target, optimize=True)


def main() -> None:
    """Write ``loss.png`` and ``strip.png`` into the pipeline's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("log", type=Path, help="dit.csv of the training run")
    parser.add_argument("evaluation", type=Path, help="folder that evaluate.py wrote its rows to")
    args = parser.parse_args()
    draw_curve(args.log, args.pipeline / "loss.png")
    draw_strip(args.evaluation, args.pipeline / "strip.png")


if __name__ == "__main__":
    main()
