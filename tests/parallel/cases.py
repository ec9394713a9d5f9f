# SPDX-License-Identifier: Apache-2.0
"""What is run on several processes and on one: pipelines, strategies and what comes of them.

Every case runs in each of the processes, in step, and checks there what needs no comparing. One
process alone is the same pipeline, made anew from the same seed, with nothing shared.

Past 300 lines, as it is one list of cases with what they share.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from packaging.version import Version

import dit_sparse
from dit_sparse.pipelines import FAMILIES, parallel
from tests import tiny
from tests.models import case as models
from tests.models.builders import CASES as CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {"block_size": 8}
# Four heads, two layers: no two heads of a layer do the same, and a rule's heads stand on both
# sides of the borders between processes. sparse_vdit's patterns go by the model's head numbers.
PATTERNS = ["skip", "vertical_stripe", "full", "diagonal"]
MIXED = [
    {"layers": [0], "heads": [0], "method": "radial", "params": {"decay_factor": 0.3, **SMALL}},
    {"layers": [0], "heads": [1, 3], "method": "sparse_vdit",
     "params": {"patterns": PATTERNS, "diagonal_density": 0.3, **SMALL}},
    {"layers": [1], "heads": [0, 3], "method": "rettention",
     "params": {"mask": "radial", "mask_params": {"decay_factor": 0.2, **SMALL},
                "refresh": 2}},
    {"layers": [1], "heads": [1], "method": "xattention",
     "params": {"threshold": 0.5, "stride": 2, **SMALL}},
    {"layers": [1], "heads": [2], "steps": [0.5, 1.0], "method": "svg",
     "params": {"density": 0.3, "rows": 8, **SMALL}},
]  # fmt: skip
SEARCHED = [
    {"layers": [0], "heads": [0, 1, 2], "method": "sparsed",
     "params": {"density": 0.3, "search_step": 0.25, **SMALL}},
    {"layers": [1], "method": "pooled", "params": {"density": 0.3, **SMALL}},
]  # fmt: skip
DRAWN = [  # draws go by the model's own head numbers
    {"layers": [0], "method": "blade", "params": {"density": 0.3, "samples": 4, **SMALL}},
    {"layers": [1], "method": "svg2",
     "params": {"query_clusters": 6, "key_clusters": 9, "top_p": 0.5, **SMALL}},
]  # fmt: skip
# Methods that look at a process's heads together: params, and one that may differ a little.
APART = {
    "adaspa": (
        {"density": 0.3, "search_steps": [0.0, 0.5], "recall_threshold": 0.2, **SMALL},
        "recall_threshold",
        0.2,
    ),
}
ODD_FLUX = {"height": 22, "width": 26, "text": 17}  # 11 x 13 tokens and 17 of text
ODD_WAN = {"height": 48, "width": 80}  # 3 x 3 x 5 tokens


def strategy(rules: list[dict[str, Any]]) -> dit_sparse.Strategy:
    plain = {"schema_version": 1, "name": "mixed", "rules": rules}
    return dit_sparse.Strategy.from_dict(plain)


def make(
    family: str,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    text: int = 16,
    **sizes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Make a tiny pipeline with so many heads; FLUX with so many tokens of text."""
    pipe, args = tiny.PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate(("transformer", "transformer_2")):
        old = getattr(pipe, name, None)
        if old is not None:
            torch.manual_seed(seed)
            config = {**old.config, "num_attention_heads": heads}
            if config.get("added_kv_proj_dim"):  # Wan's image tokens are as wide as the others
                config["added_kv_proj_dim"] = heads * config["attention_head_dim"]
            new = type(old).from_config(config).eval()
            pipe.register_modules(**{name: new if dtype == torch.float32 else new.to(dtype)})
    args |= sizes
    if family == "flux":
        args["prompt_embeds"] = args["prompt_embeds"][:, :text]
    for name in [name for name in args if "embeds" in name]:
        args[name] = args[name].to(dtype)
    return tiny.stretch(pipe, 3.0), args


