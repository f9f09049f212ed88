"""Compile every kernel of a call, its backward and a decode step for a GPU that need not be here.

``python tests/compile_kernels.py 90 paper rest``: one line a kernel; any that does not compile, or needs more shared
memory than the GPU has, raises. Tensors hold no data, and what would be launched is compiled instead.
``python tests/compile_kernels.py refuse SCORE``: those that would compute something, were a choice unknown, do not.
"""

import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError

from fwpkm import FwPKMConfig
from fwpkm.containers import Memory, State
from fwpkm.kernels.left_align import left_align
from fwpkm.kernels.runtime import call, decoding, launch, windows, workspace
from fwpkm.tokens import Tokens

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What a program may use at most, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
CONFIGS = {
    "paper": (FwPKMConfig(key_dim=512, value_dim=512, num_subkeys=512, memory_scope="batch"), torch.bfloat16, False),
    "rest": (
        FwPKMConfig(key_dim=512, value_dim=512, num_subkeys=512, addressing_weight=0.0, boundary="wait"),
        torch.bfloat16, False,
    ),
    "largest": (
        FwPKMConfig(key_dim=1024, value_dim=1024, num_subkeys=2048, num_heads=4, top_k=32), torch.float32, True,
    ),
    "odd": (
        FwPKMConfig(
            key_dim=48, value_dim=80, num_subkeys=100, num_heads=3, top_k=5, score="dot_product", grad_clip=0.1,
            write_scale="normalized", boundary="wait", lookahead=3, weight_decay=0.1, usage_weight=0.5, chunk_size=256,
        ), torch.float16, True,
    ),
}  # fmt: skip


def source_of(kernel: Any, tensors: dict, integers: tuple[str, ...], constants: dict) -> tuple[ASTSource, dict]:
    """What Triton compiles of a kernel for such tensors, and its options."""
    names = kernel.arg_names
    typed = {name: "constexpr" if x is None else "*" + TYPES[x.dtype] for name, x in tensors.items()}
    fixed = {name: constants[name] for name in names if name in constants}
    fixed |= {name: None for name, x in tensors.items() if x is None}
    signature = {**typed, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    index = {name: (i,) for i, name in enumerate(names)}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in names},
        {index[name]: value for name, value in fixed.items()},
        {index[name]: [["tt.divisibility", 16]] for name, kind in typed.items() if kind != "constexpr"},
    )
    return source, options


def kernels_of(cfg: FwPKMConfig, dtype: torch.dtype, masked: bool) -> dict:
    """Each kernel with its signature and constants, as a training step and a decode step launch them."""
    found: dict = {}

    def record(self: launch.Launches, inputs: dict, *workspaces: workspace.Workspace) -> None:
        all_of_them = self.tensors(inputs, *workspaces)
        for kernel, indices, integers, constants in self.kernels:
            tensors = dict(zip(kernel.arg_names, [all_of_them[i] for i in indices]))
            source, options = source_of(kernel, tensors, integers, constants)
            found[kernel.__name__, str(sorted(source.signature.items())), str(source.constants)] = source, options

    batch, length = 2, cfg.chunk_size * 2 + 7
    memories = batch if cfg.memory_scope == "sequence" else 1
    width, pending = cfg.num_heads * cfg.key_dim, cfg.capacity

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(n: int) -> Tokens:
        mask = empty(batch, n, dtype=torch.bool) if masked else None
        query, value = (empty(batch, n, w, dtype=dtype) for w in (width, cfg.value_dim))
        return Tokens(query, value, empty(batch, n, dtype=dtype), mask)

    memory = Memory(
        empty(memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2),
        empty(memories, cfg.num_slots, cfg.value_dim),
    )
    uses = empty(memories, cfg.num_slots) if cfg.usage_weight else None
    run, launch.Launches.run = launch.Launches.run, record
    try:
        plan, stream = windows.plan(cfg, 0, length, batch, True), tokens(length)
        call.forward(cfg, plan, *memory, stream, None, save=False, dtype=dtype, uses=uses)
        residuals = call.forward(cfg, plan, *memory, stream, None, save=True, dtype=dtype, uses=uses).residuals
        d_output = empty(batch, length, cfg.value_dim, dtype=dtype)
        d_memory = memory.keys, memory.values, memory.values.shape
        call.backward(cfg, plan, stream, residuals, memories, d_output, *d_memory)
        one = memory.values[:1]  # of which calls without a state write no row
        for save in (False, True):
            residuals = call.forward(
                cfg, plan, memory.keys, one, stream, None, save, dtype, uses, overlaid=True
            ).residuals  # fmt: skip
        for table in (None, one.shape):
            call.backward(cfg, plan, stream, residuals, memories, d_output, None, None, table, initial=one)
        if memories == batch:  # streams end to end, of which one ends with the first window
            ragged = windows.ragged(cfg, length, (batch, *[1] * (len(plan.windows) - 1)))
            row = tokens(ragged.num_tokens).map(lambda x: x[:1])
            for save in (False, True):
                residuals = call.forward(
                    cfg, ragged, memory.keys, one, row, None, save, dtype, uses, overlaid=True
                ).residuals  # fmt: skip
            d_row = empty(1, ragged.num_tokens, cfg.value_dim, dtype=dtype)
            call.backward(cfg, ragged, row, residuals, memories, d_row, None, None, one.shape, initial=one)
        before = Tokens(
            empty(batch, pending, width), empty(batch, pending, cfg.value_dim), empty(batch, pending),
            empty(batch, pending, dtype=torch.bool),
        )  # fmt: skip
        clock, mask = empty(batch, dtype=torch.int32), {"token_mask": stream.mask}
        left_align(cfg, stream.query, batch, length, **mask)
        told = {**mask, "num_pending": clock, "pending_mask": before.mask}
        left_align(cfg, stream.query, batch, length + pending, **told)
        ends, begins = empty(batch + 1, dtype=torch.int32), empty(batch + 1, dtype=torch.int64)
        left_align(cfg, stream.query, batch, length + pending, cu_seqlens=ends, **told)
        order = empty(length, dtype=torch.int32)
        left_align(cfg, stream.query, batch, length, cu_seqlens=ends, begins=begins, order=order, **mask)
        decoding.decode(cfg, State.of(memory, before, empty(batch, dtype=torch.int32), uses), tokens(1))
    finally:
        launch.Launches.run = run
    return found


