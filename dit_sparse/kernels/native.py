# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on the CPU by compiled code, reached through ctypes (``native/*.cpp``).

The whole plan contract in fp32, bf16 and fp16 (arithmetic in fp32), bit tiles included. Torch's
own threads take query blocks from one counter until none is left; Python's lock is free meanwhile.
Scratch memory is some hundred kilobytes a thread, whatever the length.

Compiled code is for ordinary numbers: where a query, key or value that takes part is NaN,
infinite or so large that sums could overflow, ``attend`` gives None and the torch kernel
(``cpu.py``) is to compute the call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.errors import KernelError, NativeUnavailable
from dit_sparse.kernels import native_library

if TYPE_CHECKING:
    from torch import Tensor

    from dit_sparse.core.grid import BlockLayout
    from dit_sparse.core.plan import BlockPlan

HAS_BACKWARD = False
# Relative error of an exponential: 3 units in the last place of fp32, measured, and as much again
# and more for its argument, which is rounded once more for a power of 2.
EXP_ERROR = 8 * 2.0**-24
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INSTRUCTION_SETS = {"avx2": 1, "avx512": 2, "neon": 4, "wide": 8}  # bits, best last but for wide
BEST_FIRST = ("avx512", "avx2", "neon")
WORTH_A_THREAD = 1e7  # multiply-adds: a third of a millisecond, some times what a thread costs
DONE, NOT_FINITE, NO_MEMORY, NO_INSTRUCTIONS = range(4)

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Call(ctypes.Structure):
    """``struct Call`` of ``native/call.h``, field by field."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value", "output", "lse", "mass")),
        *((f"{name}_strides", _Long * 3) for name in ("query", "key", "value", "output")),
        *((name, _Long) for name in ("batch", "heads", "tokens", "kv_tokens", "head_dim")),
        *((name, _Long) for name in ("q_blocks", "kv_blocks", "cap", "q_slots", "kv_slots")),
        *((name, _Long) for name in ("tile_rows", "tile_words")),
        *(
            (f"{name}_lead", _Long * 2)
            for name in ("q", "kv", "list", "q_permutation", "kv_permutation", "weight")
        ),
        *((name, _Pointer) for name in ("q_starts", "q_lengths", "kv_starts", "kv_lengths")),
        *((name, _Pointer) for name in ("kv_indices", "kv_num_blocks", "partial", "tiles")),
        *((name, _Pointer) for name in ("q_permutation", "kv_permutation", "log_weight")),
        ("order", _Pointer),
        ("next", _Long),
        ("dtype", _Int),
        ("stop", _Int),
        ("scale", ctypes.c_float),
        ("careful", _Int),
        ("instruction_set", _Int),
        ("result", _Int),
    )


def instruction_sets() -> list[str]:
    """Name the instruction sets that the library holds and this processor has, best first."""
    return _instruction_sets(native_library.load())


@cache
def _instruction_sets(library: ctypes.CDLL) -> list[str]:
    found = library.dit_sparse_instruction_sets()
    return [name for name in BEST_FIRST if found & INSTRUCTION_SETS[name]]


def reasons_against(query: Tensor, plan: BlockPlan) -> list[str]:
    """Say why this kernel cannot run the call, a reason a line; empty: it can."""
    del plan
    reasons = []
    if query.device.type != "cpu":
        return [f"runs on the CPU, query is on {query.device}"]
    if query.dtype not in DTYPES:
        reasons.append(f"computes {', '.join(map(str, DTYPES))}, query is {query.dtype}")
    if reason := missing():
        reasons.append(reason)
    return reasons


def missing() -> str:
    """Say why this kernel cannot run on this machine at all, and what to do; empty: it can."""
    try:
        found = instruction_sets()
    except NativeUnavailable as error:
        return str(error)
    return "" if found else f"needs one of {', '.join(BEST_FIRST)}, which this CPU lacks"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Attend each query to the keys that its plan keeps.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``, any strides.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        value: Like ``key``.
        plan: Which blocks each query block reads; on the CPU.
        scale: Multiplies the scores before softmax.
        instruction_set: One of ``INSTRUCTION_SETS``, for tests; the best where None.

    Returns:
        Output like ``query``; LSE fp32 ``[batch, heads, seq_len]``, natural log; 0 and -inf where
        a query keeps nothing. None: some number is not finite, or beyond 2^57 in size.
    """
    result = _attend(query, key, value, plan, scale, None, instruction_set)
    return None if result is None else result[:2]


