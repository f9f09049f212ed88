"""What XLA copies around the kernels: prints a line of JSON for each program, its name, and how often it copies a table
and what the kernels work in.

Each launch is compiled as a call of a foreign function that aliases what jax-triton would alias, for the CPU, whose XLA
decides about copies as that of a GPU does. Nothing runs.
"""

import ctypes
import json
import re
from typing import Any

import jax
import jax.numpy as jnp

from fwpkm import FwPKMConfig
from fwpkm.backends import jax as be
from fwpkm.backends.jax import engine, launching
from fwpkm.containers import Memory

CFG = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=32, top_k=3, chunk_size=8)
BATCH, LENGTH, STEPS = 2, 19, 4


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
def _never(outputs: Any, inputs: Any) -> None:
    """What is compiled in place of a launch."""


def _stand_in() -> None:
    """Let every launch be such a call."""
    pointer, capsule = ctypes.cast(_never, ctypes.c_void_p), ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    target = capsule(pointer, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target("launch", target, platform="cpu", api_version=0)

    def call(*given: Any, out_shape: Any, input_output_aliases: Any = None, **options: Any) -> Any:
        arrays = [x for x in given if not isinstance(x, int)]
        options = {"input_output_aliases": input_output_aliases, "custom_call_api_version": 1}
        return jax.ffi.ffi_call("launch", out_shape, **options, legacy_backend_config="")(*arrays)

    launching._triton_call, engine._why_here = call, lambda query: None


def apply(state: Any, *tokens: Any) -> Any:
    """A call."""
    return be.apply(CFG, state, *tokens, implementation="triton")[:2]


def train(state: Any, *tokens: Any) -> Any:
    """A call and the gradients of its tokens."""

    def loss(*tokens: Any) -> Any:
        output, after = apply(state, *tokens)
        return output.sum(), after

    return jax.grad(loss, range(3), has_aux=True)(*tokens)


def scan(state: Any, *tokens: Any) -> Any:
    """Calls in a loop."""

    def body(state: Any, part: Any) -> Any:
        output, state = apply(state, *part)
        return state, output

    return jax.lax.scan(body, state, tuple(jnp.stack([x] * STEPS) for x in tokens))


def decode(state: Any, *tokens: Any) -> Any:
    """Tokens one by one, in a loop."""

    def body(state: Any, part: Any) -> Any:
        output, state = be.decode(CFG, state, *part, implementation="triton")
        return state, output

    return jax.lax.scan(body, state, tuple(x[:, :STEPS].swapaxes(0, 1)[:, :, None] for x in tokens))


def main() -> None:
    """Compile each with its state donated, and the first also with one that is kept."""
    _stand_in()
    shape = jax.ShapeDtypeStruct
    wide, narrow = shape((BATCH, LENGTH, 16), jnp.float32), shape((BATCH, LENGTH), jnp.float32)
    memory = Memory(shape((1, 1, 2, 32, 8), jnp.float32), shape((1, CFG.num_slots, 16), jnp.float32))
    state = jax.eval_shape(lambda memory: be.init_state(CFG, memory, BATCH), memory)
    table = f"f32[{BATCH},{CFG.num_slots},16]"
    for function, donated in ((apply, True), (train, True), (scan, True), (decode, True), (apply, False)):
        jitted = jax.jit(function, donate_argnums=(0,) * donated)
        program = jitted.lower(state, wide, wide, narrow).compile().as_text()
        copies = re.findall(r"= (\w+\[[\d,]+\])\S* copy\((%get-tuple-element)?", program)
        workspace = sum(bool(taken) and x != table for x, taken in copies)
        name = function.__name__ if donated else f"{function.__name__}, kept"
        print(json.dumps([name, sum(x == table for x, _ in copies), workspace]), flush=True)


if __name__ == "__main__":
    main()
