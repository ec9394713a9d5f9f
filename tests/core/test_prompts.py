# SPDX-License-Identifier: Apache-2.0
"""Prompt files: one prompt a line, whatever it holds; a comment is a line that begins with #."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dit_sparse.cli.prompts import read_prompts
from dit_sparse.core.prompts import read_prompt_file
from dit_sparse.distill.conditions import read_prompts as read_training_prompts
from dit_sparse.errors import PromptsError

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn the text around
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=TURNS), min_size=1)
    .map(str.strip)
    .filter(bool)
)


@given(TEXTS, st.sampled_from(["\n", "\r\n", "\r"]))
@example(["a jersey with #10 on it", "# 1 of 3", "\\# and \\", "\\\\#", "#", "a\u2028b"], "\n")
def test_every_prompt_comes_back_as_it_was_written(tmp_path_factory, prompts, end):
    path = tmp_path_factory.mktemp("p") / "prompts.txt"
    escaped = ["\\" + text if text.lstrip("\\").startswith("#") else text for text in prompts]
    lines = ["# a comment", "  # an indented one", "", *escaped]
    path.write_bytes(end.join(lines).encode())
    assert read_prompt_file(path) == tuple(prompts)


@pytest.mark.parametrize("read", [read_prompts, read_training_prompts])
def test_commands_and_training_read_the_same(tmp_path, read):
    path = tmp_path / "prompts.txt"
    path.write_text("#10\n\\#10\na jersey with #10 on it\na\u2028b\n")
    given_path = str(path) if read is read_prompts else path
    assert list(read(given_path)) == ["#10", "a jersey with #10 on it", "a\u2028b"]


def test_a_form_feed_does_not_end_a_line_and_is_named(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\x0cwith #10\n")
    with pytest.raises(PromptsError, match=r"line 2: control character \\x0c in a prompt"):
        read_prompt_file(path)
