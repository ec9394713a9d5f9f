# SPDX-License-Identifier: Apache-2.0
"""Strategies beside a model, in subfolders and on the Hub: a local server stands in for it."""

import json
import shutil
import time
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import dit_sparse
from dit_sparse import Strategy, StrategyError
from dit_sparse.cli import app
from dit_sparse.strategy import CONFIG_NAME, hub
from tests import hub_server, tiny

FAST = Strategy.single("radial", decay_factor=0.5, name="fast")
OTHER = Strategy.single("gna", window=(3, 3, 3), name="other")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub of our own, asked by the real client, which may go online for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server.running() as found:
        found.options = {"endpoint": found.endpoint, "cache_dir": tmp_path / "cache"}
        yield found
    huggingface_hub.close_session()


word = st.text("abcXYZ019._-", min_size=1, max_size=8).filter(lambda w: w.strip(".-"))


@given(word, word, st.none() | word, st.none() | st.lists(word, min_size=1, max_size=3))
def test_an_address_is_read_as_it_is_written(owner, name, revision, place):
    place = None if place is None else "/".join(place)
    address = hub.Address(f"{owner}/{name}", revision, place)
    if place is None and str(address).endswith(".json"):
        assert hub.parse(str(address)) is None
    else:
        assert hub.parse(str(address)) == address


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "/a/b", "a/b:", "a/b@", "a/b:c:d", "a\\b",
                                  "C:/x", "a b/c", "a/b.json", "a/b@x@y", "./a/b"])  # fmt: skip
def test_what_is_no_address(name):
    assert hub.parse(name) is None


@pytest.mark.parametrize(
    ("place", "filename", "file"),
    [
        (None, None, CONFIG_NAME),
        ("a", None, f"a/{CONFIG_NAME}"),
        ("a/b.json", None, "a/b.json"),
        ("a", "c.json", "a/c.json"),
        (None, "c.json", "c.json"),
        ("a//b/", None, f"a/b/{CONFIG_NAME}"),
    ],
)
def test_places_and_files(place, filename, file):
    assert hub.file_of(place, filename, "x") == file


@pytest.mark.parametrize(
    ("place", "filename", "message"),
    [
        ("..", None, "is outside the repository"),
        ("a/../../b.json", None, "is outside the repository"),
        ("/etc", None, "is outside the repository"),
        ("a.json", "b.json", "already contains a file name, and filename='b.json' gives another"),
    ],
)
def test_bad_places(place, filename, message):
    with pytest.raises(StrategyError, match=message):
        hub.file_of(place, filename, "x")


def test_folders_subfolders_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    FAST.save_pretrained("own/model")
    OTHER.save_pretrained("own/model/draft")
    OTHER.save_pretrained("own/model", filename="draft.json")
    assert Strategy.from_pretrained("own/model") == FAST
    assert Strategy.coerce("own/model") == FAST
    for found in (
        Strategy.from_pretrained("own/model", subfolder="draft"),
        Strategy.from_pretrained(tmp_path / "own/model", subfolder="draft"),
        Strategy.from_pretrained("own/model", filename="draft.json"),
        Strategy.from_pretrained("own/model:draft"),  # the Hub's spelling, for a folder
        Strategy.coerce("own/model:draft"),
        Strategy.coerce("own/model:draft.json"),
        Strategy.coerce("own:model/draft"),
        Strategy.coerce(f"{tmp_path}/own/model:draft"),
        Strategy.coerce("own/model/draft"),
        Strategy.coerce("own/model/draft.json"),
    ):
        assert found == OTHER
    for name, options, message in (
        ("own/model", {"subfolder": "none"}, rf"own/model.none.{CONFIG_NAME}: file not found"),
        ("own/model", {"subfolder": "../model"}, "is outside the repository"),
        (
            "own/model:draft",
            {"subfolder": "draft"},
            "already contains a folder, and subfolder='draft'",
        ),
        ("nowhere", {}, "nowhere: folder not found, and not a valid Hub repository"),
        ("own/model/draft.json", {}, "to load a file, use Strategy.load"),
    ):
        with pytest.raises(StrategyError, match=message):
            Strategy.from_pretrained(name, **options)


