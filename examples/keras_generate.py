"""Text byte by byte: prompts of unequal lengths are read in one call, then each byte takes one step.

The step is traced once for all positions. The model is untrained, so that what it writes is noise: put your own in its
place. At the end one call reads all of the text, and must choose every byte again. On every backend of Keras:

    KERAS_BACKEND=jax python examples/keras_generate.py [--bytes 48] [--temperature 0.8]
"""

import argparse
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from fwpkm.backends.keras import FwPKM

PROMPTS = ["To Sherlock Holmes she is always the woman. I have seldom heard him", "It was not that he felt"]
WIDTH = 64


class Model(keras.Model):
    """Bytes, a memory beside a residual, a readout."""

    def __init__(self) -> None:
        """Draw the weights at the first call."""
        super().__init__()
        self.supports_masking = True
        self.embed = keras.layers.Embedding(
            256, WIDTH, embeddings_initializer=keras.initializers.RandomNormal(stddev=1)
        )
        self.memory = FwPKM(key_dim=32, value_dim=64, num_subkeys=32, chunk_size=16, return_state=True)
        self.norm, self.readout = keras.layers.RMSNormalization(), keras.layers.Dense(256)

    def call(self, tokens: Any, mask: Any = None) -> list[Any]:
        """Logits [B, T, 256] after each of the tokens [B, T] that are there, and the state of the rows then."""
        x = self.embed(tokens)  # without a mask of its own, as x + y would be: every memory is told
        y, *state = self.memory(x, mask=mask)
        return [self.readout(self.norm(x + y)), *state]

    def step(self, token: Any, *state: Any) -> list[Any]:
        """Logits [B, 256] after one more token [B] of each row, and the next state; this one is used up."""
        x = self.embed(token[:, None])
        y, *state = self.memory.decode(x, state)
        return [self.readout(self.norm(x + y))[:, 0], *state]


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step as the framework compiles it; torch runs it as it is."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        return tensorflow.function(step)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(step, donate_argnums=range(1, 8))  # the seven arrays of a state: tables are written in place
    return step


def choose(logits: Any, noise: np.ndarray, temperature: float) -> np.ndarray:
    """A sample of softmax(logits / temperature), by Gumbel noise [..., 256]; the likeliest at temperature 0."""
    return (ops.convert_to_numpy(logits) + temperature * noise).argmax(-1).astype("int32")


def generate(model: Model, tokens: np.ndarray, mask: np.ndarray, noise: np.ndarray, temperature: float) -> np.ndarray:
    """Bytes [B, n] that follow the prompts [B, T], which end in the last column; noise [B, n, 256]."""
    logits, *state = model(tokens, mask=mask)
    step, chosen = compiled(model.step), [choose(logits[:, -1], noise[:, 0], temperature)]
    for i in range(1, noise.shape[1]):
        logits, *state = step(ops.convert_to_tensor(chosen[-1]), *state)
        chosen.append(choose(logits, noise[:, i], temperature))
    return np.stack(chosen, 1)


def main() -> None:
    """Generate, print, and compare with one call over everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    model, longest = Model(), max(map(len, PROMPTS))
    tokens = np.array([list(prompt.rjust(longest).encode()) for prompt in PROMPTS], "int32")
    mask = np.arange(longest) >= longest - np.array([[len(prompt)] for prompt in PROMPTS])
    noise = np.random.default_rng(0).gumbel(size=(len(PROMPTS), args.bytes, 256)).astype("float32")
    written = generate(model, tokens, mask, noise, args.temperature)
    for prompt, row in zip(PROMPTS, written.tolist()):
        print(prompt, bytes(row))

    there = np.pad(mask, ((0, 0), (0, args.bytes - 1)), constant_values=True)
    logits = model(np.concatenate([tokens, written], 1)[:, :-1], mask=there)[0]
    assert np.array_equal(choose(logits[:, longest - 1 :], noise, args.temperature), written)
    print(f"Keras on {keras.backend.backend()}: one call over all of it chooses the same {written.size} bytes")


if __name__ == "__main__":
    main()
