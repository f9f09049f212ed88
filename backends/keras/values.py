"""The value table (SPEC.md §2 to §4): what a window reads, and the rows that a chunk rewrites.

M memories, R tokens a memory, each with K = H·k entries.
"""

from keras import ops

from fwpkm.backends.keras.tokens import ChunkFlags, blank, finite_rows
from fwpkm.config import FwPKMConfig
from fwpkm.rules import learning_rates, step
from fwpkm.tokens import Array


def rows_of(values: Array, slots: Array) -> Array:
    """``[M, R, K]``: slots as rows of all tables ``[M*N, Dv]``."""
    first = ops.arange(ops.shape(values)[0], dtype=slots.dtype) * values.shape[1]
    return slots + first[:, None, None]


def read(values: Array, row_index: Array, weights: Array) -> Array:
    """v̂ = Σ w · row ``[M, R, Dv]`` (§2): values [M, N, Dv], row_index and weights [M, R, K]."""
    # No product of matrices: a GPU may round its factors.
    return ops.sum(weights[..., None] * ops.take(_flat(values), row_index, axis=0), axis=2)


def memorization_loss(error: Array, gate: Array, pair: Array) -> Array:
    """L_mem = Σ over tokens with a pair of ½ g ‖u - v̂‖² (§3): error = v̂ - u [M, R, Dv] -> ``[M]``."""
    return ops.sum(blank(0.5 * gate * ops.sum(ops.square(error), axis=-1), ~pair), axis=1)


def value_gradient(coefficient: Array, error: Array, count: Array, leader: Array) -> Array:
    """G_i = (1/N_i) Σ κ w g (v̂ - u) (§4), ``[M*R*K, Dv]``: each slot's at its leader.

    Args:
        coefficient: ``[M, R, K]``: κ g w.
        error: ``[M, R, Dv]``: v̂ - u, 0 without a pair.
        count: ``[M*R*K, 1]``: N_i, each slot's at its leader.
        leader: ``[M*R*K]``: the entry that stands for the slot of each.
    """
    return _total(coefficient[..., None] * error[:, :, None, :], leader) / ops.maximum(count, 1)


def write_values(
    cfg: FwPKMConfig,
    values: Array,
    uses: Array | None,
    row_index: Array,
    coefficient: Array,
    error: Array,
    flags: ChunkFlags,
) -> tuple[Array, Array | None]:
    """The table after one chunk: rows - η_i (clip(G) + λ rows) where a counted token has read (§4).

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        uses: ``[M, N]``: U; None where all rows move by η.
        row_index: ``[M, R, K]`` rows of all tables.
        coefficient: ``[M, R, K]``: κ g w of each entry, 0 without a pair.
        error: ``[M, R, Dv]``: v̂ - u, 0 without a pair.
        flags: which tokens count, and which have a pair.

    Returns:
        ``[M, N, Dv]``, where rows that are not written, or whose new value would not be finite, keep their bits; and U
        with the N_i of this write.
    """
    entries = ops.reshape(row_index, (-1,))
    number = ops.arange(ops.shape(entries)[0], dtype=entries.dtype)
    # One entry of each slot leads: it collects what the others bring, so that no sum is as large as the table.
    leader = ops.take(ops.segment_max(number, entries, ops.shape(values)[0] * values.shape[1]), entries, axis=0)

    def per_entry(token_flags: Array) -> Array:
        repeated = ops.broadcast_to(ops.cast(token_flags, values.dtype)[..., None], ops.shape(row_index))
        return ops.stop_gradient(repeated)[..., None]

    counted = flags.counted & flags.active[:, None]
    # An error that overflowed makes its rows not finite; autodiff must not meet it.
    nonfinite = flags.pair & ~finite_rows(error)
    count, spoiled = _total(per_entry(counted), leader), _total(per_entry(nonfinite), leader) > 0
    gradient = value_gradient(coefficient, blank(error, nonfinite), count, leader)
    rows, leads = ops.take(_flat(values), entries, axis=0), (leader == number)[:, None]
    rates, uses = (None, None) if uses is None else _use(cfg, uses, entries, count[:, 0])
    new = step(ops, cfg, rows, gradient, rates)
    new = ops.where(leads & (count > 0) & ~spoiled & finite_rows(new)[:, None], new, rows)
    # All entries of a slot write what its leader does, and the leader alone passes the gradient on.
    new = ops.where(leads, new, ops.take(ops.stop_gradient(new), leader, axis=0))
    return ops.reshape(ops.scatter_update(_flat(values), entries[:, None], new), (-1, *values.shape[1:])), uses


def _use(cfg: FwPKMConfig, uses: Array, entries: Array, count: Array) -> tuple[Array, Array]:
    """η_i at the leader of each slot ``[M*R*K]``, and U + N ``[M, N]``, from ``count`` [M*R*K]: N_i at leaders, else 0.

    A row counts as used though its new value may turn out not to be finite.
    """
    flat = ops.reshape(ops.stop_gradient(uses), (-1,))
    rates = learning_rates(cfg, ops.maximum(count, 1), ops.take(flat, entries, axis=0))
    return rates, ops.reshape(flat + ops.segment_sum(count, entries, ops.shape(flat)[0]), ops.shape(uses))


def _total(x: Array, leader: Array) -> Array:
    """``[M, R, K, n] -> [M*R*K, n]``: the sum over each slot's entries, at its leader."""
    return ops.segment_sum(ops.reshape(x, (-1, x.shape[-1])), leader, ops.shape(leader)[0])


def _flat(values: Array) -> Array:
    """``[M*N, Dv]``."""
    return ops.reshape(values, (-1, values.shape[2]))