def test_uploaded_and_fetched(server, monkeypatch, tmp_path):
    """Through the real client, over HTTP: what is pushed comes back, from where it was put."""
    options = server.options
    url = FAST.push_to_hub("fast", token=hub_server.TOKEN, private=True, endpoint=server.endpoint)
    assert url == f"{server.endpoint}/me/fast/commit/{1:040d}"
    (repository,) = server.repositories.values()
    assert repository.private
    assert repository.messages == ["Add sparse attention strategy fast (radial)"]
    assert repository.files == {"main": {CONFIG_NAME: FAST.to_json().encode()}}
    again = Strategy.from_pretrained("me/fast", token=hub_server.TOKEN, **options)
    assert again == FAST

    # A model's repository that is there already: another place, another revision.
    server.repositories["lab/model"] = hub_server.Repository()
    pushed = {"token": hub_server.TOKEN, "endpoint": server.endpoint}
    OTHER.push_to_hub("lab/model", subfolder="draft", commit_message="why", **pushed)
    OTHER.push_to_hub("lab/model", filename="d.json", revision="v2", **pushed)
    assert server.repositories["lab/model"].messages[0] == "why"
    assert set(server.repositories["lab/model"].files["main"]) == {f"draft/{CONFIG_NAME}"}
    for name, extra in (
        ("lab/model", {"subfolder": "draft"}),
        ("lab/model:draft", {}),
        (f"lab/model:draft/{CONFIG_NAME}", {}),
        ("lab/model@v2:d.json", {}),
        ("lab/model", {"revision": "v2", "filename": "d.json"}),
        ("lab/model:d.json", {"revision": "v2"}),
    ):
        assert Strategy.from_pretrained(name, **extra, **options) == OTHER
    FAST.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="lab/saved", **pushed)
    assert Strategy.from_pretrained("lab/saved", **options) == FAST
    assert Strategy.from_pretrained(tmp_path / "saved") == FAST
    with pytest.raises(TypeError, match="repo_id: requires push_to_hub=True"):
        FAST.save_pretrained(tmp_path / "saved", repo_id="lab/saved")

    # Fetched once, it is there without a network; what was not fetched says so.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    count = len(server.requests)
    assert Strategy.from_pretrained("lab/model:draft", **options) == OTHER
    with pytest.raises(
        StrategyError, match=r"lab/model: no new.json in the local Hub cache.*offline"
    ):
        Strategy.from_pretrained("lab/model", filename="new.json", **options)
    with pytest.raises(StrategyError, match=r"lab/model: upload failed: .*offline"):
        OTHER.push_to_hub("lab/model", **pushed)
    assert len(server.requests) == count


