# SPDX-License-Identifier: Apache-2.0
"""What people read: phrases that must not come back, and errors with all their parts.

An error has four parts: what was wanted, what came, where, and what to do.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app

ROOT = Path(__file__).parents[2]
# Other people's words for these are in the style guide and docs/glossary.md.
PHRASES = (
    r"\bby name only\b",
    r"\bstands twice\b",
    r"\bis there already\b",
    r"\bis there twice\b",
    r"\bare no good\b",
    r"\bis no JSON\b",
    r": no such (file|folder)\b",
    r"\bwas wanted\b",
    r"\bis wanted\b",
    r"\bcut short\b",
    r"\bfarther off\b",
    r"\btoo far off\b",
    r"\bcomputed anew\b",
    r"\bSay it and\b",
    r"\bmay be given several times\b",
    r"\breplaced if it is there\b",
    r"\bwhere there is one\b",
    r"\bfor people only\b",
    r"\bbeside the prompt\b",
    r"\bCostly rows\b",
    r"\bthe same command goes on\b",
    r"\bby its own receipt\b",
    r"\bnobody would know\b",
    r"\bof your own loop\b",
    r"\bthe machine was busy with other things\b",
    r"\bis no (Diffusers|model's|pipeline's)\b",
    r"\bwhat was not seen\b",
    r"\bleads out of\b",
    r"\btaken over: ",
    r"\btells how many\b",
    r"\bunder this wish\b",
    r"\bTell the time\b",
    r"\bforbids to\b",
)
FORBIDDEN = re.compile("|".join(PHRASES), re.IGNORECASE)
# Pages and folders that are still to be rewritten: take them out as they are done.
LATER = ("docs/benchmarks/",)


JOINT = re.compile(r"""["']\n\s*f?["']""")  # between two pieces of one string
CUT = re.compile(r"""^ +(?:return|[\w. ]+=) (.*["'])\n +f?["'](?!["']).*["']$""", re.MULTILINE)


def strings(source):
    """Strings of a module that are not docstrings, with the line of each."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            docs |= {id(part.value) for part in body if isinstance(part, ast.Expr)}
        if isinstance(node, ast.JoinedStr):
            parts = (part.value for part in node.values if isinstance(part, ast.Constant))
            yield node.lineno, "x".join(parts)
        elif isinstance(getattr(node, "value", None), str) and id(node) not in docs:
            yield node.lineno, node.value


def test_homely_phrases_do_not_come_back():
    found = []
    pages = [ROOT / "README.md"]
    pages += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "samples").rglob("*.md")]
    for path in sorted([*pages, *(ROOT / "dit_sparse").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        if name.startswith(LATER) or not FORBIDDEN.search(JOINT.sub("", text)):
            continue  # most modules need not be parsed
        texts = strings(text) if path.suffix == ".py" else enumerate(text.splitlines(), 1)
        found += [f"{name}:{line}: {hit[0]}" for line, t in texts if (hit := FORBIDDEN.search(t))]
    assert not found


def test_no_string_is_cut_into_two_statements():
    """A second line without parentheses is a statement of its own, and its words are lost."""
    lost = [
        f"{path.relative_to(ROOT).as_posix()}: {hit[0]}"
        for path in (ROOT / "dit_sparse").rglob("*.py")
        for hit in CUT.finditer(path.read_text(encoding="utf-8"))
        if hit[1].count("(") == hit[1].count(")")
    ]
    assert not lost


# Command line -> where, what came, and what was wanted or what to do.
BAD = [
    ("forecast wan2.1-14b -o .", "-o .", "existing folder"),
    ("forecast sora", "'sora'", "known names: ", "wan2.1-14b"),
    ("forecast wan2.1-14b --bench pyproject.toml", "--bench", "dit-sparse bench"),
    ("forecast wan2.1-14b --bench x --efficiency 1", "--efficiency and --bench", "use one"),
    ("inspect radiall --grid 3x4x5 -o x.png", "radiall", "did you mean", "radial"),
    ("forecast samples", "samples", "model_index.json is missing"),
    ("methods radiall", "'radiall'", "available methods: ", "radial"),
    ("methods --json", "--json", "requires --models"),
    ("methods nowhere --models", "'nowhere'", "dit-sparse methods --models"),
    ("bench --shape 8x8", "shape '8x8'", "matches 0", "FRAMESxHEIGHTxWIDTHxHEADSxHEAD_DIM"),
    ("bench --kernel fast", "'fast'"),
    ("inspect radial --grid 3x4 -o x.png", "--grid '3x4'", "must be FRAMESxHEIGHTxWIDTH"),
    ("inspect radial -o x.gif", "-o x.gif", "must be a .html file, a .png file or a folder"),
    ("inspect -o x.png", "nothing to inspect", "give a strategy"),
    ("inspect radial --model x --grid 3x4x5 -o x.png", "--model and --grid", "--prompt"),
    ("retile radial --height 64 -o x.txt", "-o x.txt", "must be a .json file"),
    ("retile radial -o x.json", "new size is missing", "--height"),
    ("profile samples/wan-tiny --prompts 99 -o x.json", "--prompts 99", "must be from 1 to"),
    ("profile samples/wan-tiny --prompts 1", "-o is missing", "e.g. -o mine.json"),
    ("profile samples/wan-tiny --prompts 1 --seeds 1,x -o x.json", "--seeds '1,x'", "integers"),
    ("diff mine.json radial", "mine.json", "file not found"),
    ("compare a.mp4 b.mp4 -o out --gate psnr>25", "'psnr>25'", "must be METRIC>=NUMBER"),
]


@cache
def said(command):
    result = CliRunner().invoke(app, command.split())
    return result.exit_code, " ".join(result.stderr.split())


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[0])
def test_an_error_says_what_was_wanted_what_came_where_and_what_to_do(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, text = said(row[0])
    assert code == 2, text
    for part in row[1:]:
        assert part in text
