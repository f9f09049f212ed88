"""The value table (SPEC.md §2 to §4): what a window reads, and the rows that a chunk rewrites.

M memories, R tokens a memory, each with K = H·k entries.
"""

from keras import ops

from fwpkm.backends.keras.tokens import finite_rows
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Array


def rows_of(values: Array, slots: Array) -> Array:
    """``[M, R, K]``: slots as rows of all tables ``[M*N, Dv]``."""
    first = ops.arange(ops.shape(values)[0], dtype=slots.dtype) * values.shape[1]
    return slots + first[:, None, None]


def read(values: Array, place: Array, weights: Array) -> Array:
    """v̂ = Σ w · row ``[M, R, Dv]``: values [M, N, Dv], place and weights [M, R, K]."""
    # No product of matrices: a GPU may round its factors.
    return ops.sum(weights[..., None] * ops.take(_flat(values), place, axis=0), axis=2)


def write(
    cfg: FwPKMConfig, values: Array, place: Array, pull: Array, error: Array, pair: Array, counted: Array, active: Array
) -> Array:
    """The table after one chunk: rows - η (clip(G) + λ rows) where a counted token has read (§4).

    Args:
        cfg: the configuration.
        values: ``[M, N, Dv]``.
        place: ``[M, R, K]`` rows of all tables.
        pull: ``[M, R, K]``: κ g w of each entry, 0 without a pair.
        error: ``[M, R, Dv]``: v̂ - u, 0 without a pair.
        pair: ``[M, R]`` bool.
        counted: ``[M, R]`` bool: tokens whose reads count in N_i.
        active: ``[M]`` bool: the memories in which the chunk has a pair.

    Returns:
        ``[M, N, Dv]``. Rows that are not written, or whose new value would not be finite, keep their bits.
    """
    width, entries = values.shape[2], ops.reshape(place, (-1,))
    number = ops.arange(ops.shape(entries)[0], dtype=entries.dtype)
    # One entry of each slot leads: it collects what the others bring, so that no sum is as large as the table.
    leader = ops.take(ops.segment_max(number, entries, ops.shape(values)[0] * values.shape[1]), entries, axis=0)

    def total(x: Array) -> Array:
        return ops.segment_sum(ops.reshape(x, (-1, x.shape[-1])), leader, ops.shape(entries)[0])

    def per_entry(flags: Array) -> Array:
        spread = ops.broadcast_to(ops.cast(flags, values.dtype)[..., None], ops.shape(place))
        return ops.stop_gradient(spread)[..., None]

    # An error that overflowed makes its rows not finite; autodiff must not meet it.
    wild = pair & ~finite_rows(error)
    error = ops.where(wild[..., None], ops.zeros((), dtype=error.dtype), error)
    count, spoiled = total(per_entry(counted)), total(per_entry(wild)) > 0
    gradient = total(pull[..., None] * error[:, :, None, :]) / ops.maximum(count, 1)
    if cfg.grad_clip is not None:
        gradient = ops.clip(gradient, -cfg.grad_clip, cfg.grad_clip)
    rows, leads = ops.take(_flat(values), entries, axis=0), (leader == number)[:, None]
    new = rows - cfg.learning_rate * (gradient + cfg.weight_decay * rows)
    moves = leads & (count > 0) & ~spoiled & finite_rows(new)[:, None]
    moves &= ops.reshape(per_entry(active[:, None] & ops.ones_like(counted)), (-1, 1)) > 0
    new = ops.where(moves, new, rows)
    # All entries of a slot write what its leader does, and the leader alone passes the gradient on.
    new = ops.where(leads, new, ops.take(ops.stop_gradient(new), leader, axis=0))
    return ops.reshape(ops.scatter_update(_flat(values), entries[:, None], new), (-1, *values.shape[1:2], width))


def _flat(values: Array) -> Array:
    """``[M*N, Dv]``."""
    return ops.reshape(values, (-1, values.shape[2]))
