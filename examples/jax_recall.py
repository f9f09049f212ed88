"""Train a model that must recall, with Optax: pairs of symbols are told once, and each key is asked for once, later.

Nothing but the memory leads from a telling to its asking. Then ask in much longer sequences, and ask the same model
with a memory that does not write. Prints recall by distance and saves a picture of it.

    python examples/jax_recall.py [--small] [--out recall_by_distance.png]
"""

import argparse
import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from fwpkm import FwPKMConfig
from fwpkm.backends.jax import FwPKM

KEYS, VALUES, WIDTH, BATCH = 2048, 32, 64, 16
# lookahead=1: what a key asks for is bound to the value of the token after it.
CONFIG = FwPKMConfig(key_dim=32, value_dim=64, num_subkeys=64, chunk_size=16, lookahead=1, write_scale="normalized")


def draw(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], key and value in turn, and how many tokens ago an asked key was told [B, T] (0: not asked)."""
    tokens, distance = np.zeros((2, BATCH, length), np.int32)
    for row in range(BATCH):
        keys, told = iter(rng.permutation(KEYS)), []
        for t in range(0, length, 2):
            if told and rng.random() < 0.5:  # near and far askings alike: the logarithm of the rank is uniform
                key, value, since = told.pop(-int(len(told) ** rng.random()))
                distance[row, t] = t - since
            else:
                key, value = next(keys), KEYS + rng.integers(VALUES)
                told.append((key, value, t))
            tokens[row, t : t + 2] = key, value
    return tokens, distance


def init(layer: FwPKM, key: jax.Array) -> tuple[dict, dict]:
    """The trained params of the model, and the initial memory, which is not trained."""
    embed, memory, readout = jax.random.split(key, 3)
    variables = layer.init(memory)
    params = {
        "embed": jax.random.normal(embed, (KEYS + VALUES, WIDTH)),
        "memory": variables["params"],
        "readout": jax.random.normal(readout, (WIDTH, VALUES)) / WIDTH**0.5,
    }
    return params, variables["buffers"]


@partial(jax.jit, static_argnums=0)  # the layer holds no arrays: two of the same arguments share what is compiled
def predict(layer: FwPKM, params: dict, buffers: dict, tokens: jax.Array) -> jax.Array:
    """Logits [B, T, V] for the value that follows each token."""
    read, _ = layer.apply({"params": params["memory"], "buffers": buffers}, params["embed"][tokens])
    return read @ params["readout"]


def loss(params: dict, layer: FwPKM, buffers: dict, tokens: jax.Array, asked: jax.Array) -> jax.Array:
    """Cross-entropy, in nats, of the values that were asked for."""
    logits, answers = predict(layer, params, buffers, tokens)[:, :-1], tokens[:, 1:] - KEYS
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked[:, :-1], answers, 0))
    return (errors * asked[:, :-1]).sum() / asked.sum()


def train(layer: FwPKM, steps: int, length: int, rng: np.random.Generator) -> tuple[dict, dict]:
    """Params after ``steps`` of AdamW, and the buffers."""
    params, buffers = init(layer, jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, steps)))
    momenta = optimizer.init(params)

    @jax.jit
    def step(params, momenta, tokens, asked):
        value, gradient = jax.value_and_grad(loss)(params, layer, buffers, tokens, asked)
        updates, momenta = optimizer.update(gradient, momenta, params)
        return optax.apply_updates(params, updates), momenta, value

    began = time.perf_counter()
    for number in range(1, steps + 1):
        tokens, distance = draw(rng, length)
        params, momenta, value = step(params, momenta, tokens, distance > 0)
        if number % (steps // 5) == 0:
            print(f"step {number}: {value:.2f} nats an answer, {time.perf_counter() - began:.0f} s")
    return params, buffers


def answered(layer: FwPKM, params: dict, buffers: dict, tokens: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Whether the likeliest value is the right one [n], for every asked key in turn."""
    likeliest = np.asarray(predict(layer, params, buffers, tokens).argmax(-1))
    return (likeliest[:, :-1] == tokens[:, 1:] - KEYS)[distance[:, :-1] > 0]


def picture(path: str, edges: np.ndarray, recall: dict[str, list[float]], trained: int) -> None:
    """Recall by distance, with the ranges where nothing could be recalled and where nothing was trained."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for (label, means), colour, style in zip(recall.items(), ("#225ea8", "#d95f02"), ("-", "--")):
        axes.stairs(means, edges, baseline=None, label=label, color=colour, linestyle=style, linewidth=2.4)
    axes.axhline(1 / VALUES, color="grey", linestyle=":", linewidth=1.4, label=f"chance: 1 of {VALUES} values")
    axes.axvspan(edges[0], CONFIG.chunk_size, color="grey", alpha=0.13, linewidth=0)
    axes.axvspan(trained, edges[-1], color="#225ea8", alpha=0.08, linewidth=0)
    for at, text in (
        ((edges[0] * CONFIG.chunk_size) ** 0.5, "its chunk may not\nbe written yet"),
        ((trained * edges[-1]) ** 0.5, "farther than trained"),
    ):
        axes.text(at, 1.06, text, ha="center", va="center", color="#444444")
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.02, 1.14), yticks=np.linspace(0, 1, 6))
    axes.set(xlabel="distance from telling to asking (tokens)", ylabel="right answers (share)")
    axes.set_title(f"Recall by distance: told once, asked once; trained on {trained} tokens", loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.42))
    figure.savefig(path, dpi=140)


def main() -> None:
    """Train, print recall by distance, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer steps, shorter sequences")
    parser.add_argument("--out", default="recall_by_distance.png", help="where the picture goes")
    arguments = parser.parse_args()
    steps, length, longer, tests = (100, 128, 512, 1) if arguments.small else (200, 256, 4096, 4)
    rng = np.random.default_rng(0)
    layer = FwPKM(WIDTH, CONFIG)
    params, buffers = train(layer, steps, length, rng)

    drawn = [draw(rng, longer) for _ in range(tests)]
    asked = np.concatenate([distance[distance > 0] for _, distance in drawn])
    edges = 2 ** np.arange(1, longer.bit_length())
    place = np.searchsorted(edges, asked, side="right") - 1
    frozen = FwPKM(WIDTH, dataclasses.replace(CONFIG, learning_rate=0.0))
    recall = {}
    for label, tested in (("the memory writes", layer), ("the same at learning rate 0", frozen)):
        right = np.concatenate([answered(tested, params, buffers, *each) for each in drawn])
        recall[label] = [right[place == i].mean() for i in range(len(edges) - 1)]
    print(f"trained on {length} tokens, tested on {longer}; chance is {1 / VALUES:.2f}")
    print("distance       asked  " + "  ".join(recall))
    for i, (written, still) in enumerate(zip(*recall.values())):
        name = f"{edges[i]} to {edges[i + 1] - 1}"
        print(f"{name:13} {np.count_nonzero(place == i):6}  {written:17.2f}  {still:27.2f}")
    picture(arguments.out, edges, recall, length)
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