@dataclass
class World:
    """The processes that share a model, and what one of them finds."""

    processes: int
    mesh: Any
    name: str = ""

    @property
    def rank(self) -> int:
        return int(self.mesh["ulysses"].get_local_rank())

    def share(self, pipe: Any, **options: Any) -> None:
        for name in ("transformer", "transformer_2"):
            if (model := getattr(pipe, name, None)) is not None:
                self.share_model(model, **options)

    def share_model(self, model: Any, **options: Any) -> None:
        config = ContextParallelConfig(ulysses_degree=self.processes, mesh=self.mesh, **options)
        model.enable_parallelism(config=config)

    def gathered(self, result: torch.Tensor) -> torch.Tensor:
        """Give every process's result, ``[processes, ...]``."""
        everybody = [torch.empty_like(result) for _ in range(self.processes)]
        dist.all_gather(everybody, result.contiguous(), group=self.mesh["ulysses"].get_group())
        return torch.stack(everybody)


def difference(result: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    largest = float((result.double() - wanted.double()).abs().max())
    return {"largest": largest, "relative": largest / float(wanted.double().abs().max())}


def sparse(
    world: World,
    family: str,
    rules: list[dict[str, Any]],
    *,
    sparse_first: bool = False,
    against: list[dict[str, Any]] | None = None,
    anything: bool = False,
    options: dict[str, Any] | None = None,
    **sizes: Any,
) -> tuple[dict[str, Any], Any]:
    """Run a strategy on all processes and on one; returns the difference and the pipeline."""
    parallel = {"ulysses_anything": True} if anything else {}
    pipe, args = make(family, **sizes)
    if not sparse_first:
        world.share(pipe, **parallel)
    pipe.enable_sparse_attention(strategy(rules), **(options or {}))
    if sparse_first:
        world.share(pipe, **parallel)
    shared = tiny.run(pipe, args)
    report = pipe.sparse_attention.report()
    assert not report.reasons, report.reasons
    every = world.gathered(shared)
    assert all(torch.equal(each, shared) for each in every), "processes differ"
    assert torch.isfinite(shared).all()
    if world.rank > 0:  # one of them compares
        return {}, pipe
    alone, args = make(family, **sizes)
    alone.enable_sparse_attention(strategy(rules if against is None else against))
    wanted = tiny.run(alone, args)
    density = alone.sparse_attention.report().density
    assert density is not None
    assert density < 0.9
    alone.disable_sparse_attention()
    dense = tiny.run(alone, args)
    moved = float((wanted - dense).abs().max() / dense.abs().max())
    return {**difference(shared, wanted), "density": density, "sparse_moves": moved}, pipe


def stock(world: World, family: str, *, anything: bool = False, **sizes: Any) -> dict[str, Any]:
    """Compare three ways to be dense: sparse attention with no rules, stock, one process."""
    parallel = {"ulysses_anything": True} if anything else {}
    pipe, args = make(family, **sizes)
    world.share(pipe, **parallel)
    plain = tiny.run(pipe, args)
    pipe.enable_sparse_attention(strategy([]))
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe, args), plain)
    if world.rank > 0:
        return {}
    pipe, args = make(family, **sizes)
    return difference(plain, tiny.run(pipe, args))


def heads_of_mine(world: World) -> dict[str, Any]:
    """Each process reports its own heads, by the model's numbers, and all of them together."""
    pipe, args = make("wan")
    world.share(pipe)
    handle = pipe.enable_sparse_attention(strategy(MIXED), probe=9)
    tiny.run(pipe, args)
    each = 4 // world.processes
    mine = list(range(world.rank * each, (world.rank + 1) * each))
    report = handle.report()
    for row in report.rows:
        assert sorted(head for heads in row["methods"].values() for head in heads) == mine
    first = next(row for row in report.rows if row["layer"] == 0)
    wanted = {"radial": [0], "sparse_vdit": [1, 3], "dense": [2]}
    assert first["methods"] == {
        name: own
        for name, heads in wanted.items()
        if (own := [head for head in heads if head in mine])
    }
    alone, args = make("wan")
    one = alone.enable_sparse_attention(strategy(MIXED), probe=9)
    tiny.run(alone, args)
    whole, merged = one.report(), handle.merged_report()
    assert len(merged.rows) == len(whole.rows)
    for got, want in zip(merged.rows, whole.rows, strict=True):
        assert got["methods"] == want["methods"]
        assert got["density"] == pytest.approx(want["density"], rel=1e-6)
        assert (got["stage"], got["layer"], got["step"], got["branch"]) == (
            want["stage"], want["layer"], want["step"], want["branch"],
        )  # fmt: skip
    assert merged.density == pytest.approx(whole.density, rel=1e-6)
    handle.watch = lambda *_: None
    with pytest.raises(dit_sparse.AttachError, match="only some of the heads"):
        tiny.run(pipe, args)
    return {}


