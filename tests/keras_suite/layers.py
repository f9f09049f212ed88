"""Small layers, inputs and models for these tests, and gradients on whichever backend runs."""

import keras
import numpy as np
from keras import ops

from fwpkm.backends.keras import FwPKM

BACKEND = keras.backend.backend()
HIDDEN = 6
SMALL = {"key_dim": 4, "value_dim": 3, "num_heads": 2, "num_subkeys": 4, "top_k": 2, "chunk_size": 4}


def make(batch=None, **options):
    """A built layer whose weights are large enough that every term matters."""
    keras.utils.set_random_seed(1)
    layer = FwPKM(**SMALL | options)
    layer.build((batch, None, HIDDEN))
    rng = np.random.default_rng(1)
    tensors = layer.export_tensors()
    layer.import_tensors({name: x + 0.5 * rng.normal(size=x.shape).astype(x.dtype) for name, x in tensors.items()})
    return layer


def inputs(length=11, batch=4, dtype="float32"):
    return np.random.default_rng(2).normal(size=(batch, length, HIDDEN)).astype(dtype)


def native(array):
    """In its own dtype: Keras would make float32 of a float64 array."""
    return ops.convert_to_tensor(array, dtype=array.dtype.name)


def numpy(tree):
    """Arrays and weights as NumPy arrays, bfloat16 and float16 as float32; None as it is."""
    return keras.tree.map_structure(_numpy, tree)


def _numpy(x):
    if x is None:
        return None
    low = "float16" in keras.backend.standardize_dtype(x.dtype)
    return ops.convert_to_numpy(ops.cast(x, "float32") if low else x)


def gradients(layer, x, cotangent, **options):
    """Gradients of Σ y · cotangent, by name: of the layer's trainable weights, and of x as "x"."""
    weights, x = layer.trainable_weights, native(x)

    def loss(y):
        return ops.sum(ops.where(ops.isfinite(y), y, 0) * native(cotangent))

    if BACKEND == "tensorflow":
        import tensorflow

        with tensorflow.GradientTape() as tape:
            tape.watch(x)
            value = loss(layer(x, **options))
        found = tape.gradient(value, [x, *(weight.value for weight in weights)])
    elif BACKEND == "jax":
        import jax

        def value_of(x, *trainable):
            frozen = [weight.value for weight in layer.non_trainable_variables]
            return loss(layer.stateless_call(trainable, frozen, x, **options)[0])

        every = tuple(range(len(weights) + 1))
        found = jax.grad(value_of, every)(x, *(weight.value for weight in weights))
    else:
        for weight in weights:
            weight.value.grad = None
        x.requires_grad_()
        loss(layer(x, **options)).backward()
        found = [x.grad, *(weight.value.grad for weight in weights)]
    names = ["x", *(weight.name for weight in weights)]
    return {name: ops.convert_to_numpy(gradient) for name, gradient in zip(names, found, strict=True)}


def memory_model(batch_size=None, **options):
    """A model of one layer and a projection, the same each time.

    At rate 1 crowded slots overshoot, and each write multiplies what rounding differs by.
    """
    keras.utils.set_random_seed(1)
    x = keras.Input((None, HIDDEN), batch_size=batch_size)
    return keras.Model(x, keras.layers.Dense(1)(FwPKM(**SMALL | {"learning_rate": 0.1} | options)(x)))
