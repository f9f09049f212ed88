"""What runs a call: XLA, or the Triton kernels through jax-triton."""

import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory

Engine = Literal["xla", "triton"]
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def choose_engine(
    implementation: str | None, cfg: FwPKMConfig, memory: Memory, query: Array, cu_seqlens: Array | None = None
) -> Engine:
    """The engine of a call with these tables and queries; None is XLA, on every device.

    Raises:
        ValueError: ``implementation`` is unknown, or "triton" and the kernels cannot serve the call.
    """
    if implementation not in (None, "triton", "xla"):
        raise ValueError(f'implementation must be None, "triton" or "xla". Received: {implementation!r}')
    if implementation != "triton":
        return "xla"
    if reason := why_unsupported(cfg, memory, query, cu_seqlens):
        raise ValueError(f'implementation="triton" cannot serve this call: {reason}')
    return "triton"


def why_unsupported(cfg: FwPKMConfig, memory: Memory, query: Array, cu_seqlens: Array | None = None) -> str | None:
    """Why ``implementation="triton"`` cannot serve a call with these tables and queries, or None where it can.

    Args:
        cfg: the configuration.
        memory: the tables, which may be traced, as all here.
        query: ``[B, T, H*Dk]``, or packed ``[1, T, H*Dk]``.
        cu_seqlens: ``[B+1]`` of packed sequences, or None.
    """
    from fwpkm.kernels import served

    reason = served.why_no_triton("jax-triton") or served.why_unsupported_config(cfg)
    reason = reason or _of_arrays(cfg, memory, query) or served.why_unsupported_tables(*memory.keys.shape[:2])
    reason = reason or _why_here(query)
    return reason or (None if cu_seqlens is None else _of_packing(cu_seqlens, query.shape[1]))


def _of_arrays(cfg: FwPKMConfig, memory: Memory, query: Array) -> str | None:
    if jax.dtypes.canonicalize_dtype(query.dtype) not in _DTYPES:  # as a call takes NumPy's
        return f"query must be float32, bfloat16 or float16. Received: {query.dtype}"
    if any(jax.dtypes.canonicalize_dtype(table.dtype) != jnp.float32 for table in memory):
        return f"tables must be float32. Received: keys {memory.keys.dtype}, values {memory.values.dtype}"
    rows = (-(-query.shape[1] // cfg.chunk_size) + 1) * len(memory.keys) * cfg.num_slots
    if rows > 2**31 - 1:
        return f"slots, counted over all memories and chunks of a call, must be below 2^31. Received: {rows}"
    for x in (query, *memory):
        sharding = getattr(jax.typeof(x) if isinstance(x, jax.core.Tracer) else x, "sharding", None)
        if isinstance(sharding, NamedSharding) and any(axis is not None for axis in sharding.spec):
            return (
                "a kernel reads the memory of one device: call it inside of jax.shard_map, which hands each device its "
                f"rows. Received: an array that is dealt out by {sharding.spec}"
            )
    return None


def _why_here(query: Array) -> str | None:
    from fwpkm.kernels.runtime.launch import INTERPRETED

    if INTERPRETED:
        missing = importlib.util.find_spec("torch") is None
        return "Triton's interpreter needs torch: pip install 'fwpkm[torch]'" if missing else None
    placed = isinstance(query, Array) and not isinstance(query, jax.core.Tracer)
    device = next(iter(query.devices())) if placed else jax.devices()[0]
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return (
            "query must be on an NVIDIA GPU; to try the kernels without one, set TRITON_INTERPRET=1 before triton is "
            f"imported. Received: query on {device}"
        )
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed: pip install 'fwpkm[jax-triton]'"
    if float(getattr(device, "compute_capability", 8)) < 8:
        return f"the GPU's compute capability must be at least 8.0. Received: {device.compute_capability}"
    return None


def _of_packing(cu_seqlens: Any, length: int) -> str | None:
    from fwpkm.kernels.served import why_unsupported_packing

    if isinstance(cu_seqlens, jax.core.Tracer):  # each may have all tokens
        reason = why_unsupported_packing([*[0] * (len(cu_seqlens) - 1), length], length)
        return reason and f"{reason}, as each may have all of them where cu_seqlens is traced: pass it as it is"
    return why_unsupported_packing(np.asarray(cu_seqlens).tolist())