def attend_with_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Attend, and sum the weights of each block pair on the way.

    Returns:
        As ``attend``, and the mass, fp32 ``[batch, heads, q_blocks, kv_blocks]``: 0 where a pair
        is dropped; a row sums to its block's query tokens.
    """
    mass = torch.zeros(query.shape[0], query.shape[2], plan.q.blocks, plan.kv.blocks)
    result = _attend(query, key, value, plan, scale, mass, instruction_set)
    return None if result is None else (*result[:2], mass)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    q: BlockLayout,
    kv: BlockLayout,
    scale: float,
    instruction_set: str | None = None,
) -> Tensor | None:
    """Sum ``exp(scale * q k^T - lse)`` over each block pair.

    Keys in no block count nowhere, nor do queries whose LSE is -inf.

    Args:
        query: ``[batch, seq_len, heads, head_dim]``; slots are tokens.
        key: ``[batch, kv_seq_len, heads, head_dim]``.
        lse: Of the dense attention, ``[batch, heads, seq_len]``, natural log.
        q: Query blocks.
        kv: Key blocks.
        scale: Multiplies the scores.
        instruction_set: See ``attend``.

    Returns:
        fp32 ``[batch, heads, q_blocks, kv_blocks]``; None: see ``attend``.
    """
    query, key = (_rows(x.detach()) for x in (query, key))
    mass = torch.zeros(query.shape[0], query.shape[2], q.blocks, kv.blocks)
    lse = lse.detach().float().contiguous()
    call, held = _Call(), [query, key, lse, mass]
    _describe(call, query, key, None, None, lse, mass, scale)
    _lay_out_sides(call, q, kv, held)
    keys = float(kv.lengths.sum(-1).double().mean())
    return mass if _run(call, keys, instruction_set) else None


@torch.no_grad()
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    mass: Tensor | None,
    instruction_set: str | None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    query, key, value = (_rows(x.detach()) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(batch, heads, tokens)
    laid_out, _ = plan.once("native", lambda: _lay_out(plan))
    call = _Call.from_buffer_copy(laid_out)
    _describe(call, query, key, value, output, lse, mass, scale)
    kept = plan.once("kept blocks", lambda: float(plan.kv_num_blocks.double().mean()))
    keys = kept * plan.kv.max_length
    return (output, lse, mass) if _run(call, keys, instruction_set) else None


def _describe(
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    output: Tensor | None,
    lse: Tensor,
    mass: Tensor | None,
    scale: float,
) -> None:
    """Describe the tensors of a call; whoever runs it holds them."""
    for name, x in (("query", query), ("key", key), ("value", value), ("output", output)):
        if x is not None:
            setattr(call, name, x.data_ptr())
            setattr(call, f"{name}_strides", (_Long * 3)(*x.stride()[:3]))
    call.lse = lse.data_ptr()
    call.mass = None if mass is None else mass.data_ptr()
    call.batch, call.tokens, call.heads, call.head_dim = query.shape
    call.kv_tokens = key.shape[1]
    call.dtype, call.scale = DTYPES[query.dtype], scale


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _lay_out(plan: BlockPlan) -> tuple[_Call, list[Tensor]]:
    """Put a plan's tensors into a call, and give those that must be held while it is used."""
    call = _Call()
    held: list[Tensor] = []
    _lay_out_sides(call, plan.q, plan.kv, held)
    call.cap = plan.kv_indices.shape[-1]
    _put(call, held, "kv_indices", plan.kv_indices, "list_lead")
    _put(call, held, "kv_num_blocks", plan.kv_num_blocks)
    _put(call, held, "q_permutation", plan.q_permutation, "q_permutation_lead")
    _put(call, held, "kv_permutation", plan.kv_permutation, "kv_permutation_lead")
    _put(call, held, "log_weight", plan.kv_log_weight, "weight_lead")
    if plan.partial is not None and plan.tiles is not None and len(plan.tiles):
        _put(call, held, "partial", plan.partial)
        _put(call, held, "tiles", plan.tiles)
        call.tile_rows, call.tile_words = plan.tiles.shape[1:]
    return call, held


