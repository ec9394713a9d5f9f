# SPDX-License-Identifier: Apache-2.0
"""Every feature beside sparse attention: both orders of switching on, both orders of removal."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from diffusers.models import attention_dispatch

from dit_sparse.pipelines.processors import SITE
from tests import tiny
from tests.composition.features import FEATURES, missing
from tests.composition.switches import STEPS, quietly
from tests.composition.table import Cannot, add

SPARSE = {"density": 0.4, "block_size": 8, "search_steps": (0.0, 0.5)}


def build(family):
    """Build a pipeline, the same weights each time."""
    pipe, args = tiny.PIPELINES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**args, "num_inference_steps": STEPS}


@functools.cache
def alone(family):
    """What the pipeline gives untouched, and with sparse attention alone."""
    pipe, args = build(family)
    stock = tiny.run(pipe, args)
    pipe.enable_sparse_attention("adaspa", strict=True, **SPARSE)
    return stock, tiny.run(pipe, args)


@contextlib.contextmanager
def counting(probe):
    """Count the calls of a method of any object of a class."""
    counts = [0]
    if probe is None:
        yield counts
        return
    cls, name = probe
    real = cls.__dict__[name]

    @functools.wraps(real)
    def counted(self, *args, **kwargs):
        counts[0] += 1
        return real(self, *args, **kwargs)

    setattr(cls, name, counted)
    try:
        yield counts
    finally:
        setattr(cls, name, real)


def is_plain(pipe):
    """Whether nothing of ours is on the transformer, processors put aside included."""
    return not any(
        getattr(module, SITE, None)
        or "stock" in vars(type(getattr(module, "processor", None)))
        or any(name.startswith("_dit_sparse") for name in vars(module))
        for module in pipe.transformer.modules()
    )


def enable(pipe, *, dense=False, strict=True):
    if dense:
        return pipe.enable_sparse_attention("dense", strict=strict)
    return pipe.enable_sparse_attention("adaspa", strict=strict, **SPARSE)


def as_told(feature, report):
    """Whether only those calls stayed dense of which the feature says so."""
    if not feature.declines:
        return not report.reasons
    return bool(report.reasons) and all(feature.declines in reason for reason in report.reasons)


CELLS = [
    pytest.param(key, family, verdict, id=f"{key}-{family}")
    for key, feature in FEATURES.items()
    for family, verdict in add(
        "test_features::test_feature", feature.title, feature.verdicts, feature.families
    ).items()
]


@pytest.fixture(autouse=True)
def _usual_backend():
    """Put diffusers' global attention backend back, also after a failure."""
    yield
    native = attention_dispatch.AttentionBackendName.NATIVE
    attention_dispatch._AttentionBackendRegistry._active_backend = native


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache's
@pytest.mark.parametrize(("key", "family", "verdict"), CELLS)
def test_feature(key, family, verdict):
    feature = FEATURES[key]
    if missing(feature):
        pytest.skip(f"{feature.needs} is not installed")
    on = quietly(feature.on)
    if isinstance(verdict, Cannot):
        stock_cannot(on, family)
        return
    with counting(feature.probe) as counts:
        check(feature, on, family, counts)


def stock_cannot(on, family):
    """The feature fails without us, or changes nothing at all."""
    stock, _ = alone(family)
    pipe, args = build(family)
    try:
        changed = tiny.run(pipe, on(pipe, args))
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ):
        return
    assert torch.equal(changed, stock)


def check(feature, on, family, counts):
    stock, plain = alone(family)
    strict = not feature.declines

    def run(pipe, args):
        counts[0] = 0
        return tiny.run(pipe, args), counts[0]

    # the feature first, then ours
    pipe, args = build(family)
    changed = on(pipe, args)
    theirs, times = run(pipe, changed)
    assert (times > 0) == (feature.probe is not None)
    assert torch.equal(theirs, stock) == (not feature.changes) or feature.changes == "close"
    if feature.changes == "close":
        assert (theirs - stock).abs().max() <= 1e-4 * stock.abs().max()
    with enable(pipe, dense=True, strict=strict):
        ours, again = run(pipe, changed)
        assert torch.equal(ours, theirs)
        assert again == times
    handle = enable(pipe, strict=strict)
    both, again = run(pipe, changed)
    report = handle.report()
    assert report.sparse_rows
    assert as_told(feature, report)
    assert again == times
    assert torch.equal(run(pipe, changed)[0], both)  # the second generation like the first
    assert torch.equal(both, plain) == (not feature.changes) or feature.changes == "close"
    assert not torch.equal(both, theirs)
    if feature.off is not None:
        feature.off(pipe)
        assert same(tiny.run(pipe, args), plain, exact=feature.exact)
        pipe.disable_sparse_attention()
        assert is_plain(pipe)
        assert same(tiny.run(pipe, args), stock, exact=feature.exact)
    else:
        pipe.disable_sparse_attention()
        assert is_plain(pipe)
        assert torch.equal(run(pipe, changed)[0], theirs)
        pipe, args = build(family)

    # ours first, then the feature
    handle = enable(pipe, strict=strict)
    changed = on(pipe, args)
    after, again = run(pipe, changed)
    assert torch.equal(after, both)
    assert again == times
    assert as_told(feature, handle.report())
    pipe.disable_sparse_attention()
    assert torch.equal(run(pipe, changed)[0], theirs)
    assert counts[0] == times
    assert is_plain(pipe)
    if feature.off is not None:
        feature.off(pipe)
        assert is_plain(pipe)
        assert same(tiny.run(pipe, args), stock, exact=feature.exact)
        pipe, args = build(family)
        enable(pipe, dense=True, strict=strict)
        changed = on(pipe, args)
        assert torch.equal(run(pipe, changed)[0], theirs)
        feature.off(pipe)
        assert same(tiny.run(pipe, args), stock, exact=feature.exact)
        pipe.disable_sparse_attention()
        assert is_plain(pipe)


def same(one, other, *, exact):
    """Whether latents are equal, or where the feature itself rounds on its way back, close."""
    return torch.equal(one, other) if exact else torch.allclose(one, other, rtol=0, atol=1e-3)
