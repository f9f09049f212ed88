"""The Keras 3 backend: the functions of SPEC.md §8, the layer, and a callback that resets its state.

On torch and jax the functions are those of the native backend, on tensorflow they are written in keras.ops (ops.py).
"""

from fwpkm.backends.keras.callback import ResetState
from fwpkm.backends.keras.layer import FwPKM
from fwpkm.backends.keras.layout import as_state
from fwpkm.backends.keras.native import functions, start_decoding

_functions = functions()
apply = _functions.apply
asarray = _functions.asarray
chunk_update = _functions.chunk_update
concat = _functions.concat
detach = _functions.detach
device_name = _functions.device_name
flush = _functions.flush
init_memory = _functions.init_memory
init_state = _functions.init_state
lookup = _functions.lookup
nbytes = _functions.nbytes
pack = _functions.pack
pending = _functions.pending
put = _functions.put
reset = _functions.reset
select = _functions.select
to_numpy = _functions.to_numpy
unpack = _functions.unpack
vjp = _functions.vjp

__all__ = [
    "FwPKM",
    "ResetState",
    "apply",
    "as_state",
    "asarray",
    "chunk_update",
    "concat",
    "detach",
    "device_name",
    "flush",
    "init_memory",
    "init_state",
    "lookup",
    "nbytes",
    "pack",
    "pending",
    "put",
    "reset",
    "select",
    "start_decoding",
    "to_numpy",
    "unpack",
    "vjp",
]


def __dir__() -> list[str]:
    return __all__
