# SPDX-License-Identifier: Apache-2.0
"""Models and processors of a user's own: subclasses, wrappers, and what they cannot be."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.functional import scaled_dot_product_attention

import dit_sparse
from dit_sparse.pipelines import processors
from tests import tiny

SPARSE = {"density": 0.4, "block_size": 8, "search_steps": (0.0, 0.5)}


def build():
    pipe, args = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe, args


@functools.cache
def alone():
    """What the pipeline gives untouched, and sparse."""
    pipe, args = build()
    stock = tiny.run(pipe, args)
    with dit_sparse.sparse_attention(pipe, "adaspa", strict=True, **SPARSE) as handle:
        sparse = tiny.run(pipe, args)
        return stock, sparse, len(handle.report().rows)


class Watching(WanAttnProcessor):
    """Keeps what the model's own processor returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, attn, hidden_states, *args, **kwargs):
        output = super().__call__(attn, hidden_states, *args, **kwargs)
        self.seen.append(output)
        return output


class Inheriting(Watching):
    pass


class Decorated(WanAttnProcessor):
    __call__ = torch.no_grad()(WanAttnProcessor.__call__)


class Holding:
    """Passes the call on to a processor that it holds."""

    def __init__(self):
        self.usual = WanAttnProcessor()

    def __call__(self, attn, *args, **kwargs):
        return self.usual(attn, *args, **kwargs)


class HoldingModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.usual = Inheriting()

    def __call__(self, attn, *args, **kwargs):
        return self.usual(attn, *args, **kwargs)


class OwnByName:
    """Attention written anew, with torch's function imported by name."""

    def __call__(self, attn, hidden_states, *_):
        parts = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            part(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts
        )
        output = scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


class OwnInFull:
    """The same, with torch's function reached from the top."""

    def __call__(self, attn, hidden_states, *_):
        parts = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            part(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts
        )
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


PROCESSORS = (Watching, Inheriting, Decorated, Holding, HoldingModule)


@pytest.mark.parametrize("cls", [*PROCESSORS, OwnByName, OwnInFull])
def test_a_processor_of_a_users_own_is_served(cls):
    stock, sparse, calls = alone()
    pipe, args = build()
    mine = [cls() for _ in pipe.transformer.blocks]
    for block, processor in zip(pipe.transformer.blocks, mine, strict=True):
        block.attn1.processor = processor
    theirs = tiny.run(pipe, args)
    assert torch.equal(theirs, stock) == (cls in PROCESSORS)
    with dit_sparse.sparse_attention(pipe, "dense", strict=True):
        assert torch.equal(tiny.run(pipe, args), theirs)
    with dit_sparse.sparse_attention(pipe, "adaspa", strict=True, **SPARSE) as handle:
        ours = tiny.run(pipe, args)
        assert len(handle.report().rows) == calls
        assert handle.report().density < 1
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours, sparse) == (cls in PROCESSORS)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == mine
    assert {type(processor) for processor in mine} == {cls}
    assert all(type(vars(each).get("usual", each)).__dict__.get("stock") is None for each in mine)
    assert torch.equal(tiny.run(pipe, args), theirs)
    if cls is Watching:
        assert len(mine[0].seen) == 2 * calls


