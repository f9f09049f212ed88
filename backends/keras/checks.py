"""Checks of what a layer's call is given, on arrays and on the KerasTensors of a functional model."""

from typing import Any

from fwpkm import validation
from fwpkm.backends.keras import native
from fwpkm.backends.keras.layout import as_state


def check_call(layer: Any, x: Any, mask: Any, segment_ids: Any, initial_state: Any, return_trace: Any) -> None:
    """Raise unless the arguments of ``layer.call`` fit each other and the layer."""
    validation.check_flag("return_trace", return_trace)
    if isinstance(mask, list | tuple):
        raise ValueError(
            "mask, the second argument, must be an array [B, T]; a state is passed by name, initial_state=... "
            f"Received: {type(mask).__name__}"
        )
    native.check_sizes(x)
    validation.check_x(x, None, layer.hidden_size, object)
    check_state(layer, initial_state)
    if segment_ids is not None:
        validation.check_array("segment_ids", segment_ids, [("B", x.shape[0]), ("T", x.shape[1])], "int", object)
        _check_packed(layer, initial_state)
        if return_trace:
            raise ValueError(
                "return_trace must be False beside segment_ids: the layer does not write sequences that end before "
                "they read it. The functions of fwpkm.get_backend('keras') trace all. Received: True"
            )
    if layer.stateful and native.is_exporting():
        raise ValueError(
            "stateful must be False in a program of torch.export, which keeps nothing between its calls: export a "
            "layer with return_state=True and pass initial_state. Received: stateful=True"
        )
    if layer.stateful and x.shape[0] not in (None, layer.batch_size):
        raise ValueError(
            f"x must have B={layer.batch_size} rows, as the stateful layer was built with: leave out the last, "
            f"smaller batch. Received: shape {tuple(x.shape)}"
        )


def check_state(layer: Any, state: Any, argument: str = "initial_state") -> None:
    """Raise unless ``state`` is None, or one whose tables nobody has rounded, and the layer would not."""
    if state is not None:
        found = as_state(state, argument)
        validation.check_not_rounded(found, layer.compute_dtype)


def _check_packed(layer: Any, initial_state: Any) -> None:
    """Raise where segment_ids would leave no row that a state could stand for."""
    if layer.return_state or layer.stateful or initial_state is not None:
        raise ValueError(
            "segment_ids must be None beside a state: each run of ids is a sequence that begins and ends in the "
            f"call. Received: segment_ids with return_state={layer.return_state}, stateful={layer.stateful}, "
            f"initial_state {'left out' if initial_state is None else 'given'}"
        )
    if layer.config.memory_scope != "sequence":
        raise ValueError(
            "segment_ids must be None where one memory serves all rows: packed sequences have a memory each. "
            f"Received: segment_ids with memory_scope={layer.config.memory_scope!r}"
        )
