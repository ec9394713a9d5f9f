# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as ``dispatch.py`` knows them: can they run this call, and run it.

``triton`` is imported when a kernel is needed, not before: it is absent on many machines.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.errors import KernelError
from dit_sparse.kernels.autograd import differentiable

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan
    from dit_sparse.kernels.triton_target import Tiling

HAS_BACKWARD = True
WIDEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_TRITON = (3, 5)  # torch 2.9 brings it
WIDEST_OFFSET = 2**31  # elements between the rows of one tile; within a tile addresses are 32-bit


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why these kernels cannot run the call, a reason a line; empty: they can.

    Triton's interpreter is no reason for a call on the CPU: it is for tests, and a thousand times
    slower than any other kernel. ``attend`` itself does run in it.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; key and value are taken to be like it.
        plan: What to compute.
    """
    reasons = []
    if query.device.type != "cuda":
        reasons.append(f"needs a CUDA or ROCm device, the query is on {query.device}")
    else:
        from dit_sparse.kernels.triton_target import reasons_against_device

        reasons += reasons_against_device(query.device)
    if plan.device != query.device:
        reasons.append(f"the plan is on {plan.device}, the query on {query.device}")
    return reasons + reasons_against_tensor(query)


def reasons_against_tensor(query: Tensor) -> list[str]:
    """Say why no kernel takes ``[batch, seq_len, heads, head_dim]``, on whichever device."""
    try:
        import triton
    except ImportError:
        return ["triton is not installed: pip install triton (Linux, NVIDIA or AMD GPU)"]
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return [f"needs triton >= {oldest} (torch 2.9 brings it), got {triton.__version__}"]
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"computes float16, bfloat16 and float32, got {query.dtype}")
    if query.dtype == torch.bfloat16 and is_interpreted():
        reasons.append("Triton's interpreter computes bfloat16 wrongly (triton issue 11584)")
    if query.shape[-1] > WIDEST_HEAD:
        reasons.append(f"head_dim must be at most {WIDEST_HEAD}, got {query.shape[-1]}")
    if max(query.stride(1) * 128, query.stride(3) * query.shape[-1]) >= WIDEST_OFFSET:
        reasons.append(f"strides reach beyond 32 bits within a tile: {query.stride()}")
    if max(query.shape[0], query.shape[2]) > 65_535:
        reasons.append(f"at most 65535 samples and heads, got {tuple(query.shape)}")
    return reasons


def is_interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` at import)."""
    import triton

    from dit_sparse.kernels import triton_forward

    return not isinstance(triton_forward.attend_fwd_kernel, triton.JITFunction)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query token to the key tokens that the plan keeps; differentiable.

    Softmax over kept keys only: ``S = scale * Q K^T + log_weight``, ``O = exp(S - LSE) V``.
    Scores and sums are float32 whatever the dtype.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: ``[batch, kv_seq_len, heads, head_dim]``, any strides.
        value: Like ``key``.
        plan: Which keys each query reads.
        scale: Multiplies the scores before softmax.
        tiling: Tile sizes; chosen by the device where None.

    Returns:
        Output, shaped and typed like ``query``; LSE ``[batch, heads, seq_len]``, float32, natural
        log. A query with nothing kept gives 0 and -inf.
    """
    _check_call(query, key, value, plan, scale)
    query, scale = _positive_scale(query, scale)
    if tiling is None:
        tiling = default_tiling(query, key, value, plan)
    from dit_sparse.kernels import triton_forward, triton_hopper

    kernel = triton_hopper if tiling.copy_engine else triton_forward

    def forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> Any:
        return kernel.forward(q, k, v, plan, scale, tiling)

    def backward(*args: Any) -> tuple[Tensor | None, ...]:
        return *attend_backward(*args), None

    return differentiable(forward, backward, query, key, value, plan, scale)


def default_tiling(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> Tiling:
    """Choose kernel and tiling of the forward pass; see ``attend`` for the arguments.

    On Hopper the kernel with specialized warps, where it takes the call: by the static model of
    ``docs/benchmarks/notes.md`` it is the fastest. Else the pointer kernel.
    """
    from dit_sparse.kernels.triton_hopper import hopper_reasons_against, hopper_tiling
    from dit_sparse.kernels.triton_target import forward_tiling, target_of

    target, shape = target_of(query.device), _shape_of(query, plan.q, plan.kv)
    if target == "sm_90" and not hopper_reasons_against(query, key, value, plan):
        return hopper_tiling(*shape[1:], specialize=True)
    return forward_tiling(target, *shape, plain=is_plain(plan))


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    plan: BlockPlan,
    scale: float,
    tilings: tuple[Tiling, Tiling] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value, as ``register_autograd`` wants them.

    Args:
        query: As given to ``attend``; also ``key``, ``value``, ``plan``, ``scale``.
        key: See ``query``.
        value: See ``query``.
        output: As ``attend`` returned it.
        lse: As ``attend`` returned it.
        grad_output: Gradient of ``output``.
        grad_lse: Gradient of ``lse``; zeros where nothing used it.
        plan: See ``query``.
        scale: See ``query``.
        tilings: Of the query and the key kernel; chosen by the device where None.
    """
    _check_call(query, key, value, plan, scale)
    for name, tensor in (("output", output), ("grad_output", grad_output)):
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise KernelError(
                f"{name} must be {query.dtype} {tuple(query.shape)} like query, got "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        _check_lse(name, tensor, query)
    from dit_sparse.kernels.triton_backward import backward
    from dit_sparse.kernels.triton_target import backward_tilings, target_of

    signed, scale_ = _positive_scale(query, scale)
    if tilings is None:
        tilings = backward_tilings(target_of(query.device), *_shape_of(query, plan.q, plan.kv))
    grads = backward(signed, key, value, output, lse, grad_output, grad_lse, plan, scale_, tilings)
    if scale > 0:
        return grads
    return grads[0].neg() if scale < 0 else torch.zeros_like(query), grads[1], grads[2]


def add_means(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    output: Tensor,
    lse: Tensor,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the means of dropped blocks to the attention over kept keys, without gradients.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: Means, ``[batch, kv_blocks, heads, head_dim]``, any strides.
        value: Like ``key``.
        plan: What ``attend`` computed.
        scale: Multiplies the scores.
        output: As ``attend`` returned it; overwritten.
        lse: As ``attend`` returned it; overwritten.
        tiling: Tile sizes; chosen by the device where None.

    Returns:
        ``output`` and ``lse``, over kept keys and means.
    """
    blocks = plan.kv.blocks
    _check_tensors(query, (("key", key, blocks), ("value", value, blocks)))
    _check_tensors(query, (("output", output, query.shape[1]),))
    _check_scale(scale)
    _check_lse("lse", lse, query)
    from dit_sparse.kernels.triton_means import add_means_launch
    from dit_sparse.kernels.triton_target import means_tiling, target_of

    if tiling is None:
        shape = query.dtype, query.shape[-1], plan.q.max_length, blocks
        tiling = means_tiling(target_of(query.device), *shape)
    add_means_launch(query, key, value, plan, scale, output, lse, tiling).run()
    return output, lse


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    q: BlockLayout,
    kv: BlockLayout,
    scale: float,
    tiling: Tiling | None = None,
) -> Tensor:
    """Sum ``exp(score - lse)`` over each block pair, in one pass over the keys.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``, any strides.
        lse: Of the dense attention, fp32 ``[batch, heads, seq_len]``; -inf: the row counts 0.
        q: Query blocks.
        kv: Key blocks; keys in no block count nowhere.
        scale: Multiplies the scores.
        tiling: Tile sizes; chosen by the device where None.

    Returns:
        fp32 ``[batch, heads, q_blocks, kv_blocks]``; without dropped keys a row of it sums to
        the number of its query tokens.
    """
    _check_tensors(query, (("key", key, kv.slots),))
    _check_scale(scale)
    _check_lse("lse", lse, query)
    if q.slots != query.shape[1]:
        raise KernelError(f"the query layout is for {q.slots} tokens, query has {query.shape[1]}")
    for name, layout in (("query", q), ("key", kv)):
        if layout.device != query.device:
            raise KernelError(f"the {name} layout is on {layout.device}, query on {query.device}")
    from dit_sparse.kernels.triton_launch import packed
    from dit_sparse.kernels.triton_mass import block_mass as compute
    from dit_sparse.kernels.triton_target import mass_tiling, target_of

    query, scale = _positive_scale(query, scale)
    if tiling is None:
        tiling = mass_tiling(target_of(query.device), *_shape_of(query, q, kv))
    return compute(query, key, packed(lse), q, kv, scale, tiling)


def is_plain(plan: BlockPlan) -> bool:
    """Tell whether a plan is block lists and nothing else."""
    extras = (plan.partial, plan.q_permutation, plan.kv_permutation, plan.kv_log_weight)
    return all(extra is None for extra in extras)


def _shape_of(query: Tensor, q: BlockLayout, kv: BlockLayout) -> tuple[torch.dtype, int, int, int]:
    return query.dtype, query.shape[-1], q.max_length, kv.max_length


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Move sign or zero of ``scale`` into the query: the kernels scale a maximum of raw scores."""
    if scale > 0:
        return query, scale
    return (query.neg(), -scale) if scale < 0 else (query * 0, 1.0)


def _check_tensors(query: Tensor, others: tuple[tuple[str, Tensor, int], ...]) -> None:
    reasons = reasons_against_tensor(query)
    if query.device.type != "cuda" and not is_interpreted():
        reasons.append(f"needs a CUDA or ROCm device, the query is on {query.device}")
    if reasons:
        raise KernelError("triton cannot run this call:\n" + "\n".join(reasons))
    batch, _, heads, head_dim = query.shape
    for name, tensor, tokens in others:
        wanted = (batch, tokens, heads, head_dim)
        if tuple(tensor.shape) != wanted:
            raise KernelError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise KernelError(
                f"{name} must be {query.dtype} on {query.device} like query, got {tensor.dtype} "
                f"on {tensor.device}"
            )
        if max(tensor.stride(1) * 128, tensor.stride(3) * head_dim) >= WIDEST_OFFSET:
            raise KernelError(f"{name}: strides reach beyond 32 bits: {tensor.stride()}")


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise KernelError(f"scale must be finite, got {scale}")


def _check_lse(name: str, lse: Tensor, query: Tensor) -> None:
    wanted = (query.shape[0], query.shape[2], query.shape[1])
    if lse.dtype != torch.float32 or tuple(lse.shape) != wanted or lse.device != query.device:
        raise KernelError(
            f"{name} must be float32 [batch, heads, seq_len] = {wanted} on {query.device}, got "
            f"{lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )


def _check_call(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> None:
    """Raise where the call is not one that the kernels take: ``KernelError``, or ``PlanError``.

    A plan's values are looked at on the CPU only: on a GPU the host would wait for them. There
    ``BlockPlan.load`` and whoever makes a plan by hand validate it once.
    """
    if query.ndim != 4:
        raise KernelError(
            f"query must be [batch, seq_len, heads, head_dim], got {tuple(query.shape)}"
        )
    _check_tensors(query, (("key", key, plan.key_length), ("value", value, plan.key_length)))
    _check_scale(scale)
    if plan.device != query.device:
        raise KernelError(f"the plan is on {plan.device}, the query on {query.device}")
    if query.shape[1] != plan.query_length:
        raise KernelError(f"plan is for {plan.query_length} query tokens, got {query.shape[1]}")
    for name, mine, called in (
        ("samples", plan.batch, query.shape[0]),
        ("heads", plan.heads, query.shape[2]),
    ):
        if mine not in {1, called}:
            raise KernelError(f"plan is for {mine} {name}, query has {called}")
    if plan.device.type == "cpu":
        plan.validate()
