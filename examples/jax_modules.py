"""The JAX layer inside a Flax NNX module and inside an Equinox module: a training step, then decoding token by token.

python examples/jax_modules.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fwpkm
from fwpkm.backends.jax import FwPKM

HIDDEN = 32
LAYER = FwPKM(HIDDEN, key_dim=16, value_dim=16, num_subkeys=16, chunk_size=8, write_scale="normalized")


class Buffer(nnx.Variable):
    """What is saved with a model but not trained."""


class NnxReader(nnx.Module):
    """A memory beside a residual, and a readout; Flax NNX."""

    def __init__(self, rngs: nnx.Rngs):
        """Draw the weights."""
        variables = LAYER.init(rngs.params())
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.buffers = nnx.data(jax.tree.map(Buffer, variables["buffers"]))
        self.readout = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)

    def __call__(self, x: jax.Array, state: fwpkm.State | None = None) -> tuple[jax.Array, fwpkm.State]:
        """x [B, T, HIDDEN] and where the sequence stands -> y, and where it stands then."""
        read, state = LAYER.apply(nnx.as_pure({"params": self.params, "buffers": self.buffers}), x, state)
        return self.readout(x + read), state


class EqxReader(eqx.Module):
    """The same in Equinox."""

    params: dict
    buffers: dict
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        """Draw the weights."""
        first, second = jax.random.split(key)
        variables = LAYER.init(first)
        self.params, self.buffers = variables["params"], variables["buffers"]
        self.readout = eqx.nn.Linear(HIDDEN, HIDDEN, key=second)

    def __call__(self, x: jax.Array, state: fwpkm.State | None = None) -> tuple[jax.Array, fwpkm.State]:
        """As NnxReader."""
        read, state = LAYER.apply({"params": self.params, "buffers": self.buffers}, x, state)
        return jax.vmap(jax.vmap(self.readout))(x + read), state


def mean_square(model: NnxReader | EqxReader, x: jax.Array) -> jax.Array:
    """How far the model is from saying the next vector."""
    return jnp.square(model(x)[0][:, :-1] - x[:, 1:]).mean()


def train_nnx(model: NnxReader, x: jax.Array) -> None:
    """Two steps; only what is an nnx.Param is trained."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(mean_square)(model, x)
        optimizer.update(model, gradient)
        return loss

    print("Flax NNX: loss {:.3f}, then {:.3f}".format(*(step(model, optimizer, x) for _ in range(2))))


def train_eqx(model: EqxReader, x: jax.Array) -> EqxReader:
    """Two steps; the buffers are kept out of what is trained."""
    optimizer, losses = optax.adamw(1e-2), []
    trained = eqx.tree_at(lambda m: m.buffers, jax.tree.map(eqx.is_inexact_array, model), replace=False)
    params, rest = eqx.partition(model, trained)
    momenta = optimizer.init(params)

    @eqx.filter_jit
    def step(params, momenta, x):
        loss, gradient = eqx.filter_value_and_grad(lambda p: mean_square(eqx.combine(p, rest), x))(params)
        updates, momenta = optimizer.update(gradient, momenta, params)
        return eqx.apply_updates(params, updates), momenta, loss

    for _ in range(2):
        params, momenta, loss = step(params, momenta, x)
        losses.append(loss)
    print("Equinox: loss {:.3f}, then {:.3f}".format(*losses))
    return eqx.combine(params, rest)


def decode(step, x: jax.Array, state: fwpkm.State) -> jax.Array:
    """Read x token by token: one compilation serves every position."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def compare(name: str, outputs: jax.Array, x: jax.Array, variables: dict, kernel: jax.Array, bias: jax.Array) -> None:
    """Print how far ``outputs`` are from those of the plain layer in one call."""
    expected = (x + LAYER.apply(variables, x)[0]) @ kernel + bias
    print(f"{name}: decoded token by token, worst difference from the plain layer {abs(outputs - expected).max():.1e}")


def main() -> None:
    """Train and decode in both."""
    x = jnp.tile(jax.random.normal(jax.random.key(0), (2, 20, HIDDEN)), (1, 2, 1))

    model = NnxReader(nnx.Rngs(0))
    train_nnx(model, x)
    variables = nnx.as_pure({"params": model.params, "buffers": model.buffers})
    graph, arrays = nnx.split(model)
    step = jax.jit(lambda x, state: nnx.merge(graph, arrays)(x, state), donate_argnums=1)
    outputs = decode(step, x, LAYER.init_state(variables, len(x)))
    compare("Flax NNX", outputs, x, variables, model.readout.kernel[...], model.readout.bias[...])

    model = train_eqx(EqxReader(jax.random.key(0)), x)
    variables = {"params": model.params, "buffers": model.buffers}
    outputs = decode(
        jax.jit(lambda x, state: model(x, state), donate_argnums=1), x, LAYER.init_state(variables, len(x))
    )
    compare("Equinox", outputs, x, variables, model.readout.weight.T, model.readout.bias)


if __name__ == "__main__":
    main()
