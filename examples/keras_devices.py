"""Several devices in Keras on JAX: DataParallel, and ModelParallel with the table's columns dealt out.

A small model is trained on one device and on all, by rows, and by rows and columns; it is evaluated, saved, and loaded
on one device. All of it gives what one device gives.

On a machine with one CPU: XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/keras_devices.py
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import distribution as ways

from fwpkm.backends.keras import FwPKM

text = np.random.default_rng(0).integers(1, 32, (16, 33))


def by_rows():
    """Each device holds some rows of the batch."""
    return ways.DataParallel(devices=ways.list_devices())


def by_rows_and_columns():
    """Two devices deal out rows, and those that share a row its table's columns."""
    devices = ways.list_devices()
    mesh = ways.DeviceMesh((2, len(devices) // 2), ("batch", "columns"), devices)
    layouts = ways.LayoutMap(mesh)
    layouts["memory/memory_values"] = (None, "columns")
    return ways.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def trained(distribution):
    """A model, its losses while it was trained, and its loss afterwards."""
    ways.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    tokens = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(32, 16)(tokens)
    memory = FwPKM(key_dim=16, value_dim=16, num_subkeys=16, top_k=4, chunk_size=8, name="memory")
    model = keras.Model(tokens, keras.layers.Dense(32)(keras.layers.Add()([x, memory(x)])))
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(text[:, :-1], text[:, 1:], batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model, [*history.history["loss"], model.evaluate(text[:, :-1], text[:, 1:], batch_size=8, verbose=0)]


def main():
    """Train in three ways and compare."""
    _, alone = trained(None)
    for name, distribution in (("rows", by_rows()), ("rows and columns", by_rows_and_columns())):
        model, losses = trained(distribution)
        read = model.predict(text[:, :-1], batch_size=8, verbose=0)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder, "model.keras"))
            ways.set_distribution(None)
            loaded = keras.models.load_model(Path(folder, "model.keras"))
        again = loaded.predict(text[:, :-1], batch_size=8, verbose=0)
        print(
            f"{name}: worst difference of losses {np.abs(np.subtract(losses, alone)).max():.1e}, "
            f"of the loaded model {np.abs(again - read).max():.1e}"
        )


if __name__ == "__main__":
    main()
