# SPDX-License-Identifier: Apache-2.0
"""The vLLM-Omni plug-in against its contract: the released packages have no dispatcher yet."""

import importlib
import importlib.metadata
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers.models.transformers import transformer_wan

from dit_sparse import GeometryError, Strategy, StrategyError
from dit_sparse.strategy import Rule, Schedule
from tests import tiny

GRID = (3, 4, 6)  # tokens of tiny.wan: 9 frames of 64 x 96 pixels


@pytest.fixture
def plugin(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "samples" / "vllm_omni"))
    sys.modules.pop("dit_sparse_vllm_omni", None)
    return importlib.import_module("dit_sparse_vllm_omni").attention


def dispatch(fn, query, key, value, static, per_forward, scale, mask=None):
    """What vLLM-Omni's dispatcher does with a plug-in: merge params, refuse what it cannot."""
    params = {k: v for k, v in {**static, **per_forward}.items() if v is not None}
    if mask is not None:
        if not fn.capabilities.get("supports_attention_mask"):
            raise ValueError("the plug-in does not advertise 'supports_attention_mask'")
        params["attn_mask"] = mask
    return fn(query, key, value, params, is_causal=False, softmax_scale=scale)


def per_forward(step, total, batch, grid=GRID, patch=(1, 2, 2)):
    """One pass's tensors, as vLLM-Omni makes them: a row for each sample."""
    latent = [n * p for n, p in zip(grid, patch, strict=True)]
    return {
        "denoise_step_idx": torch.full((batch,), step),
        "total_denoise_steps": torch.full((batch,), total),
        "latent_shape": torch.tensor([latent] * batch),
        "patch_size": torch.tensor([patch] * batch),
    }


MIXED = Strategy(
    name="mixed",
    schedule=Schedule(dense_warmup_steps=1),
    rules=(
        Rule(method="gna", params={"window": [1, 3, 3], "tile": [1, 4, 4]}),
        Rule(
            method="svg2", layers=(1,), heads=(0,), params={"query_clusters": 4, "key_clusters": 5}
        ),
        Rule(method="sparsed", layers=(0,), heads=(1,), params={"block_size": 16}),
    ),
)


@pytest.mark.parametrize("strategy", [Strategy.single("dense"), MIXED], ids=lambda s: s.name)
def test_a_generation_is_that_of_diffusers(plugin, monkeypatch, tmp_path, strategy):
    """Every self-attention of a Wan pipeline by way of the contract: the same latents.

    Layers, guidance branches and steps are not told to it by us: it must find them itself.
    """
    pipe, args = tiny.wan()
    tiny.stretch(pipe)
    dense = tiny.run(pipe, args)
    pipe.enable_sparse_attention(strategy)
    wanted = tiny.run(pipe, args)
    pipe.disable_sparse_attention()
    assert torch.equal(wanted, dense) == (strategy is not MIXED)

    strategy.save(tmp_path / "s.json")
    static = {"strategy": str(tmp_path / "s.json"), "num_layers": 2, "num_heads": 2}
    own, calls = transformer_wan.dispatch_attention_fn, []

    def routed(query, key, value, **options):
        if key.shape[1] != query.shape[1]:
            return own(query, key, value, **options)
        step = pipe.scheduler.step_index or 0
        state = per_forward(step, len(pipe.scheduler.timesteps), query.shape[0])
        calls.append(step)
        return dispatch(plugin, query, key, value, static, state, query.shape[-1] ** -0.5)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", routed)
    for _ in range(2):  # the second generation starts where the first ended
        assert torch.equal(tiny.run(pipe, args), wanted)
    assert len(calls) == 2 * tiny.STEPS * 2 * 2
    (session,) = plugin.sessions.values()
    report = session.runtime.report()
    assert report.num_steps == tiny.STEPS
    assert {row["branch"] for row in report.rows} == {"cond", "uncond"}
    # Four and eight steps, as a server gets them.
    steps = tiny.run(pipe, args, num_inference_steps=6)
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", own)
    with_ours = pipe.enable_sparse_attention(strategy)
    assert torch.equal(tiny.run(pipe, args, num_inference_steps=6), steps)
    with_ours.remove()


def inputs(tokens=72, heads=2, batch=1, seed=0):
    return tuple(tiny.normal(batch, tokens, heads, 16, seed=seed + i) for i in range(3))


STATIC = {"strategy": "radial", "num_layers": 2, "num_heads": 2}


def dense(query, key, value, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double()).float()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latent_shape": None}, "grid of tokens"),
        ({"denoise_step_idx": None}, "the step of this call is unknown"),
        (
            {"latent_shape": torch.tensor([[3, 8, 14]])},
            "has 84 tokens, but attention was called with 72",
        ),
        ({"latent_shape": torch.tensor([[3, 8, 12], [6, 4, 12]])}, "grid of tokens"),  # batch of 2
        ({"denoise_step_idx": torch.tensor([0, 1])}, "the step of this call is unknown"),
    ],
)
def test_what_is_not_understood_is_dense_and_says_so(plugin, change, reason):
    batch = max([1] + [v.shape[0] for v in change.values() if v is not None])
    q, k, v = inputs(batch=batch)
    state = {**per_forward(0, 4, batch), **change}
    with pytest.warns(UserWarning, match=reason):
        output = dispatch(plugin, q, k, v, STATIC, state, 0.3)
    torch.testing.assert_close(output, dense(q, k, v, 0.3))
    strict = {**STATIC, "strict": True}
    with pytest.raises(GeometryError, match=reason):
        dispatch(plugin, q, k, v, strict, state, 0.3)


