# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI node against ComfyUI's seams: it is no package, so a small model stands in."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch import nn

from dit_sparse import GeometryError, LatentsGrid, Strategy, StrategyError
from dit_sparse.core.call import AttentionCall
from dit_sparse.kernels import reference
from dit_sparse.kernels.dispatch import Backends
from dit_sparse.strategy import Model, Rule, Schedule
from tests import tiny

GRID = LatentsGrid(3, 4, 6)
HEADS, WIDTH, LAYERS, STEPS = 2, 16, 2, 4


@pytest.fixture
def comfy(root):
    folder = root / "samples" / "comfyui"
    spec = importlib.util.spec_from_file_location("dit_sparse_comfyui", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dit_sparse_comfyui"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["dit_sparse_comfyui"]


def replaceable(function):
    """An attention function that gives way to the override in its options, once."""

    @functools.wraps(function)
    def outer(*args, **kwargs):
        if "_inside" in kwargs:
            return function(*args, **kwargs)
        kwargs["_inside"] = True
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        return (
            function(*args, **kwargs) if override is None else override(function, *args, **kwargs)
        )

    return outer


@replaceable
def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
              skip_output_reshape=False, **kwargs):  # fmt: skip
    """Dense attention in float64; inputs ``[b, n, heads * d]`` or, not reshaped, heads first."""
    q, k, v = (x if skip_reshape else x.unflatten(-1, (heads, -1)).transpose(1, 2)
               for x in (q, k, v))  # fmt: skip
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    out = (scores.softmax(-1) @ v.double()).to(q.dtype)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, head_first=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.head_first = head_first

    def forward(self, x, freqs, context=None, transformer_options=None):
        own = x if context is None else context
        q, k, v = 4 * self.q(x), self.k(own), self.v(own)
        if self.head_first:
            q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
            out = attention(q, k, v, HEADS, None, None, True, skip_output_reshape=True,
                            transformer_options=transformer_options)  # fmt: skip
            return out.transpose(1, 2).flatten(2)
        return attention(q, k, v, heads=HEADS, transformer_options=transformer_options)


class Block(nn.Module):
    def __init__(self, head_first):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(head_first), Attention()

    def forward(self, x, context, transformer_options):
        x = x + self.self_attn(x, None, transformer_options=transformer_options)
        return x + self.cross_attn(x, None, context, transformer_options=transformer_options)


class WanModel(nn.Module):
    """The shape of ComfyUI's: layers with self- and cross-attention, options handed down."""

    def __init__(self, head_first=False):
        super().__init__()
        torch.manual_seed(1)
        self.num_heads = HEADS
        self.blocks = nn.ModuleList(Block(head_first) for _ in range(LAYERS))

    def forward(self, x, context, transformer_options):
        transformer_options["grid_sizes"] = torch.Size((GRID.frames, GRID.height, GRID.width))
        for block in self.blocks:
            x = block(x, context, transformer_options)
        return x


class Patcher:
    """The part of ComfyUI's model patcher that the node uses; patches hold while it runs."""

    def __init__(self, model):
        self.model, self.model_options, self.patches = model, {"transformer_options": {}}, {}

    def clone(self):
        copy = Patcher(self.model)
        copy.model_options = {k: dict(v) for k, v in self.model_options.items()}
        copy.patches = dict(self.patches)
        return copy

    def _find(self, path):
        where, _, name = path.removeprefix("diffusion_model").removeprefix(".").rpartition(".")
        return (self.model.get_submodule(where) if where else self.model), name

    def get_model_object(self, path):
        owner, name = self._find(path)
        return self.patches.get(path, getattr(owner, name) if name else self.model)

    def add_object_patch(self, path, patch):
        self.patches[path] = patch

    @torch.no_grad()
    def run(
        self, *, halves=(0, 1), sigmas=None, seed=0, context=9, tokens=GRID.tokens, steps=None
    ):
        """Sample: every step in one batch (conditions as in ``halves``), one sigma a step."""
        schedule = torch.linspace(1.0, 0.0, STEPS + 1) if sigmas is None else sigmas
        x = tiny.normal(len(halves), tokens, HEADS * WIDTH, seed=seed)
        told = tiny.normal(len(halves), context, HEADS * WIDTH, seed=seed + 1)
        for path, patch in self.patches.items():
            owner, name = self._find(path)
            setattr(owner, name, patch)
        try:
            for sigma in schedule[:-1] if steps is None else steps:
                options = {
                    **self.model_options["transformer_options"],
                    "sample_sigmas": schedule,
                    "sigmas": sigma.expand(len(halves)),
                    "cond_or_uncond": list(halves),
                }
                x = x - 0.1 * self.model(x, told, options)
            return x
        finally:
            for path in self.patches:
                owner, name = self._find(path)
                delattr(owner, name)


STRATEGY = Strategy(
    name="mixed",
    model=Model(classes=("WanTransformer3DModel",)),
    schedule=Schedule(dense_warmup_steps=1),
    rules=(
        Rule(method="gna", layers=(1,), params={"window": [1, 3, 3], "tile": [1, 4, 4]}),
        Rule(method="sparsed", layers=(0,), heads=(1,), params={"block_size": 16}),
    ),
)


