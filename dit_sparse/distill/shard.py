# SPDX-License-Identifier: Apache-2.0
"""FSDP: the frozen base weights are spread over the processes, a part to each.

A block's weights are gathered while it runs and let go again, so all processes must run the same
passes of the model in the same order. The adapters are whole everywhere: gradients, optimizer and
checkpoints do not know that anything is spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_sparse.distill.errors import DistillError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from dit_sparse.distill.config import Config


@dataclass(frozen=True, slots=True)
class Sharding:
    """How weights are spread.

    Args:
        reshard: Let a block's weights go after its forward pass, and gather them again for the
            backward pass; false keeps them until then: faster, and in memory whole.
        offload: The parts wait in the host's memory.
    """

    reshard: bool = True
    offload: bool = False


def read_sharding(accelerator: Any) -> Sharding | None:
    """Read what accelerate is set to; None: every process has all weights.

    Raises:
        DistillError: DeepSpeed or another way to split the work that is not built, or a setting of
            FSDP that would not be followed; says what to set instead.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind == "NO" or kind.startswith("MULTI_"):
        return None
    if kind != "FSDP":
        raise DistillError(
            f"accelerate is set to {kind}; must be MULTI_GPU or MULTI_CPU (each process has all "
            "weights) or FSDP (weights are sharded); change it with 'accelerate config'"
        )
    plugin = accelerator.state.fsdp_plugin
    for wrong, line in (
        (plugin.fsdp_version != 2, "fsdp_version: 2"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false"),
        (
            plugin.activation_checkpointing,
            "fsdp_activation_checkpointing: false (train.gradient_checkpointing does it)",
        ),
    ):
        if wrong:
            raise DistillError(
                f"accelerate's FSDP settings: must contain {line}; change it in the file written "
                "by 'accelerate config'"
            )
    # Without an offload accelerate keeps None or the policy's empty base class here.
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return Sharding(bool(plugin.reshard_after_forward), offload)


def check_sharding(config: Config, pipe: Any, processes: int) -> None:
    """Refuse a run that cannot be spread, before any work."""
    name = type(pipe).__name__
    if config.lora is None:
        raise DistillError(
            "lora: null trains full copies, which are not sharded; under FSDP set lora, or "
            "choose MULTI_GPU in 'accelerate config'"
        )
    if not hasattr(pipe, "save_lora_weights"):
        raise DistillError(
            f"{name} has no save_lora_weights, so its result would be full weights, which are "
            "not gathered; choose MULTI_GPU in 'accelerate config'"
        )
    passes = config.train.batch // config.train.micro_batch
    if passes % processes:
        raise DistillError(
            f"train.batch: {config.train.batch} in passes of {config.train.micro_batch} cannot "
            f"be divided evenly among {processes} processes, as FSDP requires; must be a "
            f"multiple of {config.train.micro_batch * processes}"
        )


def shard(
    model: nn.Module, trained: Iterable[nn.Parameter], how: Sharding, device: torch.device
) -> None:
    """Spread a model over all processes, block by block, in place.

    Args:
        model: Whole, on any device: only a block at a time is moved whole.
        trained: Parameters that stay whole, moved to ``device``.
        how: How.
        device: Of this process.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    whole = set(trained)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy() if how.offload else OffloadPolicy()
    given: dict[str, Any] = {"mesh": mesh, "offload_policy": policy, "ignored_params": whole}
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    for block in (each for blocks in lists for each in blocks):
        fully_shard(block, reshard_after_forward=how.reshard, **given)
    fully_shard(model, **given)
