"""Train a layer in PyTorch, read half a sequence, save both, and finish in JAX and in Keras: the outputs are the same.

Each framework is imported in a process of its own, as no process is safe with all of them: where TensorFlow is loaded,
Triton crashes, and PyTorch's optimizers import it. What passes between them are two files, and NumPy arrays.

Keras runs on the framework that it is set to, as always: KERAS_BACKEND=tensorflow python examples/portable.py
"""

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import fwpkm

HIDDEN, HALF = 32, 70  # in the middle of a chunk of 16 tokens: the last six of the half are yet to be written
CONFIG = fwpkm.FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=16, chunk_size=16, write_scale="normalized")


def begin_in_torch(weights: Path, half_read: Path) -> tuple[np.ndarray, np.ndarray]:
    """A few steps towards saying the next vector of a text, then half of it read: the rest, and the outputs for it."""
    import torch

    from fwpkm.backends.torch import FwPKM

    torch.manual_seed(0)
    layer = FwPKM(HIDDEN, CONFIG)
    text = torch.randn(1, 50, HIDDEN).repeat(1, 3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(1, 11):
        y, _ = layer(text)
        loss = (y[:, :-1] - text[:, 1:]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10):
            print(f"PyTorch, step {step}: loss {loss:.3f}", flush=True)
    with torch.no_grad():
        _, state = layer(text[:, :HALF])
        fwpkm.save(weights, layer)
        fwpkm.save_state(half_read, state, CONFIG)
        rest = text[:, HALF:]
        expected, _ = layer(rest, state)
    return rest.numpy(), expected.numpy()


def finish_in_jax(weights: Path, half_read: Path, rest: np.ndarray) -> tuple[str, np.ndarray]:
    """Who finished, and the outputs for the rest of the sequence."""
    import jax.numpy as jnp

    from fwpkm.backends.jax import FwPKM

    layer = FwPKM(HIDDEN, CONFIG)
    variables = fwpkm.load(weights, layer)
    y, _ = layer.apply(variables, jnp.asarray(rest), fwpkm.load_state(half_read, CONFIG, "jax"))
    return "JAX", np.asarray(y)


def finish_in_keras(weights: Path, half_read: Path, rest: np.ndarray) -> tuple[str, np.ndarray]:
    """Who finished, and the outputs for the rest of the sequence."""
    import keras

    from fwpkm.backends.keras import FwPKM

    layer = FwPKM(**dataclasses.asdict(CONFIG))
    layer.build((None, None, HIDDEN))  # a Keras layer has weights to fill once it knows its input
    fwpkm.load(weights, layer)
    y = layer(keras.ops.convert_to_tensor(rest), initial_state=fwpkm.load_state(half_read, CONFIG, "keras"))
    return f"Keras on {keras.backend.backend()}", keras.ops.convert_to_numpy(y)


def in_a_fresh_process(function: Callable, *arguments: Path | np.ndarray) -> tuple:
    """What the function returns there. Spawned: a fork would inherit threads and libraries."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    """Save in PyTorch, finish elsewhere, and print the worst difference of any output."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "layer.safetensors"), Path(folder, "half-read.safetensors")
        rest, expected = in_a_fresh_process(begin_in_torch, *files)
        print(f"saved after {HALF} tokens; outputs for the other {rest.shape[1]}, of size {abs(expected).mean():.2f}:")
        for finish in (finish_in_jax, finish_in_keras):
            name, y = in_a_fresh_process(finish, *files, rest)
            print(f"{name}: worst difference {abs(y - expected).max():.1e}")


if __name__ == "__main__":
    main()