class Oracle:
    """Set in the override's place: the strategy above, spelled out with the methods' own plans.

    Knows layers by counting self-attention (more keys than text), steps by counting layers.
    """

    def __init__(self, skip=0, total=STEPS):
        self.calls, self.state, self.ops, self.total = skip * LAYERS, {}, Backends(), total

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        if k.shape[-2] != q.shape[-2]:
            return func(q, k, v, heads, *args, **kwargs)
        layer, step = self.calls % LAYERS, self.calls // LAYERS
        self.calls += 1
        made = func(q, k, v, heads, *args, **kwargs)
        if step < 1:
            return made
        first = q.ndim == 4
        q, k, v = (x.transpose(1, 2) if first else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        made = (made.transpose(1, 2) if first else made.unflatten(-1, (heads, -1))).clone()
        mine = [0, 1] if layer == 1 else [1]
        call = AttentionCall(
            q[:, :, mine], k[:, :, mine], v[:, :, mine], GRID, WIDTH**-0.5, layer=layer,
            num_layers=LAYERS, heads=tuple(mine), step=step, num_steps=self.total, branch="both",
            state=self.state.setdefault(layer, {}),
        )  # fmt: skip
        method = STRATEGY.rules[1 - layer].instance
        plan = method.plan(call, self.ops)
        if plan is not None:
            out, lse = reference.attend(call.query, call.key, call.value, plan, call.scale)
            made[:, :, mine] = method.finish(call, out.to(q.dtype), lse.float(), self.ops)
        return made.transpose(1, 2) if first else made.flatten(2)


def oracle(model, **options):
    patched = model.clone()
    own = {key: options.pop(key) for key in ("skip", "total") if key in options}
    patched.model_options["transformer_options"]["optimized_attention_override"] = Oracle(**own)
    return patched.run(**options)


@pytest.mark.parametrize("head_first", [False, True])
def test_the_node_computes_what_the_strategy_says(comfy, tmp_path, head_first):
    """Layers, heads, steps and cross-attention apart; the model that came in stays as it was."""
    model = Patcher(WanModel(head_first))
    plain = model.run()
    STRATEGY.save(tmp_path / "s.json")
    (patched,) = comfy.DitSparseAttention().patch(model, f" {tmp_path / 's.json'}\n")
    wanted = oracle(model)
    assert (wanted - plain).abs().max() > 1e-3
    for _ in range(2):  # the second sampling starts anew
        torch.testing.assert_close(patched.run(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.run(), plain)
    assert model.model_options == {"transformer_options": {}}
    assert model.patches == {}
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    rows = override.runtime.report().rows
    assert {row["branch"] for row in rows} == {"both"}
    places = {(row["layer"], row["step"]) for row in rows}
    assert places == {(layer, step) for layer in range(LAYERS) for step in range(STEPS)}


def test_cross_attention_of_equal_length_is_left_alone(comfy):
    """Text as long as the video has the shapes of self-attention; it is not taken for it."""
    model = Patcher(WanModel())
    (patched,) = comfy.DitSparseAttention().patch(model, "gna")
    calls = []
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    own = override.runtime.attend
    override.runtime.attend = lambda *a, **k: calls.append(k["layer"]) or own(*a, **k)
    patched.run(context=GRID.tokens)
    assert calls == [0, 1] * STEPS


def test_dense_calls_go_through_what_was_set_before(comfy):
    model, seen = Patcher(WanModel()), []

    def other(func, q, k, v, heads, *args, **kwargs):
        seen.append(q.shape[1])
        return func(q, k, v, heads, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = other
    plain = Patcher(WanModel()).run()
    (patched,) = comfy.DitSparseAttention().patch(model, "dense")
    torch.testing.assert_close(patched.run(), plain, rtol=0, atol=0)
    assert seen == [GRID.tokens] * 2 * LAYERS * STEPS
    with pytest.raises(ValueError, match="has a dit_sparse node already"):
        comfy.DitSparseAttention().patch(patched, "dense")


def test_steps_are_read_from_the_sigmas(comfy):
    """Samplers that ask twice a step, conditions apart, and a sampler for the last steps alone."""
    model = Patcher(WanModel())
    (patched,) = comfy.DitSparseAttention().patch(model, "gna", first_step=4, total_steps=8)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    schedule = torch.tensor([0.9, 0.6, 0.3, 0.1, 0.0])
    asked = torch.tensor([0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05])
    patched.run(sigmas=schedule, steps=asked, halves=(1,))
    rows = override.runtime.report().rows[::LAYERS]
    assert [row["step"] for row in rows] == [4, 4, 5, 5, 6, 6, 7, 7]
    assert {row["branch"] for row in rows} == {"uncond"}
    assert override.runtime.report().num_steps == 8
    for which, name in (((0,), "cond"), ((1, 0), "both"), (None, "cond"), ((0, 0), "cond")):
        assert comfy.branch(which) == name


def test_a_sampling_that_was_stopped_leaves_nothing_behind(comfy, tmp_path):
    """Stopped in its first step, where no step tells the next sampling from it."""
    model = Patcher(WanModel())
    clusters = Strategy.single("svg2", query_clusters=4, key_clusters=5, top_p=0.5)
    clusters.save(tmp_path / "s.json")
    (patched,) = comfy.DitSparseAttention().patch(model, str(tmp_path / "s.json"))
    (fresh,) = comfy.DitSparseAttention().patch(model, str(tmp_path / "s.json"))
    first = torch.ones(1)[0]
    patched.run(steps=[first])
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    assert override.runtime.state_size() > 0
    assert torch.equal(patched.run(seed=5), fresh.run(seed=5))
    assert len(override.runtime.report().rows) == LAYERS * STEPS


def test_part_of_a_schedule_is_that_part_of_the_strategy(comfy, tmp_path):
    """The dense first step belongs to the other sampler: here nothing is dense for its sake."""
    model = Patcher(WanModel())
    STRATEGY.save(tmp_path / "s.json")
    (patched,) = comfy.DitSparseAttention().patch(
        model, str(tmp_path / "s.json"), first_step=2, total_steps=6
    )
    wanted = oracle(model, skip=2, total=6)
    torch.testing.assert_close(patched.run(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_not_understood_is_dense_and_says_so(comfy, tmp_path):
    model = Patcher(WanModel())
    plain = model.run(tokens=GRID.tokens + 6)  # a reference frame before the video
    Strategy.single("gna", window=(1, 3, 3), tile=(1, 4, 4)).save(tmp_path / "s.json")
    (patched,) = comfy.DitSparseAttention().patch(model, str(tmp_path / "s.json"))
    with pytest.warns(
        UserWarning, match="dense from now on: .*has 72 tokens, but attention was called with 78"
    ):
        torch.testing.assert_close(patched.run(tokens=GRID.tokens + 6), plain, rtol=0, atol=0)
    (strict,) = comfy.DitSparseAttention().patch(model, "gna", strict=True)
    with pytest.raises(GeometryError, match="attention was called with 78"):
        strict.run(tokens=GRID.tokens + 6)
    options = dict(patched.model_options["transformer_options"])
    q = tiny.normal(1, GRID.tokens, HEADS * WIDTH)
    known = {"dit_sparse_layer": 0, "grid_sizes": torch.Size((3, 4, 6)), **options}
    with pytest.warns(UserWarning, match="the step of this call is unknown"):
        out = attention(q, q, q, HEADS, transformer_options=known)
    assert torch.equal(out, attention(q, q, q, HEADS))
    known |= {"sigmas": torch.ones(1), "sample_sigmas": torch.tensor([1.0, 0.0])}
    out = attention(q, q, q, HEADS, transformer_options=known)
    assert not torch.equal(out, attention(q, q, q, HEADS))
    mask = torch.zeros(GRID.tokens, GRID.tokens).masked_fill_(torch.eye(GRID.tokens) > 0, -9e9)
    out = attention(q, q, q, HEADS, mask, transformer_options=known)
    assert torch.equal(out, attention(q, q, q, HEADS, mask))


def test_what_the_node_refuses(comfy, tmp_path):
    class Flux(nn.Module):
        pass

    with pytest.raises(ValueError, match="knows WanModel, this model is a Flux"):
        comfy.DitSparseAttention().patch(Patcher(Flux()), "gna")
    model = Patcher(WanModel())
    with pytest.raises(StrategyError, match="did you mean radial"):
        comfy.DitSparseAttention().patch(model, "raidal")
    Strategy(name="deep", rules=(Rule(method="radial", layers=(7,)),)).save(tmp_path / "d.json")
    with pytest.raises(StrategyError, match="layer 7 is out of range; this model has 2"):
        comfy.DitSparseAttention().patch(model, str(tmp_path / "d.json"))
    wrong = Strategy(name="flux", model=Model(classes=("FluxTransformer2DModel",)))
    wrong.save(tmp_path / "f.json")
    with pytest.raises(StrategyError, match="made for FluxTransformer2DModel"):
        comfy.DitSparseAttention().patch(model, str(tmp_path / "f.json"))


def test_the_node_is_what_comfyui_looks_for(comfy):
    """Names, inputs and defaults in ComfyUI's form; every input is an argument of its function."""
    node = comfy.NODE_CLASS_MAPPINGS["DitSparseAttention"]
    assert set(comfy.NODE_DISPLAY_NAME_MAPPINGS) == set(comfy.NODE_CLASS_MAPPINGS)
    inputs = node.INPUT_TYPES()
    assert node.RETURN_TYPES == ("MODEL",)
    assert inputs["required"]["model"] == ("MODEL",)
    names = [name for part in inputs.values() for name in part]
    function = getattr(node, node.FUNCTION)
    assert set(names) == set(function.__code__.co_varnames[1 : function.__code__.co_argcount])
    stages = inputs["optional"]["stage"][0]
    assert stages == ["transformer", "transformer_2"]
