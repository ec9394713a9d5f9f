# SPDX-License-Identifier: Apache-2.0
"""``dit-sparse profile`` on a real small model: what it writes, what it says, how it refuses."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.cli.prompts import PROMPTS, read_prompts
from dit_sparse.strategy import Strategy

SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "4", "--threads", "1"]
FAST = ["--candidates", "pooled:density=0.25:block_size=16,radial:block_size=16:sink=false",
        "--bands", "2", "--costs", "assumed", "--device", "cpu"]  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *[str(each) for each in arguments]])


def refused(result, *words):
    """One line on stderr, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "error: " in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="module")
def wan(root):
    return root / "samples" / "wan-tiny"


@pytest.fixture(scope="module")
def made(wan, tmp_path_factory):
    """One search; its folder stays for the tests that go on from it."""
    folder = tmp_path_factory.mktemp("profile")
    prompts = folder / "prompts.txt"
    first = "a big red circle moving right over a gray plain background"
    second = "a big blue square moving up over a navy plain background"
    prompts.write_text(f"# two\n{first}\n\n  # below\n{second}\n")
    result = run(wan, "--prompts", prompts, "-o", folder / "s.json", "--target", "0.8",
                 *FAST, *SMALL)  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, result


def test_a_strategy_is_written_and_told(made):
    folder, result = made
    strategy = Strategy.load(folder / "s.json")
    assert strategy.name == "s"
    assert strategy.rules
    assert len(strategy.receipt.prompts) == 2
    assert strategy.receipt.prompts[1].endswith("navy plain background")
    assert strategy.receipt.command.startswith("dit-sparse profile wan-tiny --prompts prompts.txt")
    assert " --sample auto --shortlist 18 --sequential none " in strategy.receipt.command
    assert str(folder) not in (folder / "s.json").read_text()
    assert "measured attention speedup" in result.stdout
    assert "relative error" in result.stdout
    kept = {path.name for path in (folder / "s.measured").iterdir()}
    assert {"setup.json", "unit-00000.json", "unit-00001.json"} <= kept


def test_another_target_needs_no_measuring(made, wan):
    folder, _ = made
    before = (folder / "s.measured" / "unit-00000.json").stat().st_mtime_ns
    again = run(wan, "--prompts", folder / "prompts.txt", "-o", folder / "s.json", "--overwrite",
                "--target", "0", "--no-check", *FAST, *SMALL)  # fmt: skip
    assert again.exit_code == 0, again.output
    assert Strategy.load(folder / "s.json").rules == ()
    assert "Everything stays dense" in again.stdout
    assert (folder / "s.measured" / "unit-00000.json").stat().st_mtime_ns == before


def test_other_settings_need_a_fresh_start(made, wan):
    folder, _ = made
    before = (folder / "s.json").read_bytes()
    other = run(wan, "--prompts", "1", "-o", folder / "s.json", "--overwrite", *FAST, *SMALL)
    refused(other, "calls: 2 entries, now 1", "add --fresh")
    assert (folder / "s.json").read_bytes() == before


