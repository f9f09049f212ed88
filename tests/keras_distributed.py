"""Run by test_keras_distribution.py in a process with four devices of JAX: prints, by case, the largest relative error
against one device, or what was raised.

Each case trains, evaluates, saves and loads a model under a distribution of Keras, in float64.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import distribution as ways

from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends.keras import FwPKM

keras.config.set_dtype_policy("float64")

ROWS, WIDTH = 8, 8
RNG = np.random.default_rng(0)
X, TARGET = RNG.normal(size=(2, 2 * ROWS, 9, WIDTH))


def model(**options: Any) -> keras.Model:
    """A memory around a residual, compiled."""
    keras.utils.set_random_seed(0)
    x = keras.Input((9, WIDTH), batch_size=ROWS, dtype="float64")
    memory = FwPKM(key_dim=8, value_dim=8, num_subkeys=8, top_k=2, chunk_size=4, name="memory", **options)
    made = keras.Model(x, keras.layers.Add()([x, memory(x)]))
    made.compile(keras.optimizers.SGD(0.1), "mse")
    return made


def of_two_axes(**layouts: Any) -> Any:
    """Rows over two devices, and what the layouts name over two more."""
    mesh = ways.DeviceMesh((2, 2), ("batch", "columns"), ways.list_devices())
    layout_map = ways.LayoutMap(mesh)
    for name, layout in layouts.items():
        layout_map[f"memory/{name}"] = layout
    return ways.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def trained(distribution: Any, **options: Any) -> tuple[keras.Model, dict[str, Any]]:
    """A model under a distribution, and what its training and evaluation gave."""
    ways.set_distribution(distribution)
    made = model(**options)
    history = made.fit(X, TARGET, batch_size=ROWS, epochs=1, shuffle=False, verbose=0)
    loss = made.evaluate(X, TARGET, batch_size=ROWS, verbose=0)
    variables = {x.path: np.asarray(x) for x in made.get_layer("memory").variables}
    return made, {"history": history.history["loss"], "evaluated": loss, **variables}


def spec_of(made: keras.Model, name: str) -> tuple[Any, ...]:
    """How a variable of the memory lies on the mesh."""
    (variable,) = (x for x in made.get_layer("memory").variables if x.name == name)
    return tuple(variable.value.sharding.spec)


def compared(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest relative error of the variables; Keras keeps losses in float32."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(np.asarray(found[name], "f8"), np.asarray(expected[name], "f8")) for name in found}
    losses = max(errors.pop("history"), errors.pop("evaluated"))
    assert losses < BOUNDS["float32"].forward, losses
    return max(errors.values())


def data_parallel(expected: dict[str, Any]) -> float:
    """Rows dealt out; saved, the model is the same on one device."""
    made, found = trained(ways.DataParallel(devices=ways.list_devices()))
    return max(compared(found, expected), reloaded(made, None))


def model_parallel(expected: dict[str, Any]) -> float:
    """Rows and the table's columns dealt out; saved, the model is the same on one device."""
    made, found = trained(of_two_axes(memory_values=(None, "columns")))
    assert spec_of(made, "memory_values") == (None, "columns")
    return max(compared(found, expected), reloaded(made, None))


def reloaded(made: keras.Model, distribution: Any) -> float:
    """What a saved and loaded model reads, against what the model reads."""
    expected = made.predict(X, batch_size=ROWS, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder, "model.keras"))
        ways.set_distribution(distribution)
        again = keras.models.load_model(Path(folder, "model.keras"))
    return relative_error(again.predict(X, batch_size=ROWS, verbose=0), expected)


USED = {"usage_weight": 0.7, "addressing_weight": 0.0}
"""Keys at rest, so that slots are read again, and their uses count."""


def stateful(options: dict[str, float], **layouts: Any) -> float:
    """A state whose rows and columns are dealt out, where its layout says so."""
    _, expected = trained(None, stateful=True, **options)
    layouts |= {
        "memory_values": (None, "columns"),
        "state_memory_keys": ("batch", None, None, None, None),
        "state_memory_values": ("batch", None, "columns"),
    }
    made, found = trained(of_two_axes(**layouts), stateful=True, **options)
    for name in layouts:
        assert spec_of(made, name) == layouts[name]
    return compared(found, expected)


def by_slots(options: dict[str, float], **layouts: Any) -> None:
    """A table, or its uses, whose slots are dealt out."""
    ways.set_distribution(of_two_axes(**layouts))
    model(stateful=True, **options)


def indivisible() -> None:
    """Eight columns for three devices."""
    mesh = ways.DeviceMesh((1, 3), ("batch", "columns"), ways.list_devices()[:3])
    layout_map = ways.LayoutMap(mesh)
    layout_map["memory/memory_values"] = (None, "columns")
    ways.set_distribution(ways.ModelParallel(layout_map=layout_map, batch_dim_name="batch"))
    model()


if __name__ == "__main__":
    _, plain = trained(None)
    cases: dict[str, Callable[[], Any]] = {
        "rows": lambda: data_parallel(plain),
        "rows and columns": lambda: model_parallel(plain),
        "stateful": lambda: stateful({}),
        "uses": lambda: stateful(USED),
        "uses by rows": lambda: stateful(USED, state_uses=("batch", None)),
        "refused: slots": lambda: by_slots({}, memory_values=("columns", None)),
        "refused: slots of a state": lambda: by_slots({}, state_memory_values=("batch", "columns", None)),
        "refused: slots of uses": lambda: by_slots(USED, state_uses=("batch", "columns")),
        "refused: columns that do not divide": indivisible,
    }
    for name, case in cases.items():
        try:
            print(json.dumps([name, case()]), flush=True)
        except Exception as error:
            print(json.dumps([name, f"{type(error).__name__}: {error}"[:2000]]), flush=True)
