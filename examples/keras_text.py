"""A small model of characters with a memory in it, trained with ``fit`` to read passages of a story twice.

Then it reads passages that it was not trained on, twice as well: once with its memory, once with a memory that does not
write. The same script runs on every backend of Keras:

    KERAS_BACKEND=jax python examples/keras_text.py [--small]
"""

import argparse
import math
from importlib import resources

import keras
import numpy as np

from fwpkm.backends.keras import FwPKM

WIDTH, BATCH = 64, 16


def build(characters: int, rate: float) -> keras.Model:
    """Three characters of context, the memory beside them, one readout: tokens [B, T] -> logits [B, T, V]."""
    tokens = keras.Input((None,), dtype="int32")
    draw = keras.initializers.RandomNormal(stddev=1)
    x = keras.layers.Embedding(characters, WIDTH, embeddings_initializer=draw)(tokens)
    x = keras.layers.Conv1D(WIDTH, 3, padding="causal")(x)
    memory = FwPKM(
        key_dim=32, num_subkeys=32, value_dim=64, chunk_size=16, write_scale="normalized", learning_rate=rate
    )
    x = keras.layers.Concatenate()([x, keras.layers.LayerNormalization()(memory(x))])
    return keras.Model(tokens, keras.layers.Dense(characters)(x))


def twice(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The passages of ``length`` characters that begin at ``starts``, each followed by itself: [n, 2 * length]."""
    passages = text[starts[:, None] + np.arange(length)]
    return np.concatenate([passages, passages], axis=1)


def bits(model: keras.Model, tokens: np.ndarray) -> tuple[float, float]:
    """Bits for a character of the first and of the second reading; what the context cannot know yet is left out."""
    logits = keras.ops.log_softmax(keras.ops.convert_to_tensor(model.predict(tokens[:, :-1], BATCH, verbose=0)))
    logits, following = keras.ops.convert_to_numpy(logits), tokens[:, 1:, None]
    nats = -np.take_along_axis(logits, following, axis=-1)[..., 0]
    half = tokens.shape[1] // 2
    return nats[:, : half - 1].mean() / math.log(2), nats[:, half:].mean() / math.log(2)


def main() -> None:
    """Train, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer and shorter passages")
    steps, length = (80, 64) if parser.parse_args().small else (300, 128)
    keras.utils.set_random_seed(0)
    story = resources.files("fwpkm.data").joinpath("scandal_in_bohemia.txt").read_text("utf-8")
    alphabet, text = np.unique(list(story), return_inverse=True)
    text = text.astype("int32")
    known, held_out = text[: len(text) * 4 // 5], text[len(text) * 4 // 5 :]

    model = build(len(alphabet), rate=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    tokens = twice(known, np.random.default_rng(0).integers(len(known) - length, size=steps * BATCH), length)
    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=BATCH, verbose=2)

    frozen = build(len(alphabet), rate=0.0)
    frozen.set_weights(model.get_weights())
    tokens = twice(held_out, np.linspace(0, len(held_out) - length, BATCH).astype(int), length)
    print(f"Keras on {keras.backend.backend()}: bits per character of {BATCH} held-out passages of {length} characters")
    print("                             first reading  second reading")
    for name, reader in (("the memory writes", model), ("the same at learning rate 0", frozen)):
        print(f"{name:27}  {{:13.2f}}  {{:14.2f}}".format(*bits(reader, tokens)))


if __name__ == "__main__":
    main()
