# SPDX-License-Identifier: Apache-2.0
"""The table of models for people, and the pages that are written from it.

To write them anew after a row changed: ``python -m tests.models.test_table``.
"""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.pipelines import FAMILIES, MODELS
from dit_sparse.pipelines.declined import DECLINED
from dit_sparse.pipelines.table import markdown, rows, short_markdown

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
START = "<!-- models: written by python -m tests.models.test_table -->\n"
END = "<!-- models: end -->\n"
TITLE = """# Models

`python -m tests.models.test_table` generates this page from the rows in `dit_sparse/pipelines/`.
`dit-sparse methods --models` prints the same data, with `--json` for programs.

The column "tested with" shows how each class was tested, always at tiny size and with random
weights, because no real checkpoint could be downloaded:

- "pipelines, every method": whole pipelines with every method ([conformance](conformance.md)).
- "its transformer": the transformer alone (`tests/models/`). The dense strategy gives
  bit-identical outputs, and so does the model before and after; keeping every block equals dense;
  a sparse run reports the grid, text and layers that were counted by hand; changing one latent
  token changes the one query at the position that the row implies; and the first sample of a batch
  of two matches a single sample.
- "and a pipeline": one pipeline with this transformer also ran, with the correct steps and
  guidance branches in the report and the same latents afterwards.

Random weights verify only this; they say nothing about quality.

"Forecast at" is the size, height x width x frames, that `dit-sparse forecast` and
`profile --dry-run` use if the model folder does not specify one. It is the default size of the
pipeline. Both commands and `retile` count the computation of a transformer from its `config.json`
only; for a class with "no" they report why this is not possible.

If frames x height x width + text does not equal the sequence length, or a mask hides more than the
text padding, the call stays dense and the report gives the reason. With `strict=True` it raises an
error.

"""
BARE = """
## A transformer without a pipeline

`dit_sparse.enable(transformer, "radial", scheduler=scheduler)` supports your own sampling loop:
the step is read from the scheduler. Without a scheduler, set the step before each forward pass:

    with dit_sparse.sparse_attention(transformer, "radial") as handle:
        for step, t in enumerate(timesteps):
            handle.at(step, len(timesteps), "cond")
            prediction = transformer(latents, timestep=t, ...)

## Checkpoints that were trained with sparse attention

Kandinsky 5 checkpoints with `attention_type: "nabla"` and Kandinsky 6's super-resolution model
already compute block-sparse attention, and so does a model whose attention has the gates of Video
Sparse Attention (`to_gate_compress`). Enabling sparse attention on them raises an error, because
it would not help and could break the model. Published VSA checkpoints lose their gates when
Diffusers loads them, so they run dense attention, for which they were not trained. They can be
recognised only by their names (`FastWan2.1`, `VSA`), so dit_sparse warns and does not raise; you
can still measure them.

## A new class

Add one row in `dit_sparse/pipelines/`, in the file of its token layout (`video_only.py`,
`text_last.py`, `text_first.py`, `packed.py`), and one line to the table in `__init__.py`. Add one
case to `tests/models/builders.py`, then regenerate this page.
"""


def page():
    """Render docs/models.md."""
    return f"{TITLE}{markdown(rows())}{BARE}"


def with_table(readme):
    """Put the short table between its marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"README.md has lost its marks {START!r} and {END!r}"
    return f"{before}{START}{short_markdown(rows())}{END}{after}"


def test_the_page_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_readme_s_table_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text)


def test_every_class_is_in_the_table_once():
    names = [row.class_name for row in rows()]
    assert sorted(names) == sorted([*FAMILIES, *MODELS, *DECLINED])
    for row in rows():
        assert row.reason or (row.layers and row.text and row.grid and row.tested)
        for text in (row.note, row.reason):
            assert "|" not in text
            assert not text.endswith(".")


def test_the_command_lists_them():
    run = CliRunner().invoke
    result = run(app, ["methods", "--models", "--json"])
    assert result.exit_code == 0, result.output
    models = {row["class_name"]: row for row in json.loads(result.stdout)["models"]}
    assert set(models) == {*FAMILIES, *MODELS, *DECLINED}
    assert models["MochiTransformer3DModel"]["served"]
    assert models["MochiTransformer3DModel"]["pipelines"] == ["MochiPipeline"]
    assert "linear" in models["SanaTransformer2DModel"]["reason"]
    assert not models["SanaTransformer2DModel"]["served"]
    result = run(app, ["methods", "cogview4pipeline", "--models"])
    for words in (
        "CogView4Transformer2DModel",
        "CogView4ControlPipeline",
        "attn1",
        "hidden_states",
    ):
        assert words in result.stdout
    assert "Qwen" not in result.stdout
    result = run(app, ["methods", "--models"])
    for name in (*FAMILIES, *MODELS, *DECLINED):
        assert name in result.stdout
    assert run(app, ["methods", "sd4", "--models"]).exit_code == 2
    assert run(app, ["methods", "--json"]).exit_code == 2
    result = run(app, ["methods", "sana", "--models"])
    assert "declined" in result.stdout
    assert "served" not in result.stdout.split("declined")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