def held(world: World) -> dict[str, Any]:
    """A guarantee that nothing breaks changes nothing; one that all break gives back dense."""
    found, pipe = sparse(world, "wan", MIXED, options={"guarantee": 1.0})
    said = pipe.sparse_attention.report().guarantee
    assert said["probes"] > 0
    assert not said["returned"]
    pipe, args = make("wan")
    world.share(pipe)
    dense = tiny.run(pipe, args)
    handle = pipe.enable_sparse_attention(strategy(MIXED), guarantee=1e-5)
    assert float((tiny.run(pipe, args) - dense).abs().max()) < 1e-4 * float(dense.abs().max())
    each = 4 // world.processes
    mine = set(range(world.rank * each, (world.rank + 1) * each))
    returned = handle.report().guarantee["returned"]
    assert returned
    assert {one["head"] for one in returned} <= mine
    whole = handle.merged_report().guarantee
    assert {one["head"] for one in whole["returned"]} == {0, 1, 2, 3}
    return found


def ranked(world: World, method: str) -> dict[str, Any]:
    """What a process chooses for its heads, one process chooses for those heads by themselves."""
    params, key, value = APART[method]
    each = 4 // world.processes
    rules = [{"method": method, "params": {**params, key: value}}]
    against = [
        {
            "method": method,
            "heads": list(range(rank * each, (rank + 1) * each)),
            "params": {**params, key: value + rank * 1e-12},  # else they are one group
        }
        for rank in range(world.processes)
    ]
    with pytest.warns(UserWarning, match=f"{method} makes other choices"):
        found, _ = sparse(world, "wan", rules, against=against)
    return found


def declined(world: World) -> dict[str, Any]:
    """A call that wants gradients is stock's, all of it, and says why."""
    pipe, args = make("wan")
    world.share(pipe)
    model = pipe.transformer
    inputs = {
        "hidden_states": tiny.normal(1, 16, 3, 8, 12),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": args["prompt_embeds"],
        "return_dict": False,
    }
    plain = model(**inputs)[0]
    handle = dit_sparse.enable(model, strategy(MIXED))
    handle.at(0, 4)
    result = model(**inputs)[0]
    assert torch.equal(result, plain)
    (why,) = handle.report().reasons
    assert "gradients" in why
    result.square().sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    return {}


def compiled(world: World, family: str) -> dict[str, Any]:
    """A compiled model runs the same exchange: Wan's blocks, and FLUX as one graph.

    Stock Wan is not one graph under context parallelism (diffusers logs in it).
    """
    pipe, args = make(family)
    pipe.enable_sparse_attention(strategy(MIXED))
    world.share(pipe)
    eager = tiny.run(pipe, args)
    torch._dynamo.reset()
    if family == "wan":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        pipe.transformer.compile(fullgraph=True, backend="eager")
    found = difference(tiny.run(pipe, args), eager)
    report = pipe.sparse_attention.report()
    assert not report.reasons
    assert report.density < 0.9
    return found


def others(world: World) -> dict[str, Any]:
    """The other classes that have a plan, as transformers by themselves; seven tokens of text."""
    worst: dict[str, float] = {}
    rules = [
        {"heads": [0], "method": "radial", "params": {"decay_factor": 0.3, **SMALL}},
        {"heads": [1], "method": "sparse_vdit",
         "params": {"patterns": ["full", "diagonal"], "diagonal_density": 0.2, **SMALL}},
    ]  # fmt: skip
    old = Version(diffusers.__version__) < Version("0.42")
    for name in sorted(set(parallel.SPLIT) - set(FAMILIES)):
        if old and name == "QwenImageTransformer2DModel":
            continue  # stock by itself gives another result than one process (seen in 0.38.0)
        case = CLASSES[name]
        inputs = {**case.inputs(1), "return_dict": False}  # as pipelines do; the plan demands it
        if name.startswith("Flux2"):  # its pipelines' shape, the one that the plan splits
            inputs |= {ids: inputs[ids][None] for ids in ("img_ids", "txt_ids")}
        made = models.make(name, case)
        wanted = models.call(made, inputs)
        alone = dit_sparse.enable(made, strategy(rules))
        alone.at(0, 2)
        sparse_wanted = models.call(made, inputs)
        alone.remove()
        world.share_model(made, ulysses_anything=True)
        found = difference(models.call(made, inputs), wanted)
        assert found["relative"] < 1e-5, f"{name}: stock differs by {found}"
        handle = dit_sparse.enable(made, strategy(rules))
        handle.at(0, 2)
        got = models.call(made, inputs)
        report = handle.report()
        assert not report.reasons, f"{name}: {report.reasons}"
        found = difference(got, sparse_wanted)
        assert found["relative"] < 1e-5, f"{name}: {found}"
        moved = difference(sparse_wanted, wanted)["relative"]
        assert moved > 1e-3, f"{name}: {moved}"
        worst = max(worst, found, key=lambda each: each.get("relative", 0.0))
    return worst


