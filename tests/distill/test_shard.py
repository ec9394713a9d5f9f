# SPDX-License-Identifier: Apache-2.0
"""FSDP: what is followed and what is refused. ``test_two_processes`` runs it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from dit_sparse.distill.errors import DistillError
from dit_sparse.distill.shard import Sharding, check_sharding, read_sharding
from tests.distill import setup

GOOD = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}


def accelerator(kind, **settings):
    """Stand in for one that is set to FSDP: accelerate makes those on several GPUs alone."""
    plugin = FullyShardedDataParallelPlugin(**settings) if settings else None
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=f"DistributedType.{kind}", state=state)


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU"])
def test_without_fsdp_nothing_is_spread(kind):
    assert read_sharding(accelerator(kind)) is None


def test_what_accelerate_is_set_to_is_followed():
    assert read_sharding(accelerator("FSDP", **GOOD)) == Sharding(reshard=True, offload=False)
    other = accelerator("FSDP", **GOOD, reshard_after_forward=False, cpu_offload=True)
    assert read_sharding(other) == Sharding(reshard=False, offload=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fsdp_version": 1}, "must contain fsdp_version: 2"),
        (
            {"cpu_ram_efficient_loading": True},
            "must contain fsdp_cpu_ram_efficient_loading: false",
        ),
        ({"activation_checkpointing": True}, r"train\.gradient_checkpointing does it"),
    ],
)
def test_settings_that_would_not_be_followed_are_refused(changes, told):
    with pytest.raises(DistillError, match=told):
        read_sharding(accelerator("FSDP", **{**GOOD, **changes}))


def test_deepspeed_is_refused():
    with pytest.raises(DistillError, match="set to DEEPSPEED; must be MULTI_GPU"):
        read_sharding(accelerator("DEEPSPEED"))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("wan", {"lora": None}, "lora: null trains full copies"),
        ("pixart_sigma", {}, "PixArtSigmaPipeline has no save_lora_weights"),
        ("wan", {"train": {"batch": 9, "micro_batch": 3}}, "must be a multiple of 6"),
    ],
)
def test_runs_that_cannot_be_spread_are_refused(tmp_path, name, changes, told):
    with pytest.raises(DistillError, match=told):
        check_sharding(setup.config(tmp_path, **changes), setup.pipeline(name)[0], 2)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["false", "true"])
def test_the_command_runs_under_fsdp_on_a_gpu(tmp_path, root, offload):
    """One process: collectives of one, but all of accelerate's and FSDP's own way on CUDA."""
    prompts, config = tmp_path / "prompts.txt", tmp_path / "run.yaml"
    prompts.write_text("a red circle\na blue square\n")
    run = {
        "task": "distill",
        "model": str(root / "samples" / "wan-tiny"),
        "output": str(tmp_path / "out"),
        "strategy": {"method": "blade", "density": 0.5},
        "size": {"height": 128, "width": 128, "num_frames": 33},
        "data": {"prompts": str(prompts)},
        "lora": {"rank": 4, "alpha": 4},
        "train": {"iterations": 2, "batch": 2},
        "distill": {"steps": 3, "guidance": 4.0},
    }
    config.write_text(json.dumps(run))  # YAML has JSON within it
    env = {
        **os.environ,
        "PYTHONPATH": str(root),
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": offload,
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "dit_sparse.distill", str(config),
    ]  # fmt: skip
    subprocess.run(command, cwd=root, env=env, check=True, timeout=300, capture_output=True)
    rows = (tmp_path / "out" / "log.csv").read_text().splitlines()[1:]
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor(float(x))) for row in rows for x in row.split(","))
    assert (tmp_path / "out" / "result" / "pytorch_lora_weights.safetensors").is_file()
