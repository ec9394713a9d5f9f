# SPDX-License-Identifier: Apache-2.0
"""Which kernel will run is settled when sparse attention is enabled, with the reasons of each."""

import pytest
import torch

import dit_sparse
from dit_sparse.attach import apply
from dit_sparse.core.machine import OLDEST_TORCH
from dit_sparse.errors import KernelError, UnsupportedError
from dit_sparse.kernels import triton_attention
from tests import tiny
from tests.fake_device import FakeDevice


@pytest.fixture(scope="module")
def pipe():
    return tiny.wan(1)[0]


@pytest.fixture
def on(monkeypatch, pipe):
    """Let the pipeline run on another device."""

    def move(name):
        monkeypatch.setattr(type(pipe), "_execution_device", torch.device(name))
        return FakeDevice(name)

    return move


def test_on_apples_gpus_the_portable_kernel_runs(pipe, on):
    with (
        on("mps"),
        pytest.warns(UserWarning, match="kernel 'portable'") as warned,
        dit_sparse.sparse_attention(pipe, "radial"),
    ):
        pass
    text = str(warned[0].message)
    assert "head_dim 12, on mps" in text
    assert "may be slower than dense attention" in text
    assert "triton: needs a CUDA or ROCm device, the query is on mps" in text
    assert "native: " in text


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("triton", "triton: needs a CUDA or ROCm device, the query is on mps"),
        ("cpu", "cpu: runs on the CPU, query is on mps"),
    ],
)
def test_a_kernel_by_name_that_cannot_run_is_refused_before_any_work(pipe, on, kernel, words):
    with on("mps"), pytest.raises(KernelError, match=words) as error:
        dit_sparse.enable(pipe, "radial", kernel=kernel)
    assert "Move the model" in str(error.value)
    assert "portable" in str(error.value)
    assert dit_sparse.current(pipe) is None
    assert not [path for path, _ in apply.sites_of(pipe.transformer)]


def test_on_turing_it_says_what_each_kernel_needs(pipe, on, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(
        triton_attention, "reasons_against", lambda *_: ["needs compute capability 8.0, got 7.5"]
    )
    for kernel, words in (
        ("cudnn", r"needs compute capability 9 to 12 \(Hopper, Blackwell\), got 7"),
        ("flashinfer", "needs compute capability 8 or more, got 7"),
    ):
        with on("cuda"), pytest.raises(KernelError, match=words):
            dit_sparse.enable(pipe, "radial", kernel=kernel)
    with (
        on("cuda"),
        pytest.warns(UserWarning, match="triton: needs compute capability 8.0, got 7.5"),
        dit_sparse.sparse_attention(pipe, "radial"),
    ):
        pass


def test_an_old_torch_is_refused_with_what_to_install(pipe, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    with pytest.raises(UnsupportedError, match=r"needs torch >= 2\.9, got 2\.8\.0.*pip install"):
        dit_sparse.enable(pipe, "radial")


def test_pyproject_and_the_errors_name_the_same_torch(root):
    asked = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}' in asked


def test_where_none_can_run_the_reasons_of_all_are_given(pipe, monkeypatch):
    monkeypatch.setattr(apply, "COMPUTED", {torch.complex64})
    monkeypatch.setattr(type(pipe.transformer), "dtype", torch.complex64)
    with pytest.raises(KernelError, match="no kernel can run this model's attention") as error:
        dit_sparse.enable(pipe, "radial")
    for name in ("native", "cpu", "triton", "portable"):
        assert f"\n  {name}: " in str(error.value)