def refused(world: World) -> dict[str, Any]:
    """Ring, and plans of one's own, are refused before anything is changed, in either order."""
    ring = ContextParallelConfig(ring_degree=world.processes)
    pipe, args = make("wan")
    plain = tiny.run(pipe, args)
    with sparse_on(pipe), pytest.raises(dit_sparse.AttachError, match="some of the keys"):
        pipe.transformer.enable_parallelism(config=ring)
    assert torch.equal(tiny.run(pipe, args), plain)
    pipe.transformer.enable_parallelism(config=ring)
    with pytest.raises(dit_sparse.AttachError, match=r"ring_degree=.*ulysses_degree"):
        pipe.enable_sparse_attention("radial")
    assert pipe.sparse_attention is None
    pipe, args = make("wan")
    plan = {k: v for k, v in pipe.transformer._cp_plan.items() if k != ""}
    config = ContextParallelConfig(ulysses_degree=world.processes, mesh=world.mesh)
    pipe.transformer.enable_parallelism(config=config, cp_plan=plan)
    with pytest.raises(dit_sparse.AttachError, match="custom context parallel plan"):
        pipe.enable_sparse_attention("radial")
    return {}


@contextlib.contextmanager
def sparse_on(pipe: Any) -> Any:
    pipe.enable_sparse_attention("radial", decay_factor=0.3, block_size=8)
    yield
    pipe.disable_sparse_attention()


def case(family: str, rules: list[dict[str, Any]], **how: Any) -> Callable[[World], Any]:
    return lambda world: sparse(world, family, rules, **how)[0]


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    "dense, Wan": lambda world: stock(world, "wan"),
    "dense, FLUX": lambda world: stock(world, "flux"),
    "mixed, Wan": case("wan", MIXED),
    "mixed, Wan, sparse first": case("wan", MIXED, sparse_first=True),
    "searched, Wan": case("wan", SEARCHED),
    "mixed, Wan 2.2": case("wan_2.2", MIXED),
    "mixed, FLUX": case("flux", MIXED),
    "mixed, FLUX, sparse first": case("flux", MIXED, sparse_first=True),
    "searched, FLUX": case("flux", SEARCHED),
    "guarantee, Wan": held,
    "reports": heads_of_mine,
    "gradients": declined,
    "refused": refused,
}
# With four: one each of what another number of processes could break.
FOUR = (
    "dense, Wan",
    "dense, FLUX",
    "mixed, Wan",
    "mixed, FLUX, sparse first",
    "searched, FLUX",
    "guarantee, Wan",
    "reports",
)
# With two processes only: what another number of them could not break.
MORE: dict[str, Callable[[World], dict[str, Any]]] = {
    "dense, FLUX, odd": lambda world: stock(world, "flux", anything=True, heads=3, **ODD_FLUX),
    "mixed, Wan, odd": case("wan", MIXED, anything=True, heads=5, **ODD_WAN),
    "mixed, FLUX, odd": case("flux", MIXED, anything=True, heads=5, **ODD_FLUX),
    "ranked, AdaSpa": lambda world: ranked(world, "adaspa"),
    "drawn, BLADE and SVG2": case("wan", DRAWN),
    "mixed, Wan I2V": case("wan_i2v", MIXED),
    "others, odd": others,
    "compiled, Wan": lambda world: compiled(world, "wan"),
    "compiled, FLUX": lambda world: compiled(world, "flux"),
    "mixed, Wan, bf16": case("wan", MIXED, dtype=torch.bfloat16),
    "mixed, FLUX, bf16": case("flux", MIXED, dtype=torch.bfloat16),
}


def run_all(world: World, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Run cases in step, a row each; after one that fails the processes are not, and it ends."""
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", ".*had no effect", UserWarning)  # on tiny grids
            found = (CASES | MORE)[name](world)
        rows.append({"case": name, "processes": world.processes, **found})
