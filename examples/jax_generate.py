"""Text byte by byte: prompts of unequal lengths are read in one call, then each byte takes one step, in place.

The step is compiled once for all positions, and its state is donated. The model is untrained, so that what it writes is
noise: put your own in its place. At the end one call reads all of the text, and must choose every byte again.

    python examples/jax_generate.py [--bytes 48] [--temperature 0.8]
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fwpkm import State
from fwpkm.backends.jax import FwPKM

PROMPTS = ["To Sherlock Holmes she is always the woman. I have seldom heard him", "It was not that he felt"]
WIDTH = 64
MEMORY = FwPKM(WIDTH, key_dim=32, value_dim=64, num_subkeys=32, chunk_size=16)


def init(key: Array) -> dict[str, Any]:
    """The weights of the model: bytes, a memory beside a residual, a readout."""
    first, second, third = jax.random.split(key, 3)
    readout = jax.random.normal(third, (WIDTH, 256)) / WIDTH**0.5
    return {"embed": jax.random.normal(first, (256, WIDTH)), "memory": MEMORY.init(second), "readout": readout}


def logits_of(weights: dict[str, Any], x: Array) -> Array:
    """[..., 256] of x [..., WIDTH]."""
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) @ weights["readout"]


@jax.jit
def read(weights: dict[str, Any], tokens: Array, mask: Array) -> tuple[Array, State]:
    """Logits [B, T, 256] after each of the tokens [B, T] that are there, and where the rows stand then."""
    x = weights["embed"][tokens]
    y, state = MEMORY.apply(weights["memory"], x, mask=mask)
    return logits_of(weights, x + y), state


@partial(jax.jit, donate_argnums=2)
def step(weights: dict[str, Any], token: Array, state: State) -> tuple[Array, State]:
    """Logits [B, 256] after one more token [B] of each row; the state is donated, its tables are written in place."""
    x = weights["embed"][token[:, None]]
    y, state = MEMORY.decode(weights["memory"], x, state)
    return logits_of(weights, x + y)[:, 0], state


def choose(logits: Array, noise: Array, temperature: float) -> Array:
    """A sample of softmax(logits / temperature), by Gumbel noise [..., 256]; the likeliest at temperature 0."""
    return (logits + temperature * noise).argmax(-1)


def generate(weights: dict[str, Any], tokens: Array, mask: Array, noise: Array, temperature: float) -> Array:
    """Bytes [B, n] that follow the prompts [B, T], which end in the last column; noise [B, n, 256]."""
    logits, state = read(weights, tokens, mask)
    chosen = [choose(logits[:, -1], noise[:, 0], temperature)]
    for i in range(1, noise.shape[1]):
        logits, state = step(weights, chosen[-1], state)
        chosen.append(choose(logits, noise[:, i], temperature))
    return jnp.stack(chosen, 1)


def main() -> None:
    """Generate, print, and compare with one call over everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    args = parser.parse_args()
    weights = init(jax.random.key(0))
    longest = max(map(len, PROMPTS))
    tokens = jnp.array([list(prompt.rjust(longest).encode()) for prompt in PROMPTS])
    mask = jnp.array([[i >= longest - len(prompt) for i in range(longest)] for prompt in PROMPTS])
    noise = jax.random.gumbel(jax.random.key(1), (len(PROMPTS), args.bytes, 256))
    written = generate(weights, tokens, mask, noise, args.temperature)
    for prompt, row in zip(PROMPTS, written.tolist()):
        print(prompt, bytes(row))

    there = jnp.pad(mask, ((0, 0), (0, args.bytes - 1)), constant_values=True)
    logits, _ = read(weights, jnp.concatenate([tokens, written], 1)[:, :-1], there)
    assert np.array_equal(choose(logits[:, longest - 1 :], noise, args.temperature), written)
    print(f"one call over all of it chooses the same {written.size} bytes; compiled steps: {step._cache_size()}")


if __name__ == "__main__":
    main()
