# SPDX-License-Identifier: Apache-2.0
"""Every code block of the documentation runs, is parsed as far as it can be, or says why not.

Python blocks run page by page, in order, as a reader would run them, on the small model that they
name; generations are made small. Shell blocks are parsed by the real command line; cheap ones run.
"""

import functools
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from dit_sparse import Strategy
from dit_sparse.cli import app
from tests.docs.blocks import blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "samples").glob("*/README.md"),
    )
)
BLOCKS = {page: blocks(page, (ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
# Pages that say themselves what they need, and why it is not here.
ELSEWHERE = {
    "docs/several-gpus.md": "several GPUs; its processes are tests/parallel's",
    "docs/models.md": "a form to fill in, with an ellipsis; how-to/other-programs.md runs it",
}
SLOW = {"docs/profiler.md", "docs/how-to/combine.md"}
PIPELINES = (
    "WanPipeline",
    "HunyuanVideoPipeline",
    "CogVideoXPipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
)
SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}


def pages_with(language):
    found = [page for page in PAGES if any(b.language == language for b in BLOCKS[page])]
    return [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in found]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what pages take for granted: the samples, some strategies."""
    monkeypatch.chdir(tmp_path)
    Path("samples").symlink_to(ROOT / "samples")
    for name, method in (("mine", "radial"), ("yours", "gna")):
        Strategy.single(method, name=name).save(f"{name}.json")
    return tmp_path


def small_pipelines(monkeypatch):
    """Make every generation small, and compile without a compiler; give the small Wan."""
    import diffusers

    def shrink(call):
        takes = inspect.signature(call).parameters
        sizes = {key: value for key, value in SMALL.items() if key in takes}

        @functools.wraps(call)
        def small(self, *args, **options):
            return call(self, *args, **{**options, **sizes})

        return small

    for name in PIPELINES:
        kind = getattr(diffusers, name)
        monkeypatch.setattr(kind, "__call__", shrink(kind.__call__))
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiler(*args, **options, backend="eager")
    )
    return diffusers.WanPipeline.from_pretrained(ROOT / "samples" / "wan-tiny")


def adapter(pipe, folder):
    """Save a LoRA for a pipeline, as a person would have one."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers)
    pipe.transformer.delete_adapters("default")


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, desk, monkeypatch, capsys):
    if page in ELSEWHERE:
        pytest.skip(f"not run: {ELSEWHERE[page]}")
    pipe = small_pipelines(monkeypatch)
    clip = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    names = {
        "pipe": pipe,
        "prompt": "a red circle moving right",
        "prompts": ["a red circle moving right"],
        "dense_frames": clip,
        "sparse_frames": clip // 2,
    }
    if "load_lora_weights" in (ROOT / page).read_text(encoding="utf-8"):
        adapter(pipe, desk / "my-lora")
        # Before 0.40 diffusers does not look into a folder for the file's name offline.
        monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    for block in BLOCKS[page]:
        if block.language == "python" and block.reason is None:
            # Line numbers of the page, in what a failure shows.
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(ROOT / page), "exec"), names)
    capsys.readouterr()


@pytest.mark.parametrize("page", pages_with("python"))
def test_blocks_that_are_not_run_are_python_all_the_same(page):
    for block in BLOCKS[page]:
        if block.language == "python" and block.reason is not None:
            compile(block.text, str(block), "exec")


def commands(block):
    """Give the commands of a shell block as words, variables put in, comments left out."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    variables = {}
    for line in text.splitlines():
        set_one = re.fullmatch(r'([A-Z]+)="(.*)"', line.strip())
        if set_one:
            variables[set_one[1]] = set_one[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)  # noqa: PLW2901
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def parse(words):
    """Read a ``dit-sparse`` command as it would be read, without running it."""
    command, context = get_command(app), None
    while True:
        context = command.make_context("dit-sparse", list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return context
        _, command, words = command.resolve_command(context, rest)


def script(words, folder):
    """Check that what ``python`` is told to run is there."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, f"no module {module}"
        return
    (path,) = [word for word in words if word.endswith(".py")][:1]
    there = (ROOT / path).is_file() or (folder / path).is_file()
    assert there or path.startswith("my_"), f"no script {path}"


CHEAP = {"diff", "methods"}


@pytest.mark.parametrize("page", pages_with("shell"))
def test_shell_blocks_are_what_the_commands_take(page, desk):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    for block in BLOCKS[page]:
        if block.language != "shell":
            continue
        for words in commands(block):
            first, *rest = words
            try:
                if first == "dit-sparse":
                    parse(rest)
                    runs = rest[0] in CHEAP or rest[:2] == ["forecast", "samples/wan-tiny"]
                    if runs and block.reason is None:
                        result = CliRunner().invoke(app, rest)
                        assert result.exit_code in {0, 1}, result.output
                elif first == "make":
                    assert rest[0] in targets, f"make has no {rest[0]}"
                elif first in {"python", "accelerate", "torchrun"}:
                    script(rest, (ROOT / page).parent)
                elif first == "sh":
                    assert ((ROOT / page).parent / rest[0]).is_file(), f"no script {rest[0]}"
                else:
                    assert first in {"pip", "git", "cd", "cp"}, f"unknown command {first}"
            except BaseException as error:
                raise AssertionError(f"{block}: {' '.join(words)}: {error!r}") from error


def test_other_blocks_are_of_known_kinds():
    """Data is read by what would read it; nothing else stands in a block."""
    for page in PAGES:
        for block in BLOCKS[page]:
            if block.language == "json":
                json.loads(block.text)
            elif block.language == "yaml":
                assert isinstance(yaml.safe_load(block.text), dict), str(block)
            elif block.language == "toml":
                assert tomllib.loads(block.text), str(block)
            else:
                assert block.language in {"python", "shell"}, f"{block}: {block.language}"


def test_blocks_are_found():
    """The finder itself: fences, indented blocks of both kinds, lists, and a reason."""
    text = (
        "Text.\n\n    dit-sparse diff a b\n\n    import x\n\n    x.y()\n\nMore:\n\n"
        "- an item\n\n    goes on\n\n```python\n# Not run: it needs a GPU here.\nz()\n```\n"
        "```sh\nmake test\n```\n::: some.module\n    options:\n"
    )
    found = blocks("p.md", text)
    assert [(b.line, b.language, b.text) for b in found] == [
        (3, "shell", "dit-sparse diff a b"),
        (5, "python", "import x\n\nx.y()"),
        (16, "python", "# Not run: it needs a GPU here.\nz()"),
        (20, "shell", "make test"),
    ]
    assert [b.reason is None for b in found] == [True, True, False, True]
    assert len(PAGES) > 20
    assert sum(map(len, BLOCKS.values())) > 30


@pytest.mark.parametrize(
    "words", ["generate --nothing 1", "nothing", "diff", "bench --device tpu", "retile --frames x"]
)
def test_wrong_commands_are_found(words):
    with pytest.raises(
        BaseException, match=r"(?i)no such|missing|not one of|not a valid|valid int"
    ):
        parse(words.split())