def test_older_geometry_and_text(plugin):
    """Frames and tokens of a frame alone need the row's width; text is counted if it is told."""
    q, k, v = inputs(tokens=72 + 5)
    state = {"denoise_step_idx": 0, "total_denoise_steps": 1}
    told = {**state, "total_latent_frames": 3, "patches_per_frame": 24}
    with pytest.warns(UserWarning, match="grid of tokens of this call is unknown"):
        dispatch(plugin, q, k, v, STATIC, told, 0.3)
    text = {**STATIC, "grid_width": 6, "text_length": 5, "text_first": True, "strict": True}
    one = dispatch(plugin, q, k, v, text, told, 0.3)
    two = dispatch(plugin, q, k, v, text, {**state, **per_forward(0, 1, 1)}, 0.3)
    assert torch.equal(one, two)
    found = [s.runtime.report() for s in plugin.sessions.values()]
    assert [each.grid for each in found] == ["", "3 x 4 x 6 + 5 text"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": None}, ValueError, "needs strategy .str. in its params, got None"),
        ({"num_layers": "2"}, ValueError, "needs num_layers .int. in its params, got '2'"),
        ({"num_heads": 0}, ValueError, "needs num_heads"),
        ({"strategy": "raidal"}, StrategyError, "did you mean radial"),
        ({"attn_mask": torch.ones(1)}, ValueError, "does not take attn_mask"),
    ],
)
def test_bad_configurations(plugin, change, error, message):
    q, k, v = inputs()
    with pytest.raises(error, match=message):
        dispatch(plugin, q, k, v, {**STATIC, **change}, per_forward(0, 4, 1), 0.3)


def test_calls_that_are_no_plain_self_attention(plugin, tmp_path):
    q, k, v = inputs()
    state = {**STATIC, **per_forward(0, 4, 1)}
    with pytest.raises(ValueError, match="72 queries, 9 keys of 2 heads; configure it for the ro"):
        plugin(q, k[:, :9], v[:, :9], state)
    with pytest.raises(ValueError, match="got a causal one"):
        plugin(q, k, v, state, is_causal=True)
    with pytest.raises(ValueError, match="does not advertise"):
        dispatch(plugin, q, k, v, STATIC, state, 0.3, mask=torch.ones(1, 72, dtype=torch.bool))
    rule = Rule(method="radial", stage="transformer_2")
    Strategy(name="two", rules=(rule,)).save(tmp_path / "two.json")
    with pytest.raises(ValueError, match="two has rules for 'transformer_2' alone"):
        plugin(q, k, v, {**state, "strategy": str(tmp_path / "two.json")})
    # Heads split over GPUs: well for a strategy that means them all, refused for another.
    for rule in (
        Rule(method="radial", heads=(3,)),
        Rule(method="sparse_vdit", params={"patterns": ["diagonal", "full"]}),
    ):
        Strategy(name="heads", rules=(rule,)).save(tmp_path / "h.json")
        of_four = {**state, "num_heads": 4, "strategy": str(tmp_path / "h.json")}
        with pytest.raises(
            GeometryError, match="heads has rules for individual heads of 4, but this call has 2"
        ):
            plugin(q, k, v, of_four)
        plugin.sessions.clear()
    plugin(q, k, v, {**state, "num_heads": 4})


def test_a_wrong_count_of_layers_is_found(plugin):
    """Told three layers, or with a call too many, the step's end shows it; then it starts anew."""
    q, k, v = inputs()
    static = {**STATIC, "num_layers": 3}
    for _ in range(4):  # two layers, two branches
        dispatch(plugin, q, k, v, static, per_forward(0, 4, 1), 0.3)
    with pytest.raises(RuntimeError, match=r"step 0 had 4 self-attention calls.*num_layers = 3"):
        dispatch(plugin, q, k, v, static, per_forward(1, 4, 1), 0.3)
    for step in range(2):
        for _ in range(3):
            dispatch(plugin, q, k, v, static, per_forward(step, 4, 1), 0.3)
    (session,) = plugin.sessions.values()
    assert [row["layer"] for row in session.runtime.report().rows] == [0, 1, 2] * 2
    # A generation that was stopped within step 1: the next one begins at step 0, and is well.
    dispatch(plugin, q, k, v, static, per_forward(1, 4, 1), 0.3)
    dispatch(plugin, q, k, v, static, per_forward(0, 4, 1), 0.3)
    assert [row["layer"] for row in session.runtime.report().rows] == [0]


def test_it_is_called_once_for_each_call_when_compiled(plugin):
    """The plug-in counts, so a compiled program must leave its graph for it."""
    q, k, v = inputs()
    state = {**STATIC, **per_forward(0, 4, 1)}

    def program(x):
        return plugin(x * 2, k, v, state, softmax_scale=0.3) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(program, backend="eager")
        outputs = [compiled(q) for _ in range(4)]
    (session,) = plugin.sessions.values()
    places = [(row["layer"], row["branch"]) for row in session.runtime.report().rows]
    assert places == [(0, "cond"), (1, "cond"), (0, "uncond"), (1, "uncond")]
    assert all(torch.equal(each, outputs[0]) for each in outputs)


def test_installed_it_is_found_by_its_entry_point(root, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "to")]
    source = tmp_path / "from"  # a build writes beside its source
    source.mkdir()
    for name in ("pyproject.toml", "dit_sparse_vllm_omni.py"):
        (source / name).write_bytes((root / "samples" / "vllm_omni" / name).read_bytes())
    subprocess.run([*command, str(source)], check=True)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "to")])
    points = found.entry_points.select(group="vllm_omni.sparse_attn")
    assert [(each.name, each.value) for each in points] == [
        ("dit_sparse", "dit_sparse_vllm_omni:attention")
    ]
    assert (tmp_path / "to" / "dit_sparse_vllm_omni.py").is_file()
