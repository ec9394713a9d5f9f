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

Written from the rows in `dit_sparse/pipelines/` by `python -m tests.models.test_table`;
`dit-sparse methods --models` prints the same, with `--json` for programs.

"Tried with" says how far each class was tried, always at tiny size and with random weights, as no
real checkpoint could be fetched: either whole pipelines with every method
([conformance](conformance.md)), or its transformer by itself (`tests/models/`): the dense strategy
and the model before and after are bit for bit the same, keeping every block equals dense, a sparse
run reports the grid, the text and the layers that were counted by hand, one token of the latents
changes the one query at the place that the row says, and a batch of two begins like its first
sample; "and a pipeline": one pipeline around it ran too, with the right steps and guidance
branches in the report, and with the same latents afterwards. Random weights prove this and nothing
about quality.

"Forecast at" is the size, height x width x frames, that `dit-sparse forecast` and
`profile --dry-run` take for a model whose folder names none: what its pipeline makes where it is
told none. These two and `retile` count what a transformer computes from its `config.json` alone;
for a class with "no" they say why they cannot.

Where frames x height x width + text is not the length of the sequence, or a mask hides more than
the padding of the text, that call stays dense, and the report says why; with `strict=True` it
raises.

"""
BARE = """
## A transformer by itself

`dit_sparse.enable(transformer, "radial", scheduler=scheduler)` serves a loop of your own: the step
is read from the scheduler. Without one, tell it before each pass:

    with dit_sparse.sparse_attention(transformer, "radial") as handle:
        for step, t in enumerate(timesteps):
            handle.at(step, len(timesteps), "cond")
            prediction = transformer(latents, timestep=t, ...)

## Checkpoints that were trained with sparse attention

Kandinsky 5 checkpoints with `attention_type: "nabla"` and Kandinsky 6's super-resolution compute
block-sparse attention by themselves, and so does a model whose attention has the gates of Video
Sparse Attention (`to_gate_compress`): enabling is refused, as there is nothing left to gain and
something to break. Published VSA checkpoints lose their gates when Diffusers loads them and run
dense attention, for which they were not trained. They are known by name only (`FastWan2.1`,
`VSA`), so they are warned of and not refused: whoever wants to measure it can.

## A new class

In `dit_sparse/pipelines/`, one row beside those of its token layout (`video_only.py`,
`text_last.py`, `text_first.py`, `packed.py`) and one line in the table in `__init__.py`; one case
in `tests/models/builders.py`; and this page written anew.
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
