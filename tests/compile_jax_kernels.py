"""Compile every launch of the JAX backend for a GPU that need not be here, as jax-triton is asked to.

``python tests/compile_jax_kernels.py 90 paper``: one line a kernel. Calls are traced without numbers, and what would be
handed to ``jax_triton.triton_call`` is compiled instead, its parameters in the order in which jax-triton 0.3 passes
them: arrays, integers, outputs. Raises where that is not the order of the program, where a kernel may store into what
XLA was told that it only reads, or where one does not compile.
"""

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import triton
from compile_kernels import CONFIGS, SHARED_BYTES, TYPES, check_buffers
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fwpkm import FwPKMConfig
from fwpkm.backends import jax as be
from fwpkm.backends.jax import engine, launching
from fwpkm.containers import Memory

_TYPES = {str(dtype).removeprefix("torch."): name for dtype, name in TYPES.items()}
_PTX = {"array": ("u64", "b64"), "integer": ("u32", "b32")}
"""The types of parameters in a program, in any version of Triton."""


def calls_of(cfg: FwPKMConfig, dtype: str, masked: bool) -> list[tuple[tuple, dict]]:
    """What ``triton_call`` would receive in calls from a memory and a state, a flush and a decode step."""
    received = []

    def record(*given: Any, **options: Any) -> list[jax.Array]:
        received.append((given, options))
        return [jnp.zeros(x.shape, x.dtype) for x in options["out_shape"]]

    def step(state: Any, tokens: dict, one: dict) -> Any:
        def loss(tokens: dict, memory: Memory) -> Any:
            output, after, _ = be.apply(cfg, state._replace(memory=memory), **tokens, implementation="triton")
            return output.sum(), after

        memory = Memory(*(table[:1] for table in state.memory))
        be.apply(cfg, memory, **{**tokens, "mask": None}, implementation="triton")
        gradients, after = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(tokens, state.memory)
        after, _ = be.flush(cfg, after, implementation="triton")
        return gradients, be.decode(cfg, after, **one, implementation="triton")

    shape, width = jax.ShapeDtypeStruct, cfg.num_heads * cfg.key_dim
    batch, length = 2, cfg.chunk_size * 2 + 7

    def tokens(n: int) -> dict:
        numbers = {"query": (batch, n, width), "value": (batch, n, cfg.value_dim), "gate": (batch, n)}
        mask = {"mask": shape((batch, n), bool)} if masked else {}
        return {name: shape(size, dtype) for name, size in numbers.items()} | mask

    half = cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2
    memory = Memory(shape((1, *half), jnp.float32), shape((1, cfg.num_slots, cfg.value_dim), jnp.float32))
    state = jax.eval_shape(lambda memory: be.init_state(cfg, memory, batch), memory)
    whole, why_here = launching._triton_call, engine._why_here
    launching._triton_call, engine._why_here = record, lambda query: None
    try:
        jax.eval_shape(step, state, tokens(length), tokens(1))
    finally:
        launching._triton_call, engine._why_here = whole, why_here
    return received


def source_of(given: tuple, kernel: Any, out_shape: list, constants: dict) -> ASTSource:
    """What jax-triton compiles: the first parameters by their order, the others by their names.

    It takes every array to be aligned to 16 bytes, and an integer for a constant where it equals 1.
    """
    types = ["i32" if isinstance(x, int) else f"*{_TYPES[x.dtype.name]}" for x in (*given, *out_shape)]
    signature = dict(zip(kernel.arg_names, types))
    fixed = constants | {kernel.arg_names[i]: 1 for i, x in enumerate(given) if isinstance(x, int) and x == 1}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name[0] == "*"}
    return ASTSource(kernel, {**signature, **dict.fromkeys(fixed, "constexpr")}, fixed, attrs)


def check_parameters(name: str, source: ASTSource, ptx: str) -> None:
    """Raise unless a program takes what is passed: addresses and integers in this order, then Triton's own scratch."""
    entry = re.search(r"\.entry\s+\S+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None
    taken = re.findall(r"\.param\s+\.(\w+)", entry[1])
    passed = ["array" if kind[0] == "*" else "integer" for kind in source.signature.values() if kind != "constexpr"]
    if len(taken) - len(passed) not in (0, 1, 2) or any(x not in _PTX[y] for x, y in zip(taken, passed)):
        raise RuntimeError(f"{name} takes {taken}, and would receive {passed}")


def check_stores(name: str, source: ASTSource, ttir: str, aliased: list[int]) -> None:
    """Raise where the addresses of a store come from a parameter that XLA does not know to be overwritten."""
    arguments = re.findall(r"(%\w+): ", ttir[ttir.index("tt.func") : ttir.index("\n", ttir.index("tt.func"))])
    names = [x for x, kind in source.signature.items() if kind != "constexpr"]
    origin, found = dict(zip(arguments, names, strict=True)), set()
    for line in ttir[ttir.index("tt.func") :].splitlines():  # a name may be given again in another block
        if match := re.search(r"(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims|bitcast) (%\w+)", line):
            origin[match[1]] = origin.get(match[2], "")
        elif match := re.search(r"tt\.(?:store|atomic_\w+ \w+, \w+, \w+,) (%\w+)", line):
            found.add(origin[match[1]])
    allowed = {names[i] for i in aliased}
    if not found <= allowed:
        raise RuntimeError(f"{name} stores into {sorted(found - allowed)}, of which XLA is not told")


def main(capability: int, config: str) -> None:
    """Compile them all, or raise."""
    cfg, dtype, masked = CONFIGS[config]
    seen, target = set(), GPUTarget("cuda", capability, 32)
    for given, options in calls_of(cfg, str(dtype).removeprefix("torch."), masked):
        kernel, out_shape, grid = (options.pop(name) for name in ("kernel", "out_shape", "grid"))
        aliased = options.pop("input_output_aliases", {})
        assert all(0 < n < 2**31 for n in grid)
        assert all(isinstance(x, int) or x.size for x in given), f"{kernel.fn.__name__} receives an empty array"
        both = [given[i] for i in aliased] or out_shape
        assert [(x.shape, x.dtype) for x in both] == [(x.shape, x.dtype) for x in out_shape]
        sizes = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
        source = source_of(given, kernel, out_shape, options)
        key = id(kernel), str(source.signature), str(source.constants)
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source, target=target, options=sizes)
        name = kernel.fn.__name__
        check_buffers(name, compiled.asm["ttgir"])
        check_parameters(name, source, compiled.asm["ptx"])
        check_stores(name, source, compiled.asm["ttir"], list(aliased))
        print(config, capability, name, f"{compiled.metadata.shared} bytes shared", flush=True)
        if compiled.metadata.shared > SHARED_BYTES[capability]:
            raise MemoryError(f"{name} needs {compiled.metadata.shared} bytes of shared memory")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
