"""The callback that keeps epochs and validation apart for stateful layers."""

from typing import Any

import keras

from fwpkm.backends.keras.layer import FwPKM


class ResetState(keras.callbacks.Callback):
    """Resets every stateful FwPKM layer of a model, nested ones too, before each epoch and before each evaluation.

    So an epoch reads its batches as one text from the initial memory, and so does each validation. The state after a
    validation is that of the validated text: the next epoch resets it, and so should whoever goes on after ``fit``.
    """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reset."""
        self._reset()

    def on_test_begin(self, logs: Any = None) -> None:
        """Reset."""
        self._reset()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Reset."""
        self._reset()

    def _reset(self) -> None:
        for layer in self.model._flatten_layers():
            if isinstance(layer, FwPKM) and layer.stateful:
                layer.reset_state()
