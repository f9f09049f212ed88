"""One framework in a process of its own, for test_portability.py: ``python traveller.py NAME FOLDER``.

Trains a layer and saves it together with a half-read sequence. Then waits for its input to end, by which time all
others have done the same, and finishes everyone's sequences, its own too.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

import fwpkm

HIDDEN, HALF, STEPS = 6, 14, 3  # JAX compiles seconds for every length: both halves have one
OPTIONS: dict[str, Any] = {
    **{"key_dim": 4, "value_dim": 5, "num_heads": 2, "num_subkeys": 5, "top_k": 2, "chunk_size": 4, "lookahead": 2},
    **{"boundary": "wait", "write_scale": "normalized", "learn_memory": True},
}
NAMES = ("torch", "jax", "keras-tensorflow", "keras-jax", "keras-torch")


class Torch:
    """The torch layer."""

    backend = "torch"

    def __init__(self):
        import torch

        from fwpkm.backends.torch import FwPKM

        torch.manual_seed(0)
        self.torch, self.layer, self.variables = torch, FwPKM(HIDDEN, **OPTIONS), None

    def train(self, x: np.ndarray, target: np.ndarray) -> list[float]:
        torch, losses = self.torch, []
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=1.0)
        for _ in range(STEPS):
            loss = (self.layer(torch.tensor(x))[0] - torch.tensor(target)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    def read(self, x: np.ndarray, mask: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        with self.torch.no_grad():
            y, state = self.layer(self.torch.tensor(x), state, self.torch.tensor(mask))
        return y.numpy(), state

    def load(self, path: Path) -> None:
        fwpkm.load(path, self.layer)


class Jax:
    """The JAX layer and its variables."""

    backend = "jax"

    def __init__(self):
        import jax

        from fwpkm.backends.jax import FwPKM

        self.jax, self.layer = jax, FwPKM(HIDDEN, **OPTIONS)
        self.variables = self.layer.init(jax.random.key(0))

    def train(self, x: np.ndarray, target: np.ndarray) -> list[float]:
        jax, losses, variables = self.jax, [], self.variables

        @jax.jit
        @jax.value_and_grad
        def loss_of(params: Any) -> Any:
            y, _ = self.layer.apply({**variables, "params": params}, jax.numpy.asarray(x))
            return ((y - target) ** 2).mean()

        params = variables["params"]
        for _ in range(STEPS):
            loss, gradient = loss_of(params)
            params = jax.tree.map(lambda p, g: p - g, params, gradient)
            losses.append(float(loss))
        self.variables = {**variables, "params": params}
        return losses

    def read(self, x: np.ndarray, mask: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        x, mask = map(self.jax.numpy.asarray, (x, mask))
        y, state = self.layer.apply(self.variables, x, state, mask)
        return np.asarray(y), state

    def load(self, path: Path) -> None:
        self.variables = fwpkm.load(path, self.layer)


class Keras:
    """The Keras layer, in a model that trains it."""

    backend = "keras"

    def __init__(self):
        import keras

        from fwpkm.backends.keras import FwPKM

        keras.utils.set_random_seed(0)
        self.keras, self.layer, self.variables = keras, FwPKM(return_state=True, **OPTIONS), None
        x = keras.Input((HALF, HIDDEN))
        self.model = keras.Model(x, self.layer(x)[0])
        self.model.compile(keras.optimizers.SGD(1.0), "mse")

    def train(self, x: np.ndarray, target: np.ndarray) -> list[float]:
        return [self.model.train_on_batch(x, target, return_dict=True)["loss"] for _ in range(STEPS)]

    def read(self, x: np.ndarray, mask: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        tensor = self.keras.ops.convert_to_tensor
        y, keys, values, *pending = self.layer(tensor(x), tensor(mask), initial_state=state)
        return self.keras.ops.convert_to_numpy(y), fwpkm.State(fwpkm.Memory(keys, values), *pending)

    def load(self, path: Path) -> None:
        fwpkm.load(path, self.layer)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rows to read, what to learn from them, and which tokens count: one that is masked is pending at HALF."""
    draw = np.random.default_rng(5).standard_normal
    x, target = (draw((2, 2 * HALF, HIDDEN)).astype(np.float32) for _ in range(2))
    mask = np.ones((2, 2 * HALF), bool)
    mask[0, [2, HALF - 1]] = mask[1, HALF + 3] = False
    return x, target, mask


def main(name: str, folder: Path) -> None:
    learner = {"torch": Torch, "jax": Jax, "keras": Keras}[name.partition("-")[0]]()
    cfg = learner.layer.config
    x, target, mask = data()
    losses = learner.train(x[:, :HALF], target[:, :HALF])
    assert losses[-1] < 0.99 * losses[0], f"training did nothing: {losses}"
    fwpkm.save(folder / f"{name}.layer", learner.layer, learner.variables)
    _, half = learner.read(x[:, :HALF], mask[:, :HALF])
    fwpkm.save_state(folder / f"{name}.half", half, cfg)
    print("saved", flush=True)
    sys.stdin.readline()
    for author in NAMES:
        learner.load(folder / f"{author}.layer")
        half = fwpkm.load_state(folder / f"{author}.half", cfg, learner.backend)
        first, _ = learner.read(x[:, :HALF], mask[:, :HALF])
        second, end = learner.read(x[:, HALF:], mask[:, HALF:], half)
        np.savez(folder / f"{author}.{name}.npz", first=first, second=second)
        fwpkm.save_state(folder / f"{author}.{name}.end", end, cfg)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