def _lay_out_sides(call: _Call, q: BlockLayout, kv: BlockLayout, held: list[Tensor]) -> None:
    call.q_blocks, call.kv_blocks = q.blocks, kv.blocks
    call.q_slots, call.kv_slots = q.slots, kv.slots
    _put(call, held, "q_starts", q.starts, "q_lead")
    _put(call, held, "q_lengths", q.lengths)
    _put(call, held, "kv_starts", kv.starts, "kv_lead")
    _put(call, held, "kv_lengths", kv.lengths)


def _put(
    call: _Call, held: list[Tensor], name: str, tensor: Tensor | None, lead: str | None = None
) -> None:
    if tensor is None:
        return
    tensor = tensor.contiguous()
    held.append(tensor)
    setattr(call, name, tensor.data_ptr())
    if lead is not None:
        setattr(call, lead, (_Long * 2)(*tensor.shape[:2]))


def _run(call: _Call, keys: float, instruction_set: str | None) -> bool:
    """Compute a call in as many threads as torch has and the work is worth; False: not finite."""
    name = instruction_sets()[0] if instruction_set is None else instruction_set
    if name not in INSTRUCTION_SETS:
        raise KernelError(
            f"instruction_set must be one of {', '.join(INSTRUCTION_SETS)}, got {name!r}"
        )
    work = call.batch * call.heads * call.tokens * call.head_dim * keys
    pieces = call.batch * call.heads * call.q_blocks
    threads = max(1, min(torch.get_num_threads(), pieces, int(work / WORTH_A_THREAD)))
    call.instruction_set = INSTRUCTION_SETS[name]
    _run_team(call, threads)
    if call.result == NOT_FINITE:
        call.next, call.stop, call.result, call.careful = 0, 0, DONE, 1  # it may take no part
        _run_team(call, threads)
    if call.result == NO_MEMORY:
        raise MemoryError(
            "native attention: out of memory for the scratch buffers, a few 100 kB per thread"
        )
    if call.result == NO_INSTRUCTIONS:
        raise KernelError(f"native attention: this CPU does not support {name}")
    return bool(call.result == DONE)


def _run_team(call: _Call, count: int) -> None:
    """Run the compiled code in ``count`` threads at once."""
    work = native_library.load().dit_sparse_work
    parallel = _openmp()
    if parallel is not None:
        parallel(work, ctypes.byref(call), count, 0)
        return
    threads = [Thread(target=work, args=(ctypes.byref(call),)) for _ in range(count - 1)]
    for thread in threads:
        thread.start()
    try:
        work(ctypes.byref(call))
    finally:
        for thread in threads:
            thread.join()


@cache
def _openmp() -> Any:
    """Find what starts a parallel region of torch's own OpenMP threads; None: torch has none.

    After each operation of torch its threads spin for some milliseconds: others beside them get
    half of a core, where these take the work at once.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).is_file():
            # A library's handle finds the names of all that it was linked with, too.
            parallel = getattr(ctypes.CDLL(str(folder / name)), "GOMP_parallel", None)
            if parallel is not None:
                parallel.argtypes = [_Pointer, _Pointer, ctypes.c_uint, ctypes.c_uint]
                parallel.restype = None
            return parallel
    return None
