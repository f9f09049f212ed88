"""What every backend is: the functions of SPEC.md §8, documented here once for all frameworks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.tokens import Array


class Backend(Protocol):
    """The memory in one framework; :func:`fwpkm.get_backend` returns the module that is one.

    Arrays are the framework's own. Functions are pure, but for ``inplace=True``. Each raises ValueError where an
    argument does not fit, and names it, what was expected and what was received. ``cfg`` is a
    :class:`fwpkm.FwPKMConfig`, static under ``jax.jit``; a backend refuses one with a value that it does not implement,
    or with a field that it does not know and that is not at its default.
    """

    __name__: str

    def init_memory(self, cfg: FwPKMConfig, memories: int = 1, seed: int = 0) -> Memory:
        """Fresh tables (SPEC.md §7), the same numbers in every backend for one seed.

        Returns:
            float32 keys ``[M, H, 2, S, Dk/2]``, uniform in ±1/√Dk, and values ``[M, N, Dv]``, normal with std 1/√Dv.

        Raises:
            ValueError: ``memories`` is not an integer of at least 1.
        """
        ...

    def init_state(self, cfg: FwPKMConfig, memory: Memory, batch_size: int) -> State:
        """A state at position 0 that owns a copy of ``memory``; M = 1 is broadcast to B rows in "sequence" scope.

        Gradients flow from the state to ``memory``.

        Raises:
            ValueError: the tables fit neither ``cfg`` nor ``batch_size``.
        """
        ...

    def apply(
        self,
        cfg: FwPKMConfig,
        state: State,
        query: Array,
        value: Array,
        gate: Array | None = None,
        mask: Array | None = None,
        update: bool = True,
    ) -> tuple[Array, State, Trace]:
        """Read T tokens and write every chunk that they complete (SPEC.md §5).

        Args:
            cfg: the configuration.
            state: where the sequence stands; left as it was, unless ``inplace`` (torch, NumPy) or donated (JAX).
            query: ``[B, T, H*Dk]``, any floating dtype.
            value: ``[B, T, Dv]``.
            gate: ``[B, T]`` in [0, 1], or None for 1.
            mask: ``[B, T]`` bool, False for tokens that never write, or None for True.
            update: False only reads: no write, nothing pending, position unchanged.

        Returns:
            output ``[B, T, Dv]`` in the query's dtype, NaN for tokens that are not finite; the next state; the trace.

        Raises:
            ValueError: an argument does not fit.
        """
        ...

    def flush(self, cfg: FwPKMConfig, state: State) -> tuple[State, Trace]:
        """Write the pending chunk, empty it and restart the count (SPEC.md §5).

        Returns:
            the state at position 0, and the trace of that write: losses ``[M, 1]``, slots and weights ``[B, 0, H*k]``.

        Raises:
            ValueError: the state does not fit ``cfg``.
        """
        ...

    def lookup(self, cfg: FwPKMConfig, memory: Memory, query: Array) -> Lookup:
        """Read the tables (SPEC.md §2).

        Args:
            cfg: the configuration.
            memory: the tables, M = B in "sequence" scope, 1 in "batch" scope.
            query: ``[B, n, H*Dk]``, any floating dtype.

        Returns:
            output ``[B, n, Dv]`` in the query's dtype, slots and weights ``[B, n, H*k]``; output and weights are NaN
            for a token whose query or selected scores are not finite.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        ...

    def chunk_update(
        self,
        cfg: FwPKMConfig,
        memory: Memory,
        query: Array,
        target: Array,
        gate: Array | None = None,
        mask: Array | None = None,
        pair: Array | None = None,
    ) -> tuple[Memory, Losses]:
        """Write one chunk (SPEC.md §4) whose targets are already shifted.

        Args:
            cfg: the configuration.
            memory: the tables to be written, M = B in "sequence" scope, 1 in "batch" scope; left as they were.
            query: ``[B, n, H*Dk]``, any floating dtype.
            target: ``[B, n, Dv]``, u_t.
            gate: ``[B, n]`` in [0, 1], or None for 1.
            mask: ``[B, n]`` bool, or None for True.
            pair: ``[B, n]`` bool, which tokens have a target; None for all unmasked ones.

        Returns:
            the new tables and the losses ``[M]``.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        ...

    def detach(self, state: State) -> State:
        """The state without its gradient history: truncated backpropagation between calls."""
        ...

    def reset(self, state: State, memory: Memory, rows: Any) -> State:
        """Give rows their initial memory back and mask their pending tokens; the count goes on (SPEC.md §5).

        Args:
            state: left as it was.
            memory: the initial tables, M = 1 or that of the state.
            rows: integers, or a bool mask ``[B]``; all of them where one table serves the batch.

        Raises:
            ValueError: rows out of range, some of the rows that share one table, or tables of other shapes.
        """
        ...

    def asarray(self, x: Any, dtype: str) -> Array:
        """``x`` as an array of the named dtype, such as "float32" or "bool"."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """The numbers of an array; bfloat16, which NumPy lacks, as float32."""
        ...

    def device_name(self) -> str:
        """Where this backend runs: "cpu", or the accelerator's platform and name."""
        ...


class DifferentiableBackend(Backend, Protocol):
    """A backend whose framework has gradients: all but NumPy's."""

    def vjp(
        self,
        fn: Callable[..., Array | tuple[Array, ...]],
        args: Sequence[Array],
        cotangents: Sequence[Array] | Array,
    ) -> tuple[Array, ...]:
        """Gradients of Σ output · cotangent with respect to every argument; zeros where one has no influence.

        Args:
            fn: takes the arguments one by one, returns an array or a tuple of arrays.
            args: floating arrays.
            cotangents: one for each output, in its shape.

        Returns:
            a gradient for each argument, in its shape.
        """
        ...