def test_what_the_hub_refuses(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits before it tries again
    options = server.options
    server.repositories["lab/model"] = hub_server.Repository()
    server.repositories["lab/secret"] = hub_server.Repository(private=True)
    files = server.repositories["lab/model"].files["main"]
    files["newer.json"] = json.dumps({"schema_version": 2, "name": "x"}).encode()
    files["page.json"] = b"<html>"
    for name, message in (
        (
            "lab/nothing",
            "lab/nothing:.*no local folder or Hub repository has this name.*hf auth login",
        ),
        ("lab/secret", "for a private repository"),
        (
            "lab/model",
            r"file not found in the repository; to load another one, use lab/model:FOLDER",
        ),
        ("lab/model@v9:a.json", "has no revision 'v9'"),
        ("lab/model:newer.json", "lab/model:newer.json: schema_version: must be 1, got 2"),
        ("lab/model:page.json", "lab/model:page.json: not valid JSON"),
        ("lab/model:../x.json", "is outside the repository"),
        ("lab/--model", "download failed"),
    ):
        with pytest.raises(StrategyError, match=message):
            Strategy.from_pretrained(name, **options)
    with pytest.raises(
        StrategyError, match="already contains a revision, and revision='a' gives another"
    ):
        Strategy.from_pretrained("lab/model@b:x.json", revision="a", **options)
    with pytest.raises(StrategyError, match=r"me/x: upload failed: .*hf auth login"):
        FAST.push_to_hub("me/x", token="hf_wrong", endpoint=server.endpoint)
    dead = {**options, "endpoint": "http://127.0.0.1:9"}
    with pytest.raises(StrategyError, match="in the local Hub cache, and the Hub is not"):
        Strategy.from_pretrained("lab/away", **dead)
    with pytest.raises(StrategyError, match="me/x: upload failed"):
        FAST.push_to_hub("me/x", token="t", endpoint="http://127.0.0.1:9")


def test_a_model_brings_its_strategy(tmp_path):
    """Saved beside the model, it is found without a name, and disturbs nobody's loading."""
    built, args = tiny.wan()
    folder = tmp_path / "model"
    built.save_pretrained(folder)
    absent = {"text_encoder": None, "tokenizer": None}
    plain = diffusers.WanPipeline.from_pretrained(folder, **absent)
    with pytest.raises(
        StrategyError,
        match=r"no strategy given, and none found with the model: .*file not found; pass",
    ):
        plain.enable_sparse_attention()
    Strategy.single("gna", window=(1, 3, 3), tile=(1, 4, 4), name="own").save_pretrained(folder)
    pipe = diffusers.WanPipeline.from_pretrained(folder, **absent)
    wanted = tiny.run(plain, args)
    pipe.enable_sparse_attention(dense_warmup_steps=1)
    assert pipe.sparse_attention.strategy.name == "own"
    assert pipe.sparse_attention.strategy.schedule.dense_warmup_steps == 1
    sparse = tiny.run(pipe, args)
    pipe.disable_sparse_attention()
    plain.enable_sparse_attention("gna", window=(1, 3, 3), tile=(1, 4, 4), dense_warmup_steps=1)
    assert torch.equal(sparse, tiny.run(plain, args))
    assert not torch.equal(sparse, wanted)
    assert torch.equal(tiny.run(pipe, args), wanted)

    with dit_sparse.sparse_attention(pipe) as handle:
        assert handle.strategy.name == "own"
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    with dit_sparse.enable(transformer) as handle:
        assert handle.strategy.name == "own"
    with pytest.raises(StrategyError, match=r"was not loaded from a folder or repository.*; pass"):
        built.enable_sparse_attention()

    # One that is for another model is refused through this path too, before anything is changed.
    rule = dit_sparse.strategy.Rule(method="radial", layers=(7,))
    Strategy(name="deep", rules=(rule,)).save_pretrained(folder)
    with pytest.raises(StrategyError, match=r"deep: rules\[0\].layers: layer 7 is out of range"):
        pipe.enable_sparse_attention()
    model = dit_sparse.strategy.Model(classes=("FluxTransformer2DModel",))
    Strategy(name="flux", model=model).save_pretrained(folder)
    with pytest.raises(
        StrategyError, match="flux: model: made for FluxTransformer2DModel, but this"
    ):
        pipe.enable_sparse_attention()
    assert pipe.sparse_attention is None


def test_a_pipeline_from_the_hub_brings_its_strategy(server, monkeypatch):
    """The name that Diffusers keeps is the repository's; no network where the name is unknown."""
    server.repositories["lab/wan"] = hub_server.Repository()
    server.repositories["lab/wan"].files["main"][CONFIG_NAME] = FAST.to_json().encode()
    fetched = []

    ours = hub.fetch

    def fetch(repo_id, filename, **options):
        fetched.append((repo_id, filename, options))
        return ours(repo_id, filename, **options, **server.options)

    monkeypatch.setattr(hub, "fetch", fetch)
    pipe, _ = tiny.wan()
    pipe.register_to_config(_name_or_path="lab/wan")
    with dit_sparse.sparse_attention(pipe) as handle:
        assert handle.strategy == FAST
    assert fetched == [("lab/wan", CONFIG_NAME, {})]


def test_the_command_line_takes_the_same_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAST.save_pretrained("own/model")
    OTHER.save_pretrained("own/model/draft")
    OTHER.save("plain.json")
    runner = CliRunner()
    for one, two, code in (
        ("own/model", "own/model:draft", 1),
        ("own/model:draft", "plain.json", 0),
        ("own/model/draft", f"own/model:draft/{CONFIG_NAME}", 0),
    ):
        assert runner.invoke(app, ["diff", one, two]).exit_code == code
    result = runner.invoke(app, ["diff", "own/model", "nobody/nothing@v1:a.json"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "nobody/nothing@v1: no a.json in the local Hub cache" in said
    shutil.rmtree("own")