def check_buffers(name: str, module: str) -> None:
    """Raise where a product may still read a buffer that a copy overwrites.

    What a warp group multiplies straight from shared memory it reads until the next round, so each of its operands
    needs as many buffers as any other: Triton 3.6 makes one too few of an operand that is also used as numbers.
    """
    allocated = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", module))
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_index (%\w+)\[", module))
    read = {x for pair in re.findall(r"warp_group_dot (%\w+), (%\w+),", module) for x in pair}
    buffers = {views[x]: allocated[views[x]] for x in read if views.get(x) in allocated}
    if len(set(buffers.values())) > 1:
        raise RuntimeError(f"{name}: operands of products have different numbers of buffers: {buffers}")


def refuse(field: str) -> None:
    """Print the kernels that take a choice by name and do not compile for an unknown one; raise where one does."""
    refused, compiled = set(), set()
    kernels = kernels_of(*CONFIGS["paper"]) | kernels_of(*CONFIGS["odd"])  # of few slots a token, and of many
    for (name, *_), (source, options) in kernels.items():
        index = (source.fn.arg_names.index(field),) if field in source.fn.arg_names else None
        if index is not None:
            known: Any = source.constants[index]
            another = known._replace(name="another") if isinstance(known, tuple) else "another"
            source = ASTSource(source.fn, source.signature, source.constants | {index: another}, source.attrs)
            try:
                triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                compiled.add(name)  # what a variant leaves out it need not refuse
            except CompilationError as error:
                reason: BaseException = error
                while reason.__cause__ is not None:  # up to the function that refuses
                    reason = reason.__cause__
                assert f"do not know this {field}" in str(reason), reason
                refused.add(name)
    if compiled - refused:
        raise RuntimeError(f"compiled for an unknown {field}: {sorted(compiled - refused)}")
    print(*sorted(refused))


def main(capability: int, *configs: str) -> None:
    """Compile all that such configurations launch, or raise."""
    kernels: dict = {}
    for config in configs:
        kernels |= kernels_of(*CONFIGS[config])
    for (name, *_), (source, options) in kernels.items():
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        check_buffers(name, compiled.asm["ttgir"])
        shared = compiled.metadata.shared
        print(capability, name, f"{shared} bytes shared", flush=True)
        if shared > SHARED_BYTES[capability]:
            raise MemoryError(f"{name} needs {shared} bytes of shared memory, of {SHARED_BYTES[capability]}")


if __name__ == "__main__":
    if sys.argv[1] == "refuse":
        refuse(sys.argv[2])
    else:
        main(int(sys.argv[1]), *sys.argv[2:])
