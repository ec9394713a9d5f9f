# SPDX-License-Identifier: Apache-2.0
"""Draw one pair's clips: a row per method, the densities side by side, dense on top."""

import json
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np

from dit_sparse.quality.clips import open_clip

mpl.use("Agg")
from matplotlib import pyplot as plt

CELL = 1.0  # inches
DPI = 110


def draw_strip(folder: Path, names: list[str], densities: list[float], path: Path) -> None:
    """Draw a pair's clips: first, middle and last frame of each; pictures as they are.

    Args:
        folder: Of the pair, with ``NAME-DENSITY.json`` files and the clips that they name.
        names: Of the methods, from the top; one that is missing at some densities leaves gaps, one
            that is missing at all is left out.
        densities: From the left.
        path: The PNG.
    """
    told = json.loads((folder / "dense.json").read_text())
    dense = _frames(folder, "dense")
    count = len(dense)
    names = [name for name in names if any(folder.glob(f"{name}-*.json"))]
    columns = [(density, i) for density in densities for i in range(count)]
    size = (1.2 + CELL * len(columns), 0.7 + CELL * (1 + len(names)))
    figure, grid = plt.subplots(
        1 + len(names), len(columns), figsize=size, squeeze=False,
        gridspec_kw={"wspace": 0.04, "hspace": 0.04, "left": 1.1 / size[0], "right": 0.995,
                     "bottom": 0.05 / size[1], "top": 1 - 0.6 / size[1]},
    )  # fmt: skip
    for row, name in enumerate(["dense", *names]):
        for column, (density, i) in enumerate(columns):
            axes = grid[row, column]
            axes.set_axis_off()
            clip = dense if name == "dense" else _frames(folder, f"{name}-{100 * density:g}")
            if clip is not None:
                axes.imshow(clip[i], interpolation="antialiased")
            if row == 0 and i == count // 2:
                axes.set_title(f"density {density:g}", fontsize=9)
        y = grid[row, 0].get_position()
        figure.text(0.05 / size[0], (y.y0 + y.y1) / 2, name, va="center", fontsize=9)
    title = textwrap.fill(f"{told['prompt']}, seed {told['seed']}", int(15 * size[0]))
    figure.suptitle(title, fontsize=9, y=1 - 0.05 / size[1])
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def _frames(folder: Path, name: str) -> np.ndarray | None:
    """Read the frames that are shown, ``[frames, height, width, 3]``."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text())
    frames = np.stack(list(open_clip(folder / told["file"]["exact"]).read()))
    picks = np.linspace(0, len(frames) - 1, min(3, len(frames))).round().astype(int)
    shown: np.ndarray = frames[picks]
    return shown
