"""What every backend is: the functions of SPEC.md §8, documented here once for all frameworks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.containers import Lookup, Losses, Memory, State, Trace
from fwpkm.packing import PackedState
from fwpkm.tokens import Array


class Backend(Protocol):
    """The memory in one framework; :func:`fwpkm.get_backend` returns the module that is one.

    Arrays are the framework's own. Each function raises ValueError where an argument does not fit, and names it, what
    was expected and what was received; what only values can show (positions, ``cu_seqlens``, ``rows``) is checked
    wherever they are known, so not while they are traced. ``cfg`` is a :class:`fwpkm.FwPKMConfig`, static under
    ``jax.jit``; a backend refuses one with a value that it does not implement, or with a field that it does not know
    and that is not at its default.

    States are values: a function returns a new one and leaves its argument as it was. In torch and NumPy ``apply``,
    ``flush``, ``reset`` and ``put`` take ``inplace=True``, which lets them overwrite their first state instead of
    copying its tables; JAX callers donate it. What torch adds to a signature stands on its functions.
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
        """A state of B rows at position 0 that own a copy of ``memory`` (SPEC.md §5).

        In "sequence" scope every row has tables of its own: those of ``memory`` with M = 1, or row r of M = B. In
        "batch" scope all rows share M = 1. Gradients flow from the state to ``memory``.

        Raises:
            ValueError: the tables fit neither ``cfg`` nor ``batch_size``, or are narrower than float32.
        """
        ...

    def apply(
        self,
        cfg: FwPKMConfig,
        state: State | Memory,
        query: Array,
        value: Array,
        gate: Array | None = None,
        mask: Array | None = None,
        cu_seqlens: Array | None = None,
        update: bool = True,
    ) -> tuple[Array, Any, Trace]:
        """Read T tokens of each row and write every chunk that a row completes (SPEC.md §5).

        Every row has its own clock: the tokens that it is given may differ in number, and rows may stand at different
        positions. The result is that of each row's unmasked tokens alone.

        Args:
            cfg: the configuration.
            state: where the B rows stand. Or a Memory with M = 1, from which every row begins, and nothing is kept
                that only a later call would read.
            query: ``[B, T, H*Dk]``, any floating dtype; packed ``[1, T, H*Dk]``.
            value: ``[B, T, Dv]``; packed ``[1, T, Dv]``.
            gate: ``[B, T]`` in [0, 1], or None for 1; packed ``[1, T]``.
            mask: ``[B, T]`` bool, or None for True; packed ``[1, T]``. A token with False is not there: it reads and
                writes nothing and takes no position ("batch" scope: a tick of the common clock). What it holds, NaN
                too, changes nothing.
            cu_seqlens: ``[B+1]`` int32 where the call is packed, else None: row i of the state reads the tokens
                [cu_i, cu_{i+1}) of the one row, which may be none; those from cu_B on are as masked. "sequence" scope.
                Where its numbers are traced and break a rule nobody can raise: every token that is not masked then
                reads NaN, weights too, and nothing is written and no clock moves.
            update: False only reads: the state comes back as it was, and no chunk is written. A Python bool.

        Returns:
            output ``[B, T, Dv]`` (packed ``[1, T, Dv]``) in the query's dtype: 0 for masked tokens, NaN for those that
            are not finite; the next :class:`fwpkm.State`, or None for a Memory; the trace.

        Raises:
            ValueError: an argument does not fit; tables narrower than float32; ``cu_seqlens`` that does not begin with
                0, falls or ends past T; a negative position, or unequal ones in "batch" scope.
        """
        ...

    def flush(self, cfg: FwPKMConfig, state: State, rows: Any = None) -> tuple[State, Trace]:
        """Write the pending chunk of every row, or of ``rows``, empty it and restart their count (SPEC.md §5).

        Args:
            cfg: the configuration.
            state: where the B rows stand.
            rows: None for all, distinct integers, or a bool array ``[B]``. In "batch" scope all rows.

        Returns:
            the state, in which those rows stand at position 0, and the trace of that write: losses ``[M, 1]``, writes
            ``[M]``, 1 where more than lag tokens were pending (L under "wait", else 0), slots and weights
            ``[B, 0, H*k]``.

        Raises:
            ValueError: the state does not fit ``cfg``; ``rows`` out of range or named twice, or some but not all of
                those that share one table.
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
            mask: ``[B, n]`` bool, False for tokens that are not there; None for True.
            pair: ``[B, n]`` bool, which tokens have a target; None for all that are unmasked and finite.

        Returns:
            the new tables and the losses ``[M]``.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        ...

    def detach(self, state: State) -> State:
        """The state without its gradient history: truncated backpropagation between calls."""
        ...

    def reset(self, cfg: FwPKMConfig, state: State, memory: Memory, rows: Any = None) -> State:
        """Make rows what :meth:`init_state` makes: initial tables, nothing pending, position 0 (SPEC.md §5).

        Args:
            cfg: the configuration.
            state: where the B rows stand.
            memory: the initial tables: one row for all, or B rows, of which row r of the state takes row r.
            rows: None for all, distinct integers, or a bool array ``[B]``. In "batch" scope all rows.

        Raises:
            ValueError: tables of other shapes; ``rows`` out of range or named twice, or some but not all of those that
                share one table.
        """
        ...

    def select(self, cfg: FwPKMConfig, state: State, rows: Any) -> State:
        """A state of the rows named by ``rows``, in that order; an integer may be repeated (SPEC.md §5).

        Where one row is all that is named, torch and NumPy may let its copies share one table until they are written.
        In "batch" scope the one memory stays.

        Args:
            cfg: the configuration.
            state: where the B rows stand.
            rows: integers from 0 on, or a bool array ``[B]``; at least one row.

        Raises:
            ValueError: no row, one out of range, or the state does not fit ``cfg``.
        """
        ...

    def concat(self, cfg: FwPKMConfig, states: Sequence[State]) -> State:
        """One state of the rows of all ``states``, in order; "sequence" scope only (SPEC.md §5).

        Raises:
            ValueError: "batch" scope, no state, one that does not fit ``cfg``, or tables of different dtypes.
        """
        ...

    def put(self, cfg: FwPKMConfig, state: State, rows: Any, other: State) -> State:
        """The state with row i of ``other`` in place of its row ``rows[i]``; "sequence" scope only (SPEC.md §5).

        Args:
            cfg: the configuration.
            state: where the B rows stand.
            rows: distinct integers in any order, a bool array ``[B]``, or None for all; as many as ``other`` has.
            other: a state of the same ``cfg`` and dtype.

        Raises:
            ValueError: "batch" scope, ``rows`` out of range or named twice, or ``other`` of another size or dtype.
        """
        ...

    def pending(self, cfg: FwPKMConfig, state: State) -> Array:
        """How many tokens of each row no write has consumed yet: ``[B]`` int32, at most C + L - 1 (SPEC.md §5).

        Raises:
            ValueError: the state does not fit ``cfg``.
        """
        ...

    def nbytes(self, state: State) -> int:
        """The bytes that a state takes, a table that rows share counted once."""
        ...

    def pack(self, cfg: FwPKMConfig, state: State, memory: Memory, dtype: str | None = None) -> PackedState:
        """A state as what it holds beyond the initial memory, in NumPy arrays on the host (SPEC.md §10).

        Kept are the rows of the value table that differ from the initial memory's by their bits (-0.0 and 0.0 differ,
        a NaN and itself do not), all keys, the pending tokens that are there, and the positions: for rows at least ten
        wide at most 1.1 · 4·Dv bytes a row, keys, tokens and 64 KiB. The state is left as it was, and shares nothing
        with the result. To pack some rows, :meth:`select` them first.

        Args:
            cfg: the configuration that the state was made with.
            state: where the B rows stand; outside of what is compiled or traced.
            memory: the initial memory that it began from: one row for all, or B rows, of which row r is row r's.
            dtype: None keeps the rows' bits. "bfloat16" rounds float32 rows of values to nearest, at half the bytes,
                with a relative error of at most 2⁻⁸ (absolute 2⁻¹³⁴ below 2⁻¹²⁶); keys and tokens keep their bits.

        Raises:
            ValueError: state or memory do not fit ``cfg`` or each other, another ``dtype``, or arrays that are traced.
        """
        ...

    def unpack(self, cfg: FwPKMConfig, packed: PackedState | Sequence[PackedState], memory: Memory) -> State:
        """The state that was packed, by whichever backend, bit for bit unless it was rounded (SPEC.md §10).

        Args:
            cfg: the configuration that it was packed with.
            packed: what :meth:`pack` returned, or a list: then one state of the rows of all, in order ("batch" scope:
                one only).
            memory: the initial memory that it was packed beside: one row for all, or as many rows as the result has.

        Returns:
            a state of this backend's arrays, which shares nothing with ``packed`` or ``memory``.

        Raises:
            ValueError: another configuration or initial memory, other dtypes, or arrays that do not fit each other.
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
