# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs that are not there, and read what came out.

The launches come from the package's own launchers, so tile sizes, strides and constants are those
of a real call; pointers are taken to be 16-byte aligned, as torch's are. A cubin is disassembled
for its instructions; registers and spills are what ptxas (LLVM on AMD) reports. ``loop``,
``barriers`` and ``stores`` count the instructions of the main loop, per warp and tile: all, those
that wait for other warps, and stores to shared memory other than asynchronous copies.

    TRITON_INTERPRET=0 python tests/kernels/triton/aot.py write      docs/benchmarks/aot.json
    TRITON_INTERPRET=0 python tests/kernels/triton/aot.py NAME ...   these rows, as JSON
    TRITON_INTERPRET=0 python tests/kernels/triton/aot.py all        every row, as JSON
    TRITON_INTERPRET=0 python tests/kernels/triton/aot.py changed TABLE.json

The last gives every row too. It and ``write`` compile only rows whose key is not the table's: what
a compiler makes of the same source, arguments, options and target is the same.

A row's name is ``kernel/plan/dtype/head_dim/block/target``. Plans: ``spread`` (block lists of
equal blocks), ``uneven`` (other starts), ``full`` (permutations and bit tiles too). The kernel
``dense`` is the yardstick, ``dense.py``, at the tiling of ``forward``.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_sparse.core.grid import BlockLayout
from dit_sparse.core.plan import BlockPlan
from dit_sparse.kernels import triton_target as choose
from dit_sparse.kernels.triton_attention import is_plain
from dit_sparse.kernels.triton_backward import backward_launches
from dit_sparse.kernels.triton_forward import forward_launch
from dit_sparse.kernels.triton_hopper import hopper_launch, hopper_tiling
from dit_sparse.kernels.triton_kmeans import assign_launch, update_launches
from dit_sparse.kernels.triton_mass import block_mass_launch
from dit_sparse.kernels.triton_means import add_means_launch
from tests.kernels.triton.dense import dense_launch

TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("sm_")
    else GPUTarget("hip", name, 32 if name in choose.RDNA else 64)
    for name in choose.SHARED_MEMORY
}
TABLE = Path(__file__).parents[3] / "docs" / "benchmarks" / "aot.json"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source_of(launch):
    """Specialise a launch's arguments as Triton's own launcher would."""
    names = launch.kernel.arg_names
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}

    def describe(value, path):
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTER[value.dtype]
        if isinstance(value, tuple):
            parts = [describe(part, (*path, i)) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant:
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = describe(value, (i,))
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def key_of(launch, target):
    """Hash all that decides what a launch is compiled to, but for the version of Triton."""
    options = sorted(launch.options.items())
    return hashlib.sha256(f"{source_of(launch).hash()} {options} {target}".encode()).hexdigest()


def compile_launch(launch, target):
    """Compile one launch; returns the row of the table."""
    compiled = triton.compile(
        source_of(launch),
        target=TARGETS[target],
        options=launch.options,
    )
    row = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    read = read_amd if target.startswith("gfx") else read_nvidia
    return row | read(compiled.asm)


def read_amd(asm):
    """Registers, spills and matrix instructions of an AMD kernel."""
    text = asm["amdgcn"]
    code = re.findall(r"^(\.L\w+):|^\s+([a-z]+_\w+.*)", text, re.MULTILINE)

    def field(name):
        return int(re.search(rf"\.{name}:?\s+(\d+)", text)[1])

    return {
        "registers": field("vgpr_count"),
        "spills": 4 * field("vgpr_spill_count"),  # those of SGPRs go to spare VGPR lanes
        "mfma": len(re.findall(r"\bv_mfma", text)),
        "wmma": len(re.findall(r"\bv_wmma", text)),
        **main_loop(code, r"v_mfma|v_wmma", r"s_barrier", r"ds_(write|store)"),
    }


def main_loop(code, product, barrier, store):
    """Count the instructions of the innermost loop that is densest in products.

    Args:
        code: A label or an instruction each, the other of the two is empty.
        product: What a matrix instruction looks like.
        barrier: What waiting for other warps looks like.
        store: What a store to shared memory looks like.
    """
    lines, labels, bodies = [], {}, []
    for label, line in code:
        if label:
            labels[label] = len(lines)
            continue
        lines.append(line)
        target = re.search(r"\.L\w+", line)
        if target and target[0] in labels and re.search(r"\bBRA\b|branch", line):
            bodies.append(lines[labels[target[0]] :])

    def count(body, what):
        return sum(re.search(what, line) is not None for line in body)

    body = max(bodies, key=lambda body: count(body, product) / len(body), default=[])
    if not count(body, product):
        return {}
    return {"loop": len(body), "barriers": count(body, barrier), "stores": count(body, store)}


def read_nvidia(asm):
    """Registers, spill bytes and tensor-core instructions of an NVIDIA kernel."""
    ptx = asm["ptx"]
    arch = re.search(r"\.target\s+(\w+)", ptx)[1]
    newer = float(re.search(r"\.version\s+([\d.]+)", ptx)[1]) >= 9
    ptxas = BIN / ("ptxas-blackwell" if newer or arch.startswith("sm_1") else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    code = re.findall(r"^(\.L\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": int(stores) + int(loads),
        "mma": len(re.findall(r"\bHMMA", sass)),
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "tcgen05": ptx.count("tcgen05.mma"),
        "cp_async": len(re.findall(r"\bLDGSTS", sass)),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "setmaxnreg": ptx.count("setmaxnreg"),
        "serialized": "serializ" in said.lower(),
        **main_loop(code, r"\b(H|HG|UTCH)MMA", r"\bBAR\.SYNC", r"\b(STS|STSM)\b"),
    }


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FULL = ("sm_80", "sm_90", "sm_100", "gfx942")  # their relatives get fewer rows
PLANS = ("spread", "uneven", "full")


def names():
    """Name every row of the table."""
    found = []
    for target in TARGETS:
        rows = full_names() if target in FULL else few_names()
        if target == "sm_90":
            for kernel in ("hopper", "hopper_specialized"):
                rows += [f"{kernel}/uneven/bf16/{d}/{b}" for d in (64, 128) for b in (64, 128)]
                rows += [f"{kernel}/spread/bf16/{d}/128" for d in (64, 128)]
        found += [f"{row}/{target}" for row in rows]
    return found


def few_names():
    """Name what is compiled for every kind of GPU."""
    return [
        *(f"dense/spread/bf16/{d}/128" for d in (64, 128)),
        *(f"forward/{plan}/bf16/{d}/128" for plan in ("spread", "uneven") for d in (64, 128)),
        "forward/full/bf16/128/128",
        "forward/uneven/bf16/256/128",
        "forward/uneven/fp32/128/128",
        "backward_query/uneven/bf16/128/128",
        *(f"backward_key/{plan}/bf16/128/128" for plan in ("uneven", "full")),
        "mass/spread/bf16/128/128",
        "means/uneven/bf16/128/128",
        "kmeans_assign/spread/bf16/128/128",
    ]


def full_names():
    """Name what is compiled for one kind of GPU of each family."""
    return [
        *few_names(),
        *(f"forward/uneven/bf16/{d}/128" for d in (16, 32, 72, 96)),
        *(f"forward/full/bf16/{d}/128" for d in (64, 72)),
        *(f"forward/uneven/bf16/{d}/64" for d in (64, 128)),
        *(f"forward/uneven/fp32/{d}/128" for d in (64, 256)),
        *(f"backward_{side}/uneven/bf16/{d}/128" for side in ("query", "key") for d in (64, 72)),
        *(f"backward_query/full/bf16/{d}/128" for d in (64, 128)),
        "backward_key/full/bf16/64/128",
        "backward_key/uneven/bf16/256/128",
        "mass/spread/bf16/64/128",
        *(f"means/full/{row}/128" for row in ("bf16/64", "bf16/72", "bf16/256", "fp32/128")),
        *(f"delta/spread/bf16/{d}/128" for d in (64, 72, 128)),
        *(f"kmeans_assign/spread/{row}/128" for row in ("bf16/64", "bf16/256", "fp32/128")),
        *(f"kmeans_sum/spread/bf16/{d}/128" for d in (64, 128)),
        "kmeans_mean/spread/bf16/128/128",
    ]


def plan_for(kind, block):
    """Make a plan that uses what ``kind`` says."""
    tail = [] if kind == "spread" else [1]
    layout = BlockLayout.from_lengths([*tail, block, block, block])
    plan = BlockPlan.full(layout, layout)
    if kind != "full":
        return plan
    words = -(-block // 32)
    return replace(
        plan,
        partial=torch.zeros_like(plan.kv_indices),
        tiles=torch.zeros(1, block, words, dtype=torch.int32),
        q_permutation=torch.arange(layout.slots)[None, None],
        kv_permutation=torch.arange(layout.slots)[None, None],
    )


def launch_for(name):
    """Make the launch that a row's name stands for, on empty tensors."""
    kernel, kind, dtype, head_dim, block, target = name.split("/")
    plan = plan_for(kind, int(block))
    layout = plan.q
    tensors = [
        torch.empty(2, layout.slots, 3, int(head_dim), dtype=DTYPES[dtype]) for _ in range(8)
    ]
    lse = torch.empty(2, 3, layout.slots)
    shape = (target, DTYPES[dtype], int(head_dim), int(block), int(block))
    if kernel == "dense":
        return dense_launch(*tensors[:4], choose.forward_tiling(*shape))
    if kernel == "forward":
        tiling = choose.forward_tiling(*shape, plain=is_plain(plan))
        return forward_launch(*tensors[:4], lse, plan, 0.1, tiling)
    if kernel.startswith("hopper"):
        specialize = kernel == "hopper_specialized"
        tiling = hopper_tiling(*shape[2:], specialize=specialize)
        return hopper_launch(*tensors[:4], lse, plan, 0.1, tiling)
    if kernel == "mass":
        mass = torch.empty(2, 3, layout.blocks, 1, layout.blocks)
        tiling = choose.mass_tiling(*shape)
        return block_mass_launch(*tensors[:2], lse, mass, plan.q, plan.kv, 0.1, tiling)
    if kernel == "means":
        means = [x[:, : layout.blocks] for x in tensors[1:3]]
        tiling = choose.means_tiling(*shape)
        return add_means_launch(tensors[0], *means, plan, 0.1, tensors[3], lse, tiling)
    if kernel.startswith("kmeans"):
        return kmeans_launch(kernel, tensors[0], target)
    launches = backward_launches(
        *tensors[:4], lse, tensors[4], lse, tuple(tensors[5:]), plan, 0.1,
        *choose.backward_tilings(*shape, plain=is_plain(plan)),
    )  # fmt: skip
    return launches[("delta", "backward_query", "backward_key").index(kernel)]


def kmeans_launch(kernel, points, target):
    """Make one of the launches of an iteration of k-means with 256 clusters."""
    batch, tokens, heads, head_dim = points.shape
    means, counts = torch.empty(batch, heads, 256, head_dim), torch.zeros(batch, heads, 256).int()
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32)
    if kernel == "kmeans_assign":
        tiling = choose.kmeans_tiling(target, points.dtype, head_dim, 256)
        return assign_launch(points, means.to(points.dtype), means[..., 0], labels, tiling)
    steps = ("kmeans_sum", "kmeans_mean")
    return update_launches(points, labels.long(), counts, means)[steps.index(kernel)]


def row(name, known=None):
    """Compile one row, unless ``known`` has its key; a failure is a row too."""
    launch, target = launch_for(name), name.rsplit("/", 1)[1]
    key = key_of(launch, target)
    if known is not None and known.get("key") == key:
        return known
    sizes = [launch.arguments.get(key) for key in ("BLOCK_M", "BLOCK_N")]
    tile = "x".join(str(size) for size in sizes if size)  # none: a kernel without products
    head = {"key": key, "tile": tile, "stages": launch.stages}
    try:
        return head | compile_launch(launch, target)
    except Exception as error:  # noqa: BLE001  (compilers fail in many ways: the row says how)
        return head | {"failed": f"{type(error).__name__}: {str(error).strip()[-200:]}"}


def main(wanted):
    """Print or write rows."""
    known = {}
    chosen = names() if wanted in (["write"], ["all"]) else wanted
    if wanted[0] in {"changed", "write"}:
        old = json.loads(Path(wanted[1] if wanted[1:] else TABLE).read_text())
        known = old["rows"] if old["triton"] == triton.__version__ else {}
        chosen = list(old["rows"]) if wanted[0] == "changed" else chosen
    table = {}
    for name in chosen:
        table[name] = row(name, known.get(name))
        sys.stderr.write(f"{name} {table[name]}\n")
    if wanted != ["write"]:
        sys.stdout.write(json.dumps(table))
        return
    lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items()]
    head = {"triton": triton.__version__, "command": "python tests/kernels/triton/aot.py write"}
    body = json.dumps(head, indent=2)[:-2] + ',\n  "rows": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(body)


if __name__ == "__main__":
    main(sys.argv[1:])