def test_an_existing_output_is_kept(wan, tmp_path):
    output = tmp_path / "s.json"
    output.write_text("mine")
    refused(run(wan, "--prompts", "1", "-o", output, *FAST, *SMALL), "already exists")
    assert output.read_text() == "mine"
    # A search that fails half-way leaves it whole, too.
    refused(run(tmp_path / "nowhere", "--prompts", "1", "-o", output, "--overwrite", *FAST),
            "nowhere")  # fmt: skip
    assert output.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompts", "0"], "1 to 8"),
        (["--prompts", "9"], "1 to 8"),
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["--prompts", "."], "cannot be read"),
        (["--prompts", "1", "--target", "2"], "target must be"),
        (["--prompts", "1", "--target", "-1"], "target must be"),
        (["--prompts", "1", "--target", "nan"], "target must be"),
        (["--prompts", "1", "--target", "1e999"], "target must be"),
        (["--prompts", "1", "--budget", "0"], "budget must be"),
        (["--prompts", "1", "--target", "0.1", "--budget", "0.5"], "cannot be combined"),
        (["--prompts", "1", "--candidates", "radail"], "unknown method or preset"),
        (["--prompts", "1", "--candidates", ""], "comma-separated methods"),
        (["--prompts", "1", "--bands", "0"], "ascending fractions"),
        (["--prompts", "1", "--bands", "0,0.5"], "ascending fractions"),
        (["--prompts", "1", "--bands", "a,b"], "--bands"),
        (["--prompts", "1", "--bands", "nan"], "ascending fractions"),
        (["--prompts", "1", "--seeds", "a"], "--seeds"),
        (["--prompts", "1", "--lambda", "-1"], "lambda"),
        (["--prompts", "1", "--sample", "some"], "--sample"),
        (["--prompts", "1", "--density", "2"], "density must be"),
    ],
)
def test_bad_input_is_one_line(wan, tmp_path, more, words):
    refused(run(wan, "-o", tmp_path / "s.json", *more), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"), [("s.txt", ".json"), ("no/s.json", "does not exist"), ("", "")]
)
def test_bad_outputs(wan, tmp_path, name, words):
    folder = tmp_path / "a.json"
    folder.mkdir()
    output = tmp_path / name if name else folder
    refused(run(wan, "--prompts", "1", "-o", output), words or "is a folder")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "contains no prompts"), (b"# only this\n \n", "contains no prompts"),
     (b"\xff\xfe\x00abc", "not UTF-8"), (b"a\x00b", "line 1: control character")],
)  # fmt: skip
def test_bad_prompt_files(wan, tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    refused(run(wan, "--prompts", path, "-o", tmp_path / "s.json"), words)


def test_bad_models(wan, tmp_path):
    refused(run(tmp_path, "--prompts", "1", "-o", tmp_path / "s.json"), "model_index.json")
    odd = tmp_path / "odd"
    shutil.copytree(wan, odd)
    config = json.loads((odd / "model_index.json").read_text())
    config["transformer"] = [None, None]
    (odd / "model_index.json").write_text(json.dumps(config))
    shutil.rmtree(odd / "transformer")
    refused(run(odd, "--prompts", "1", "-o", tmp_path / "s.json", *FAST, *SMALL), "transformer")
    assert not (tmp_path / "s.json").exists()


def test_a_forecast_needs_no_weights_and_no_output(wan, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(wan / name, tmp_path / name)
    more = ["--height", "128", "--width", "128", "--frames", "33", "--dry-run"]
    result = run(tmp_path, "--prompts", "3", "--seeds", "0,1", "--steps", "20", *more,
                 "--candidates", "quick,rettention", "--shortlist", "0",
                 "--state-limit", "0.001")  # fmt: skip
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "20 steps of 2 passes" in told
    assert "for 6 prompts x seeds" in told
    assert "measure 21 candidates on 36 calls" in told  # 6 layers, 3 bands, 2 captures
    assert "600 TFLOP/s in attention" in told
    assert "--candidates quick,rettention,-rettention" in told
    one = run(tmp_path, "--prompts", "1", "--guidance-scale", "1", *more)
    assert "steps of 1 passes" in " ".join(one.stdout.split())
    assert not list(tmp_path.glob("*.measured"))
    refused(run(tmp_path, "--prompts", "3", "--dry-run", "--sample", "1"), "--sample '1'")
    refused(run("nowhere", "--prompts", "3", "--dry-run"), "nowhere")
    refused(run(tmp_path, "--prompts", "3"), "-o is missing")


def test_prompts_are_read(tmp_path):
    assert read_prompts("2") == PROMPTS[:2]
    path = tmp_path / "p.txt"
    path.write_text("\ufeffone\r\n# no\r\ntwo # too\r\n", encoding="utf-8")
    assert read_prompts(str(path)) == ("one", "two # too")
