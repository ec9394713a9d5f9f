# SPDX-License-Identifier: Apache-2.0
"""The page: whole, self-contained, nothing unescaped, and alive in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.inspect.atlas import Atlas, Band, Candidates, Choice, Layout, Quantity
from dit_sparse.inspect.html import page
from dit_sparse.inspect.survey import layout_of, strategy_atlas
from dit_sparse.strategy import Receipt, Rule, Strategy, shipped_names

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Reads a page; fails where tags are not closed in order or something is fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.data = [], [], None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            assert key not in {"src", "href"} or value.startswith("data:"), (tag, key, value)
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script" and attrs.get("id") == "data":
            self.data = json.loads(data)
        elif tag not in {"script", "style"}:
            self.words.append(data)


EVIL = '</script ><img src="http://x/y"> & "q" \u2028'


def made(title="a title"):
    layout = Layout(("transformer",), (Band(0, 2, 6), Band(2, 6, 6)), 2, 2)
    values = [None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    return Atlas(
        title, ["a line"], layout,
        quantities=[Quantity("error", "error", values, "low", "a note")],
        choices=[Choice("dense", "dense", "dense"), Choice("radial", f"radial {title}", "radial")],
        choice_of=[0, 1, 1, 1, 0, 0, 1, 1],
        candidates=Candidates(
            ["dense", "radial"],
            {key: [[0.0, 0.25]] * 7 + [[]] for key in ("error", "density", "recall", "time")},
        ),
        facts=[("command", title)], notes=[f"a note {title}"],
    )  # fmt: skip


def test_a_page_is_whole_and_fetches_nothing():
    text = page(made(), "data:image/png;base64,AA")
    found = Page(text)
    assert found.data["choice_of"] == [0, 1, 1, 1, 0, 0, 1, 1]
    assert found.data["bands"] == ["steps 0-1", "steps 2-5"]
    assert found.data["quantities"][0]["values"][0] is None
    assert "a line" in found.words
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", text)


def test_nothing_comes_out_of_its_place():
    text = page(made(EVIL))
    found = Page(text)
    assert found.data["choices"][1]["text"] == f"radial {EVIL}"
    assert any(EVIL in words for words in found.words)
    assert text.count("</script") == 2


def test_a_large_models_page_stays_below_five_megabytes():
    """30 layers x 12 heads x 3 bands, 35 candidates, pictures for every head."""
    layout = Layout(("transformer",), tuple(Band(i, i + 1, 3) for i in range(3)), 30, 12)
    atlas = made()
    atlas.layout = layout
    atlas.choice_of = [1] * layout.spots
    atlas.quantities = [Quantity("error", "error", [0.1234] * layout.spots)] * 8
    table = [[0.123] * 36] * layout.spots
    atlas.candidates = Candidates(
        [f"candidate@{i}" for i in range(36)],
        dict.fromkeys(("error", "density", "recall", "time"), table),
    )
    for shelf in (atlas.attention, atlas.kept, atlas.seen):
        for spot in range(layout.spots):
            number = atlas.pictures.add(f"{id(shelf)}-{spot:05d}".ljust(1500, "A"))
            if number is not None:
                shelf[spot] = number
    assert atlas.pictures.left_out > 0
    assert len(atlas.attention) == layout.spots  # attention maps come first
    assert 3_000_000 < len(page(atlas)) < 5_000_000


def cli(*args):
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


@pytest.mark.parametrize("name", ["wan-tiny.radial", "flux.1-dev.4k.gna", "wan2.1-14b.720p.svg2"])
def test_published_strategies_say_what_is_not_known(name, tmp_path):
    result = cli(name, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {f"{name}.html", f"{name}.png"}
    found = Page(files[f"{name}.html"].read_text())
    data = found.data
    assert len(data["choice_of"]) == len(data["bands"]) * data["layers"] * data["heads"]
    values = {q["name"]: q["values"] for q in data["quantities"]}
    for spot, number in enumerate(data["choice_of"]):
        dense = data["choices"][number]["method"] == "dense"
        assert (values["error"][spot] is None) != dense
        assert (values["time saved"][spot] is None) != dense
    words = " ".join(found.words)
    receipt = Strategy.load(name).receipt
    assert ("Published settings, not measured here" in words) == receipt.published
    assert receipt.note in html.unescape(words)
    drawn = [c["kept"] for c in data["choices"] if c["method"] != "dense"]
    assert (drawn[0] is None) == (name == "wan2.1-14b.720p.svg2")
    with Image.open(files[f"{name}.png"]) as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_strategy_has_a_page(name, monkeypatch):
    """Without counting and drawing, which take seconds at the largest sizes."""
    monkeypatch.setattr("dit_sparse.inspect.survey.COUNTED", 0)
    strategy = Strategy.load(name)
    stages = ("transformer", "transformer_2") if name.startswith("wan2.2") else ("transformer",)
    layout = layout_of(strategy, layers=60, heads=24, num_steps=50, stages=stages)
    text = page(strategy_atlas(strategy, layout))
    data = Page(text).data
    assert len(data["choice_of"]) == layout.spots
    methods = {rule.method for rule in strategy.rules} | {"dense"}
    assert {choice["method"] for choice in data["choices"]} <= methods
    dense = strategy.schedule.dense_warmup_steps or strategy.schedule.dense_last_steps
    changes = any(rule.steps != (0.0, 1.0) for rule in strategy.rules)
    assert (len(layout.bands) > 1) == bool(dense or changes)
    assert len(text) < 1_000_000


def test_a_profiled_file_has_its_figures(tmp_path, root):
    model = root / "samples" / "wan-tiny"
    size = ["--steps", "2", "--height", "64", "--width", "64", "--frames", "9"]
    search = CliRunner().invoke(
        app,
        ["profile", str(model), "--prompts", "1", "-o", str(tmp_path / "s.json"), "--bands", "1",
         "--candidates", "pooled:density=0.25:block_size=16,radial:block_size=16:sink=false",
         "--target", "0.8", "--costs", "assumed", "--device", "cpu", "--no-check", *size],
    )  # fmt: skip
    assert search.exit_code == 0, search.output
    prompt = "a big red circle moving right"
    run = ("--model", model, "--prompt", prompt, *size)
    result = cli(tmp_path / "s.json", *run, "-o", tmp_path / "s.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "s.html").read_text()
    data = Page(text).data
    assert (data["layers"], data["heads"], data["bands"]) == (6, 4, ["steps 0-1"])
    error = next(q for q in data["quantities"] if q["name"] == "error")
    assert None not in error["values"]
    assert data["candidates"]["names"][1] == "pooled:density=0.25:block_size=16"
    assert sorted(map(int, data["attention"])) == list(range(24))
    sparse = [
        i for i, c in enumerate(data["choice_of"]) if data["choices"][c]["method"] != "dense"
    ]
    assert sparse
    assert sorted(map(int, data["kept"])) == sparse
    assert prompt in text
    assert str(root) not in text
    assert str(tmp_path) not in text
    assert len(text) < 500_000
    atlas = cli(model, *size, "-o", tmp_path / "model")
    assert atlas.exit_code == 0, atlas.output
    data = Page((tmp_path / "model" / "wan-tiny.html").read_text()).data
    assert data["choices"] == []
    assert len(data["attention"]) == 2 * 24  # two steps, two bands
    assert "mass in the heaviest quarter" in [q["name"] for q in data["quantities"]]
    (tmp_path / "s.measured" / "unit-00000.json").write_text("{")
    broken = cli(tmp_path / "s.json", "-o", tmp_path / "s.html")
    assert broken.exit_code == 0
    assert "unit-00000.json: cannot be read" in " ".join(broken.stderr.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing.json"], "file not found"),
        (["."], "is a folder"),
        (["wan-tiny.radial", "--model", "nowhere", "--prompt", "x"], "unknown model name"),
        (["flux.1-dev.4k.gna", "--model", "wan2.1-14b", "--prompt", "x"], "made for FluxTrans"),
        (["wan-tiny.radial", "--model", "wan2.1-14b"], "--model requires --prompt"),
        (["--model", "nowhere"], "unknown model name"),
    ],
)
def test_bad_requests_are_one_line(args, words, tmp_path):
    result = cli(*args, "-o", tmp_path / "x.html")
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_bad_files_are_one_line(tmp_path):
    whole = Strategy.single("radial").to_json()
    path = tmp_path / "bad.json"
    for content, words in ((whole[:90], "not valid JSON"), ("{}", "schema_version"),
                           (whole.replace('"params"', '"parms"', 1), "did you mean 'params'"),
                           (whole.replace("1.0]", "1e999]", 1), "too large")):  # fmt: skip
        path.write_text(content)
        result = cli(path, "-o", tmp_path / "x.html")
        assert result.exit_code == 2, result.output
        assert "bad.json" in result.stderr
        assert words in result.stderr
    far = Strategy(name="far", rules=(Rule(method="radial", layers=(99,)),), receipt=Receipt())
    far.save(path)
    result = cli(path, "--layers", 6, "--heads", 4, "-o", tmp_path / "x.html")
    assert result.exit_code == 2
    assert "layer 99 is out of range" in result.stderr
    assert not (tmp_path / "x.html").exists()


def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def live(path, tmp_path, more=""):
    """Give the page as the browser has it when its script has run."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", path.as_uri() + more]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, timeout=240)
    return done.stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium here: apt install chromium")
def test_a_click_shows_a_heads_choice(tmp_path):
    text = page(made())
    click = """<script>document.querySelector('rect[data-i="6"]')
      .dispatchEvent(new MouseEvent('click', {bubbles: true}));</script></body>"""
    path = tmp_path / "x.html"
    path.write_text(text, encoding="utf-8")
    opened = live(path, tmp_path, "#error")
    spot = opened[opened.index('id="spot"') :]
    assert opened.count("data-i=") == 8
    assert "layer 0, head 1, steps 0-1" in spot  # the first that is not dense
    assert 'fill="url(#unknown)"' in opened
    assert "not known (1 of 8)" in opened
    path.write_text(text.replace("</body>", click), encoding="utf-8")
    opened = live(path, tmp_path)
    spot = opened[opened.index('id="spot"') :]
    assert "layer 1, head 0, steps 2-5" in spot
    assert "0.600" in spot
    assert "Candidates measured here" in spot
    assert 'class="on"' in opened
