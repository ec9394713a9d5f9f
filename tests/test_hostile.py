# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: what they say is shown as it is, and what they ask for is bounded."""

import io
import json
import re
import shutil
import socket
import time
import zipfile

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dit_sparse import Strategy
from dit_sparse.attach.runtime import Runtime
from dit_sparse.cli import app, console, receipt
from dit_sparse.cli.console import Terminal, styled
from dit_sparse.core.grid import BlockLayout, LatentsGrid
from dit_sparse.core.plan import BlockPlan
from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.errors import DitSparseError, GeometryError, PlanError, StrategyError
from dit_sparse.forecast.counted import counted_density
from dit_sparse.inspect.atlas import Atlas, Band, Layout
from dit_sparse.inspect.html import page
from dit_sparse.methods import METHODS
from dit_sparse.methods.params import param_names
from dit_sparse.quality.clips import open_clip
from tests import hub_server, tiny

MARKS = "[/] [bold]x[/bold] :boom: <b>&amp;"  # markup of rich, an emoji code, HTML
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SMALL = {"frames": 3, "height": 4, "width": 6}
texts = st.text(max_size=30) | st.text("[]/bold\\:_\x1b\x9b\x07\r\x7f\u202e", max_size=12)


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(result, *words):
    """One line on stderr, exit code 2, no traceback, no escape sequence."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    assert not CONTROLS.search(result.output)
    for word in words:
        assert word in lines[0]


def write(path, **changes):
    data = Strategy.single("radial", block_size=16).to_dict() | changes
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@given(texts, texts)
def test_a_terminal_shows_any_text_as_it_is(one, other):
    file = io.StringIO()
    terminal = Terminal(file=file, width=200)
    table = Table(one, title=other)
    table.add_row(other)
    for what in (one, table, styled((one, "bold red"), other)):
        terminal.print(what)
    terminal.print(one, highlight=False, soft_wrap=True)
    shown = file.getvalue()
    assert not CONTROLS.search(shown)
    plain = one.isascii() and one.isprintable()
    assert not plain or shown.endswith(f"{one}\n")  # brackets, colons and backslashes too


@given(texts)
def test_bars_and_spinners_show_any_text_as_it_is(text):
    file = io.StringIO()
    terminal = Terminal(file=file, width=200, force_terminal=True, no_color=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "ERR", terminal)
        with console.progress() as bars:
            bars.add_task(text, total=1)
        with terminal.status(text):
            pass
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue())  # what moves the bars
    assert not CONTROLS.search(shown.replace("\r", ""))


def test_every_command_shows_a_name_as_it_is(tmp_path):
    note = {"note": MARKS, "source": MARKS, "measured": {MARKS: 0.5}}
    mine = write(tmp_path / "mine.json", name=MARKS, grid=SMALL, receipt=note)
    other = write(tmp_path / "other.json", name=f"{MARKS} 2", grid=SMALL, rules=[])
    for arguments in (
        ["inspect", mine, "-o", tmp_path / "map.html"],
        ["inspect", mine, "-o", tmp_path / "map.png"],
        ["inspect", mine, "--grid", "2x4x4", "--heads", "1", "-o", tmp_path / "heads.png"],
        ["diff", mine, other],
        ["retile", mine, "--height", "64", "--width", "96", "-o", tmp_path / "larger.json"],
    ):
        result = run(*arguments)
        assert result.exit_code in {0, 1} or MARKS in result.stderr, (arguments[0], result.output)
        assert result.exception is None or isinstance(result.exception, SystemExit)
    assert MARKS in " ".join(run("diff", mine, other, "--json").stdout.split()).replace(
        "\\\\", "\\"
    )
    html = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "<b>" not in html.partition("</style>")[2].partition("<script")[0]
    assert "[/] [bold]x[/bold] :boom: &lt;b&gt;&amp;amp;" in html


def test_a_name_is_no_path(tmp_path):
    mine = write(tmp_path / "mine.json", name="../../outside/x", grid=SMALL)
    (tmp_path / "a" / "b").mkdir(parents=True)
    result = run("inspect", mine, "-o", tmp_path / "a" / "b")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mine.json"}


def test_a_receipt_of_a_run_shows_text_as_it_is(monkeypatch, tmp_path):
    file = io.StringIO()
    monkeypatch.setattr(receipt, "OUT", Terminal(file=file, width=200))
    arm = {
        "total_seconds": 1.0, "attention_seconds": 1.0, "processor_seconds": 1.0,
        "kernels": [MARKS, "\x1b]0;x\x07"], "state_bytes_peak": 0, "guarantee": None,
        "dense_against_the_strategy": {MARKS: 1},
    }  # fmt: skip
    density = {"overall": 1.0, "sparse_calls": None, "sparse_call_count": 0, "call_count": 1}
    receipt.show(
        {
            "arms": {"dense": None, "sparse": arm}, "strategy": {"name": MARKS}, "repeat": None,
            "density": density, "recall": None, "quality": None, "speedup": None,
            "environment": {"device": "cpu"},
        },
        tmp_path,
        ["a"],
    )  # fmt: skip
    shown = file.getvalue()
    assert not CONTROLS.search(shown)
    assert f"sparse: {MARKS}" in shown
    assert f"stayed dense x 1: {MARKS}" in shown


PLACES = {
    "name": lambda text: {"name": text},
    "model.classes": lambda text: {"model": {"classes": [text]}},
    "library_version": lambda text: {"library_version": text},
    "receipt.note": lambda text: {"receipt": {"note": text}},
    "receipt.prompts[0]": lambda text: {"receipt": {"prompts": [text]}},
    "receipt.versions": lambda text: {"receipt": {"versions": {text: "1"}}},
    "rules[0].params": lambda text: {"rules": [{"method": "radial", "params": {text: 1}}]},
    "rules[0].method": lambda text: {"rules": [{"method": text}]},
}


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("mark", ["\x1b[2J", "\x9b31m", "\x07", "\r", "\x00", "\u202e", "\ud800"])
def test_control_characters_in_a_strategy_are_refused(tmp_path, place, mark):
    mine = write(tmp_path / "mine.json", **PLACES[place](f"a{mark}b"))
    with pytest.raises(StrategyError, match=r"mine\.json: .*control character \\\w+") as error:
        Strategy.load(mine)
    assert not CONTROLS.search(str(error.value))
    assert place.partition("[")[0].partition(".")[0] in str(error.value) or "key" in str(
        error.value
    )
    refused(run("inspect", mine, "-o", tmp_path / "x.html"), "control character")


def test_a_name_made_in_python_is_a_line_too():
    for name in ("a\x1b[0m", "a\nb"):
        with pytest.raises(ValueError, match="name"):
            Strategy(name=name)


def test_control_characters_in_prompts_are_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na \x1b[31mred cat\n", encoding="utf-8")
    with pytest.raises(DitSparseError, match=r"prompts\.txt: line 2: control character \\x1b"):
        read_prompt_file(path)


@pytest.mark.parametrize("mark", ["\x1b[31m", "\u202e"])
def test_pages_show_no_control_characters(mark):
    atlas = Atlas(f"a{mark}", [f"b{mark}"], Layout(("transformer",), (Band(0, 1, 1),), 1, 1))
    atlas.notes.append(mark)
    html = page(atlas)
    assert not CONTROLS.search(html.partition("</style>")[2].partition("<script")[0])


# What a file may ask for.

HUGE = LatentsGrid(100, 100, 100)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            {"frames": 1000, "height": 1000, "width": 1000},
            "grid: .*1,000,000,000 tokens; the maximum",
        ),
        ({"frames": 1, "height": 1, "width": 4_000_000}, "grid.width"),
        ({"frames": 2, "height": 2000, "width": 1000, "text": 1}, "grid: .*4,000,001 tokens"),
    ],
)
def test_a_grid_larger_than_any_models_is_refused(tmp_path, grid, words):
    mine = write(tmp_path / "mine.json", grid=grid)
    with pytest.raises(StrategyError, match=words):
        Strategy.load(mine)
    refused(run("inspect", mine, "-o", tmp_path / "x.html"), "grid")


def small_blocks(name):
    """Params with the smallest blocks that a method allows; empty: it has none to choose."""
    ones = {"block_size": 1, "tile": [1, 1, 1], "mask_params": {"block_size": 1}}
    return {key: value for key, value in ones.items() if key in param_names(name)}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_plan_is_estimated_before_it_is_built(name):
    params = small_blocks(name)
    if not params:
        pytest.skip("no blocks of its own")
    started = time.process_time()
    with pytest.raises(
        GeometryError, match=r"cuts 100 x 100 x 100 .* GiB, and the maximum is 10,000"
    ):
        counted_density(name, params, HUGE)
    assert time.process_time() - started < 20


def test_dilation_cuts_blocks_too():
    with pytest.raises(GeometryError, match=r"dilation.* GiB, and the maximum is 10,000 blocks"):
        counted_density("gna", {"dilation": [100, 100, 100]}, HUGE)


def test_the_command_line_says_it_in_one_line(tmp_path):
    rules = [{"method": "radial", "params": {"block_size": 1}}]
    grid = {"frames": 21, "height": 45, "width": 80}
    mine = write(tmp_path / "mine.json", grid=grid, rules=rules)
    refused(run("inspect", mine, "-o", tmp_path / "x.html"), "block_size 1 cuts 21 x 45 x 80")
    refused(run("inspect", "radial", "--grid", "999x999x999", "-o", tmp_path / "x.png"), "tokens")
    refused(run("inspect", "radial", "--grid", "0x9x9", "-o", tmp_path / "x.png"), "0 x 9 x 9")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"layers": [4096]}, "layers"),
        ({"heads": [4096]}, "heads"),
        ({"layers": [4095], "heads": [4095]}, "4096 layers x 4096 heads"),
    ],
)
def test_layers_and_heads_beyond_any_model_are_refused(tmp_path, rule, words):
    mine = write(tmp_path / "mine.json", rules=[{"method": "radial", **rule}])
    refused(run("inspect", mine, "-o", tmp_path / "x.html"), words)


def test_too_many_rules_are_refused(tmp_path):
    mine = write(tmp_path / "mine.json", rules=[{"method": "dense"}] * 50_001)
    with pytest.raises(StrategyError, match="rules: at most 50,000"):
        Strategy.load(mine)


@pytest.mark.parametrize(
    "change",
    [
        {"q": "1000000000000 4 1"},
        {"kv": "11 1000000000000 1"},
        {"kv": "11 0 1"},
        {"kv": "-11 4 1"},
        {"q_tokens": "1000000000000"},
        {"kv_tokens": "-1"},
    ],
)
def test_numbers_in_a_plan_file_are_bounded(tmp_path, change):
    layout = BlockLayout.from_lengths([4, 4, 3])
    path = tmp_path / "plan.safetensors"
    BlockPlan.full(layout, layout).save(path)
    good = {"format": "dit_sparse.plan/1", "complete": "0", "q": "11 4 1", "kv": "11 4 1"}
    empty = dict.fromkeys(("q_tokens", "kv_tokens", "dense_keys"), "")
    save_file(load_file(path), path, metadata=good | empty | change)
    with pytest.raises(PlanError, match=str(path)):
        BlockPlan.load(path)


@given(st.data())
def test_any_tensors_in_a_plan_file_are_refused_or_a_plan(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    layout = BlockLayout.from_lengths([4, 4, 3])
    BlockPlan.full(layout, layout).save(path)
    tensors = load_file(path)
    name = data.draw(st.sampled_from([*tensors, "partial", "q_permutation", "kv_log_weight"]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.float32, torch.bool]))
    tensors[name] = torch.full(shape, data.draw(st.integers(-2, 12))).to(dtype)
    good = {"format": "dit_sparse.plan/1", "complete": "0", "q": "11 4 1", "kv": "11 4 1"}
    save_file(
        tensors, path, metadata=good | dict.fromkeys(("q_tokens", "kv_tokens", "dense_keys"), "")
    )
    try:
        BlockPlan.load(path).density()
    except PlanError:
        return


def npz(path, shape, data=b""):
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", header.getvalue() + data)
    return path


def test_an_npz_is_bounded_when_it_is_unpacked(tmp_path, monkeypatch):
    forged = npz(tmp_path / "forged.npz", (10**6, 1000, 1000, 3))
    with pytest.raises(DitSparseError, match=r"forged\.npz.* unpacks to .* GiB, at most 4 GiB"):
        open_clip(forged)
    short = npz(tmp_path / "short.npz", (1000, 500, 500, 3))
    with pytest.raises(DitSparseError, match="declares 3,000,000,000 bytes"):
        open_clip(short)
    np.savez_compressed(tmp_path / "zeros.npz", frames=np.zeros((40, 64, 64, 3), np.float32))
    assert open_clip(tmp_path / "zeros.npz").frames == 40
    monkeypatch.setattr("dit_sparse.quality.clips.MAX_UNPACKED", 2**20)
    with pytest.raises(DitSparseError, match="unpacks to"):
        open_clip(tmp_path / "zeros.npz")


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    from PIL import Image

    path = tmp_path / "wide.png"
    Image.new("RGB", (300, 10)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DitSparseError, match=r"wide\.png: not a readable image"):
        open_clip(path)


# Names.


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server.running() as found:
        found.options = {"endpoint": found.endpoint, "cache_dir": tmp_path / "cache"}
        yield found
    huggingface_hub.close_session()


@pytest.fixture
def nobody(monkeypatch):
    """List the hosts whose addresses are asked for; none is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.mark.parametrize("name", ["profiles/radiall", "./radiall", "profiles/sub/radiall"])