@pytest.mark.parametrize("cls", [Decorated, Holding])
def test_a_wrapping_processor_is_part_of_one_graph(cls):
    _, sparse, _ = alone()
    pipe, args = build()
    for block in pipe.transformer.blocks:
        block.attn1.processor = cls()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in pipe.transformer.blocks:
        block.attn1.compile(backend="eager", fullgraph=True)
    pipe.enable_sparse_attention("adaspa", strict=True, **SPARSE)
    assert torch.allclose(tiny.run(pipe, args), sparse, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


class ByName(WanAttnProcessor):
    def __call__(self, attn, *args, **kwargs):
        return WanAttnProcessor.__call__(self, attn, *args, **kwargs)


@pytest.mark.parametrize("processor", [ByName(), functools.partial(WanAttnProcessor())])
def test_a_processor_that_hides_its_call_is_refused_with_what_to_do(processor):
    pipe, args = build()
    stock = tiny.run(pipe, args)
    pipe.transformer.blocks[1].attn1.processor = processor
    name = type(processor).__name__
    with pytest.raises(dit_sparse.UnsupportedError, match=rf"{name} .*super\(\)\.__call__"):
        pipe.enable_sparse_attention("adaspa", **SPARSE)
    assert torch.equal(tiny.run(pipe, args), stock)


def test_the_advice_on_pixarts_default_processor_works():
    pipe, args = tiny.pixart()
    pipe.set_progress_bar_config(disable=True)
    stock = tiny.run(pipe, args)
    pipe.transformer.set_default_attn_processor()
    assert type(pipe.transformer.transformer_blocks[0].attn1.processor) is AttnProcessor
    with pytest.raises(dit_sparse.UnsupportedError) as refused:
        pipe.enable_sparse_attention("dense")
    assert "transformer.set_attn_processor(AttnProcessor2_0())" in str(refused.value)
    pipe.transformer.set_attn_processor(AttnProcessor2_0())
    pipe.enable_sparse_attention("dense")
    assert torch.equal(tiny.run(pipe, args), stock)


def test_every_way_of_attention_in_diffusers_that_is_refused_has_its_own_advice():
    old = diffusers.models.attention_processor
    for cls, words in {
        old.AttnProcessor: "set_attn_processor",
        old.SlicedAttnProcessor: "disable_attention_slicing",
        old.XFormersAttnProcessor: "xFormers",
    }.items():
        with pytest.raises(dit_sparse.UnsupportedError, match=words):
            processors.derive(cls)


class MyWan(diffusers.WanTransformer3DModel):
    """A user's own, which passes everything on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Wrapper(nn.Module):
    """A module of a user's own around the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def subclass(pipe):
    pipe.transformer.__class__ = MyWan


def wrap(pipe):
    pipe.transformer = Wrapper(pipe.transformer)


def compile_blocks(pipe):
    for i, block in enumerate(pipe.transformer.blocks):
        pipe.transformer.blocks[i] = torch.compile(block, backend="eager")


def compile_attention(pipe):
    for block in pipe.transformer.blocks:
        block.attn1 = torch.compile(block.attn1, backend="eager")


def checkpoint(pipe):
    checkpoint_wrapper.apply_activation_checkpointing(
        pipe.transformer, check_fn=lambda module: module in list(pipe.transformer.blocks)
    )


def shard(pipe):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in pipe.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(pipe.transformer, mesh=mesh)
    assert type(pipe.transformer).__name__ == "FSDPWanTransformer3DModel"


@pytest.fixture
def _group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize(
    "change", [subclass, wrap, compile_blocks, compile_attention, checkpoint, shard]
)
@pytest.mark.parametrize("ours_first", [False, True])
def test_a_changed_model_is_served(change, ours_first):
    stock, sparse, calls = alone()
    pipe, args = build()
    if ours_first and change is not compile_attention:  # it would hide the site's module
        handle = pipe.enable_sparse_attention("adaspa", strict=True, **SPARSE)
        change(pipe)
    else:
        change(pipe)
        assert torch.equal(tiny.run(pipe, args), stock)
        with dit_sparse.sparse_attention(pipe, "dense", strict=True):
            assert torch.equal(tiny.run(pipe, args), stock)
        handle = pipe.enable_sparse_attention("adaspa", strict=True, **SPARSE)
    assert torch.equal(tiny.run(pipe, args), sparse)
    report = handle.report()
    assert len(report.rows) == calls
    assert report.density < 1
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), stock)


def test_a_strategy_for_a_class_fits_what_derives_from_it():
    pipe, args = build()
    subclass(pipe)
    strategy = dit_sparse.Strategy.single("gna", window=(2, 3, 3), tile=(2, 2, 2)).to_dict()
    strategy["model"] = {"classes": ["WanTransformer3DModel"]}
    with dit_sparse.sparse_attention(pipe, strategy, strict=True) as handle:
        tiny.run(pipe, args)
        assert handle.report().density < 1


def test_a_declined_class_stays_declined_under_another_name():
    class MyFramepack(diffusers.HunyuanVideoFramepackTransformer3DModel):
        def __init__(self):
            nn.Module.__init__(self)

    for model in (MyFramepack(), Wrapper(MyFramepack())):
        with pytest.raises(dit_sparse.UnsupportedError, match="places history frames"):
            dit_sparse.enable(model, "radial")


def test_data_parallel_serves_one_copy():
    pipe, args = build()
    model = nn.DataParallel(pipe.transformer)
    inputs = {
        "hidden_states": tiny.normal(1, 16, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": args["prompt_embeds"],
    }
    options = {"window": (2, 3, 3), "tile": (2, 2, 2)}
    with dit_sparse.sparse_attention(model, "gna", strict=True, **options) as handle:
        handle.at(0, 2)
        with torch.no_grad():
            model(**inputs)
        assert handle.report().density < 1
        replica = pipe.transformer._replicate_for_data_parallel()  # as it does for each GPU
        with pytest.raises(dit_sparse.AttachError, match="one process per GPU"):
            replica(**inputs)
