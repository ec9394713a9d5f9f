# SPDX-License-Identifier: Apache-2.0
"""The script for the first minutes on a GPU: nothing that fails or hangs takes the rest along."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.triton import first_gpu as first


@pytest.fixture
def results(tmp_path):
    return first.Results(tmp_path / "first.json", 60.0)


def test_a_case_that_hangs_or_fails_is_told(tmp_path):
    hung = first.in_a_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert hung["passed"] is False
    assert hung["message"] == "killed after 0 s"
    assert hung["seconds"] < 10
    failed = first.in_a_process([sys.executable, "-c", "raise SystemExit('output is off')"], 30)
    assert failed["passed"] is False
    assert failed["message"] == "output is off"
    assert first.in_a_process([sys.executable, "-c", "pass"], 30)["passed"] is True


def test_every_kernel_has_cases():
    names = set(first.cases(first.REAL, rehearse=False))
    assert {"plan/bfloat16/128/everything", "kmeans/float16/64", "real/hopper"} <= names
    assert {f"property/{name}" for name in first.PROPERTIES} <= names


def test_a_wrong_kernel_fails_its_case(monkeypatch):
    assert first.run_case("plan/float32/16/whole", "cpu") is None

    def wrong(*args, **kwargs):
        output, lse = attend(*args, **kwargs)
        return 1.01 * output, lse

    attend = first.kernel.attend
    monkeypatch.setattr(first, "kernel", SimpleNamespace(attend=wrong))
    assert "output differs" in first.run_case("plan/float32/16/whole", "cpu")


def test_a_call_that_raises_leaves_the_other_times(results, monkeypatch):
    def broken():
        raise RuntimeError("out of resource")

    calls = {"broken": (broken, 1.0), "good": (lambda: torch.ones(1), 0.5)}
    monkeypatch.setattr(first, "timed_calls", lambda *_: calls)
    first.time_all(results, first.TINY, until=0.0)
    told = json.loads(results.path.read_text())["times"]
    assert told["256 tokens, broken"] == {"density": 1.0, "fault": "out of resource"}
    assert told["256 tokens, good"]["ms"] > 0


def test_what_time_does_not_reach_is_told(results, monkeypatch):
    monkeypatch.setattr(first, "cases", lambda *_, **__: {"late": [sys.executable, "-c", "pass"]})
    first.check_all(results, first.TINY, rehearse=True, until=59.9)
    told = json.loads(results.path.read_text())["cases"]
    assert told == {"late": {"passed": None, "seconds": 0.0, "message": "no time left"}}