def test_a_mistyped_path_is_not_sent_to_the_hub(nobody, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    with pytest.raises(StrategyError, match="did you mean radial"):
        Strategy.coerce(name)
    assert nobody == []


def test_the_hub_is_asked_once(server):
    with pytest.raises(
        StrategyError, match=r"no local folder or Hub repository .*did you mean radial"
    ):
        Strategy.from_pretrained("profiles/radiall", **server.options)
    assert len(server.requests) == 1


def test_without_a_network_nothing_is_tried_again(server, tmp_path):
    started = time.monotonic()
    with pytest.raises(StrategyError, match=r"the Hub is not reachable.*did you mean radial"):
        Strategy.from_pretrained("lab/radiall", endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
    assert time.monotonic() - started < 6  # it was 25 s


def test_a_mistyped_model_folder_is_not_sent_to_the_hub(nobody, monkeypatch, root):
    monkeypatch.chdir(root)
    result = run("generate", "samples/wan-tinny", "a cat", "--strategy", "radial", "-o", "x")
    refused(result, "folder not found in samples; did you mean samples/wan-tiny?")
    assert nobody == []


# Calls without anything in them.


@pytest.mark.parametrize("strict", [False, True])
def test_an_empty_batch_is_dense_or_one_line(strict):
    runtime = Runtime(Strategy.single("pooled"), num_layers=1, num_heads=2, strict=strict)
    query = torch.zeros(0, 72, 2, 8)
    call = {"grid": LatentsGrid(3, 4, 6), "layer": 0, "step": 0, "num_steps": 2}
    if strict:
        with pytest.raises(GeometryError, match=r"no tokens to attend to: query \(0, 72, 2, 8\)"):
            runtime.attend(query, query, query, **call)
    else:
        with pytest.warns(UserWarning, match="no tokens to attend to"):
            assert runtime.attend(query, query, query, **call).shape == query.shape


def test_an_empty_batch_of_a_pipeline_fails_as_it_does_without_us():
    pipe, args = tiny.wan()
    none = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(RuntimeError) as plain:
        tiny.run(pipe, none)
    pipe.enable_sparse_attention("pooled")
    with pytest.raises(RuntimeError, match=re.escape(str(plain.value))):
        tiny.run(pipe, none)


# Sizes of a model's own files.


def model_folder(path, **sizes):
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 2, **sizes}
    (path / "transformer").mkdir(parents=True)
    (path / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "model_index.json").write_text("{}", encoding="utf-8")
    return path


@pytest.mark.parametrize("sizes", [{"num_layers": 10**9}, {"num_attention_heads": 10**9}])
def test_sizes_in_a_models_config_are_bounded(tmp_path, sizes):
    folder = model_folder(tmp_path / "model", **sizes)
    refused(run("forecast", folder), next(iter(sizes)), "at most 4096")


def test_a_models_config_with_escapes_is_refused(tmp_path):
    folder = model_folder(tmp_path / "model", _class_name="Wan\x1b[2JTransformer3DModel")
    refused(run("forecast", folder), "control character")


def test_weights_in_pickle_form_are_not_loaded(root, tmp_path):
    """Only safetensors: a pickle could hold code, whoever reads it."""
    folder = tmp_path / "model"
    shutil.copytree(root / "samples" / "wan-tiny", folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    result = run("generate", folder, "a cat", "--strategy", "radial", "-o", tmp_path / "out")
    refused(result, "cannot be loaded", "safetensors")
