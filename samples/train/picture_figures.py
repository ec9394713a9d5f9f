# SPDX-License-Identifier: Apache-2.0
"""Draw a picture model card's figures: the loss curve and a sheet of pictures."""

import argparse
import csv
import tempfile
from pathlib import Path

from figures import draw_curve
from PIL import Image

COLUMNS, ROWS, SIDE = 6, 2, 192  # the sheet: the first pictures of the evaluation, none chosen
LATENTS_PER_TOKEN = 4  # the log counts latent pixels


def draw_sheet(evaluation: Path, target: Path) -> None:
    """Put the first pictures that ``evaluate_pictures.py`` saved beside and below each other."""
    sheet = Image.new("RGB", (COLUMNS * SIDE, ROWS * SIDE))
    for number in range(COLUMNS * ROWS):
        image = Image.open(evaluation / f"{number:03}.png").resize((SIDE, SIDE))
        sheet.paste(image, (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
    sheet.save(target, optimize=True)


def draw_token_curve(log: Path, target: Path) -> None:
    """Draw the loss over the steps, one curve per number of image tokens."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.csv"
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            for row in rows:
                table.writerow(row | {"tokens": int(row["tokens"]) // LATENTS_PER_TOKEN})
        draw_curve(path, target)


def main() -> None:
    """Write ``loss.png`` and ``strip.png`` into the pipeline's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("log", type=Path, help="dit.csv of the training run")
    parser.add_argument("evaluation", type=Path, help="folder of evaluate_pictures.py's rows")
    args = parser.parse_args()
    draw_token_curve(args.log, args.pipeline / "loss.png")
    draw_sheet(args.evaluation, args.pipeline / "strip.png")


if __name__ == "__main__":
    main()
