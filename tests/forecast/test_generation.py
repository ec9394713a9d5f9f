# SPDX-License-Identifier: Apache-2.0
"""Forecasts, against published cases, naive arithmetic, and what methods really remember."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.core.grid import LatentsGrid
from dit_sparse.core.sizes import nbytes
from dit_sparse.forecast.generation import (
    attention_share,
    better_size,
    expected_gain,
    forecast,
    forecast_method,
)
from dit_sparse.methods import METHODS, method_class
from dit_sparse.methods.params import build_method, param_names
from dit_sparse.pipelines import family_by_name
from dit_sparse.pipelines.known import known_model
from dit_sparse.pipelines.size import ModelSize, model_size
from dit_sparse.strategy import Strategy
from tests.methods.naive import NaiveOps, make_call, run


def size_of(name):
    model = known_model(name)
    return model_size(model.config, model.height, model.width, model.num_frames)


def small_size(grid=None, heads=2, head_dim=8):
    grid = LatentsGrid(3, 4, 6, 5) if grid is None else grid
    family = family_by_name("HunyuanVideoTransformer3DModel")
    return ModelSize(
        "HunyuanVideoTransformer3DModel", family, grid, 2, heads, head_dim, 0, 1.0, 1.0
    )


@pytest.mark.parametrize(("name", "gain"), [("hunyuan-video", 2.3), ("wan2.1-14b", 1.9)])
def test_the_published_case(name, gain):
    """Density 0.25, kernel efficiency 0.9, 10 % dense steps: SVG2 reports 2.30 and 1.89."""
    told = forecast(size_of(name), density=0.25, efficiency=0.9)
    assert told.gain == pytest.approx(gain, rel=0.02)
    assert told.worth_it
    assert not told.warnings


@pytest.mark.parametrize("name", ["flux.1-dev", "pixart-sigma"])
def test_a_picture_of_1024_pixels_is_said_not_to_be_worth_it(name):
    told = forecast(size_of(name))
    assert not told.worth_it
    assert "not worth it here" in told.warnings[0]


@given(
    st.floats(0.01, 0.99), st.floats(0, 1), st.floats(0.01, 1), st.floats(0.1, 1.5),
    st.integers(1, 1000),
)  # fmt: skip
def test_gain_is_amdahls_law(share, sparse_share, density, efficiency, calls):
    """Played call by call."""
    sparse = round(calls * sparse_share)
    times = [density / efficiency] * sparse + [1.0] * (calls - sparse)
    total = (1 - share) * calls + share * sum(times)
    found = expected_gain(share, sparse / calls, density, efficiency)
    assert found == pytest.approx(calls / total)
    assert found <= 1 / (1 - share) + 1e-9


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_memory_without_data_is_what_is_remembered_with_data(name):
    """The state of a played generation, sizes only, equals that of a real one."""
    params = {"block_size": 8} if "block_size" in param_names(name) else {}
    method = build_method(name, params)
    size = small_size()
    told = forecast_method(name, method, size, 10)
    state, shared, peak = {}, {}, 0
    ops = NaiveOps()
    for step in range(10):
        call = make_call(
            size.grid,
            step,
            1,
            2,
            step=step,
            num_steps=10,
            state=state,
            shared=shared,
            num_layers=2,
        )
        call.query, call.key, call.value = (
            x.bfloat16() for x in (call.query, call.key, call.value)
        )
        run(method, call, Rounded(ops))
        peak = max(peak, nbytes(state))
    if "lists" in state:
        # On the CPU lists are cut to their longest row; elsewhere that would wait for the device.
        assert told.state_bytes >= peak
    else:
        assert told.state_bytes == peak
    assert (told.state_bytes > 0) == (peak > 0)


class Rounded:
    """Operations in float64 with results as a kernel gives them."""

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name):
        return getattr(self.ops, name)

    def attend(self, query, *rest):
        output, lse = self.ops.attend(query, *rest)
        return output.to(query.dtype), lse.float()

    def block_mass(self, *call):
        return self.ops.block_mass(*call).float()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense"}))
def test_only_what_reads_no_content_is_counted_exactly(name):
    method = build_method(name, {})
    told = forecast_method(name, method, small_size(), 10)
    assert told.exact == (method.inner or method).static
    assert told.density is None or 0 < told.density <= 1


@pytest.mark.parametrize("name", sorted(name for name in METHODS if method_class(name).static))
def test_counted_density_is_that_of_the_plan(name):
    params = {"block_size": 8} if "block_size" in param_names(name) else {}
    method = build_method(name, params)
    size = small_size()
    plan = method.plan(make_call(size.grid, num_layers=2), NaiveOps())
    told = forecast_method(name, method, size, 10)
    assert told.density == pytest.approx(float(plan.density().mean()))


def test_density_that_params_ask_for_counts_text_whole():
    told = forecast_method("pooled", build_method("pooled", {"density": 0.5}), small_size(), 10)
    assert told.density == pytest.approx((0.5 * 72**2 + 2 * 72 * 5 + 5**2) / 77**2)
    top_p = build_method("pooled", {"select": "top_p"})
    assert forecast_method("pooled", top_p, small_size(), 10).density is None


def test_schedule_and_rules_decide_the_sparse_share():
    strategy = Strategy.single("radial", dense_warmup_steps=2, dense_layers=[0])
    told = forecast(small_size(), strategy, num_steps=10)
    assert told.sparse_share == pytest.approx(8 / 10 * 1 / 2)
    told = forecast(small_size(), Strategy.single("radial", dense_warmup_steps=10), num_steps=10)
    assert told.sparse_share == 0
    assert "nothing would be sparse" in told.warnings[-1]
    assert told.gain == pytest.approx(1)


def test_better_sizes_are_whole_blocks():
    wan = size_of("wan2.1-14b")
    height, width = better_size(wan, 720, 1280)
    assert (height // 16) * (width // 16) % 128 == 0
    assert (height, width) == (768, 1280)
    assert better_size(size_of("flux.1-dev"), 1024, 1024) is None


def test_share_is_by_time():
    size = small_size()
    assert attention_share(size) == pytest.approx((1 / 600) / (1 / 600 + 1 / 650))


def cli(*args):
    return CliRunner().invoke(app, ["forecast", *map(str, args)], env={"COLUMNS": "120"})


def test_command_line(tmp_path):
    result = cli("wan2.1-14b", "--strategy", "radial", "-o", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert "expected speed-up" in result.stdout
    told = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert told["size"]["grid"]["frames"] == 21
    assert told["worth_it"] is True
    result = cli("samples/wan-tiny", "--strategy", "wan-tiny.adaspa")
    assert "2,304 (9 x 16 x 16)" in result.stdout
    assert "not worth it here" in result.stdout


def test_every_method_at_a_published_size(tmp_path):
    result = cli("hunyuan-video", "--all-methods", "-o", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["methods"]
    assert {row["method"] for row in told} == set(METHODS) - {"dense"}
    by_name = {row["method"]: row for row in told}
    # The residual of all video tokens in bf16, and a ratio in fp32 for each.
    video = 33 * 45 * 80
    wanted = video * 24 * (128 * 2 + 4)
    assert by_name["rettention"]["state_bytes"] == pytest.approx(wanted, rel=0.02)
    # Centroids in bf16 of 24 heads, queries and keys.
    assert by_name["svg2"]["state_bytes"] < 24 * 2 * 2000 * 128 * 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sora"], "unknown model name 'sora'"),
        (["wan2.1-14b", "--height", "721"], "does not match the latent grid"),
        (["wan2.1-14b", "--strategy", "nothing"], "nothing"),
        (["flux.1-dev", "--strategy", "wan2.1-14b.720p.svg"], "made for WanTransformer3DModel"),
        (["wan2.1-14b", "--bench", "README.md"], "not a file written by dit-sparse bench"),
        (["wan2.1-14b", "--bench", "README.md", "--efficiency", "1"], "use one of them"),
        (["wan2.1-14b", "-o", "."], "must be a file name"),
        (["wan2.1-14b", "--all-methods", "--strategy", "radial"], "use one of them"),
    ],
)
def test_bad_requests_are_refused(args, words):
    result = cli(*args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
