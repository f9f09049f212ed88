"""Train a layer in PyTorch, read half a sequence, save both, and finish in JAX and in Keras: the outputs are the same.

Keras runs on the framework that it is set to, as always: KERAS_BACKEND=tensorflow python examples/portable.py
"""

import dataclasses
import tempfile
from pathlib import Path

import jax.numpy as jnp
import keras
import numpy as np
import torch

import fwpkm
from fwpkm.backends import jax as in_jax
from fwpkm.backends import keras as in_keras
from fwpkm.backends import torch as in_torch

HIDDEN, HALF = 32, 70  # in the middle of a chunk of 16 tokens: the last six of the half are yet to be written
CONFIG = fwpkm.FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=16, chunk_size=16, write_scale="normalized")


def train(layer: in_torch.FwPKM, text: torch.Tensor) -> None:
    """A few steps towards saying the next vector of the text."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(1, 11):
        y, _ = layer(text)
        loss = (y[:, :-1] - text[:, 1:]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10):
            print(f"PyTorch, step {step}: loss {loss:.3f}")


def finish_in_jax(weights: Path, half_read: Path, rest: np.ndarray) -> np.ndarray:
    """The outputs for the rest of the sequence."""
    layer = in_jax.FwPKM(HIDDEN, CONFIG)
    variables = fwpkm.load(weights, layer)
    y, _ = layer.apply(variables, jnp.asarray(rest), fwpkm.load_state(half_read, CONFIG, "jax"))
    return np.asarray(y)


def finish_in_keras(weights: Path, half_read: Path, rest: np.ndarray) -> np.ndarray:
    """The outputs for the rest of the sequence."""
    layer = in_keras.FwPKM(**dataclasses.asdict(CONFIG))
    layer.build((None, None, HIDDEN))  # a Keras layer has weights to fill once it knows its input
    fwpkm.load(weights, layer)
    y = layer(keras.ops.convert_to_tensor(rest), initial_state=fwpkm.load_state(half_read, CONFIG, "keras"))
    return keras.ops.convert_to_numpy(y)


def main() -> None:
    """Save in PyTorch, finish elsewhere, and print the worst difference of any output."""
    torch.manual_seed(0)
    layer = in_torch.FwPKM(HIDDEN, CONFIG)
    text = torch.randn(1, 50, HIDDEN).repeat(1, 3, 1)
    train(layer, text)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights, half_read = Path(folder, "layer.safetensors"), Path(folder, "half-read.safetensors")
        _, state = layer(text[:, :HALF])
        fwpkm.save(weights, layer)
        fwpkm.save_state(half_read, state, CONFIG)
        rest = text[:, HALF:]
        expected = layer(rest, state)[0].numpy()
        print(
            f"saved after {HALF} tokens; outputs for the other {rest.shape[1]}, of size {np.abs(expected).mean():.2f}:"
        )
        for name, finish in (("JAX", finish_in_jax), (f"Keras on {keras.backend.backend()}", finish_in_keras)):
            worst = np.abs(finish(weights, half_read, rest.numpy()) - expected).max()
            print(f"{name}: worst difference {worst:.1e}")


if __name__ == "__main__":
    main()
