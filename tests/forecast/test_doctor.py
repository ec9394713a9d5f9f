# SPDX-License-Identifier: Apache-2.0
"""The doctor sees broken kernels, absent packages, and a torchvision that cannot be imported."""

import json
import sys
import types
from importlib.metadata import version

import pytest
import torch

from dit_sparse.core.machine import environment
from dit_sparse.forecast import doctor
from dit_sparse.kernels import cpu, dispatch, reference
from tests.fake_device import FakeDevice


@pytest.fixture
def only_kernels(monkeypatch):
    """Replace the table of kernels by ``name -> module``."""

    def replace(**modules):
        table = {}
        for name, module in modules.items():
            table[name] = f"fake_kernel_{name}"
            monkeypatch.setitem(sys.modules, table[name], module)
        for owner in (dispatch, doctor):
            monkeypatch.setattr(owner, "KERNELS", table)

    return replace


def fake(attend=cpu.attend, reasons=()):
    module = types.ModuleType("fake")
    module.attend = attend
    module.reasons_against = lambda query, plan: list(reasons)
    return module


def cpu_of(found):
    return next(device for device in found.devices if device.name == "cpu")


def test_this_machine_is_well():
    found = doctor.diagnose()
    assert found.problems == ()
    device = cpu_of(found)
    assert device.chosen in {"native", "cpu"}
    kernels = {kernel.name: kernel for kernel in device.kernels}
    assert set(kernels) == set(dispatch.KERNELS)
    assert kernels["cpu"].usable
    assert kernels["reference"].by_name_only
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.as_dict()["devices"][0]["chosen"] == device.chosen
    assert {"WanTransformer3DModel", "MochiTransformer3DModel"} <= {*found.models}


def test_a_device_that_is_no_cuda_device_is_looked_at(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with FakeDevice("mps"):
        assert doctor.accelerators() == ["mps:0"]
        device = doctor._examine("mps:0")
    assert device.chosen == "portable"
    assert next(k for k in device.kernels if k.name == "portable").usable


def test_the_environment_is_plain_data():
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["packages"]["torch"] == version("torch")
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["processor"]


def test_a_wrong_kernel_is_a_problem(only_kernels):
    def wrong(query, key, value, plan, scale):
        output, lse = reference.attend(query, key, value, plan, scale)
        return (output * 1.01).to(query.dtype), lse.float()

    only_kernels(good=fake(), wrong=fake(wrong))
    found = doctor.diagnose()
    assert cpu_of(found).chosen == "good"
    (problem,) = found.problems
    assert "kernel 'wrong' gives wrong results: output differs by" in problem


def test_a_kernel_that_raises_is_a_problem(only_kernels):
    def broken(*_):
        raise RuntimeError("compiler not found\nlong story")

    only_kernels(good=fake(), broken=fake(broken))
    (problem,) = doctor.diagnose().problems
    assert "RuntimeError: compiler not found;" in problem


def test_a_machine_on_which_nothing_runs_is_a_problem(only_kernels):
    only_kernels(gpu=fake(reasons=["needs a GPU", "needs bf16"]))
    found = doctor.diagnose()
    device = cpu_of(found)
    assert device.chosen is None
    assert device.kernels[0].reasons == ("needs a GPU", "needs bf16")
    assert device.kernels[0].check is None  # what cannot run is not tried
    assert found.problems == ("cpu: no kernel is available; see the reasons above",)


def test_a_torchvision_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = doctor.diagnose().problems
    assert "operator torchvision::nms does not exist" in problem
    assert "uninstall torchvision" in problem


def test_no_ffmpeg_is_a_problem(monkeypatch):
    import imageio_ffmpeg

    def nothing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nothing)
    (problem,) = doctor.diagnose().problems
    assert "ffmpeg is required for mp4 files" in problem
