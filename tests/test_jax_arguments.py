"""NumPy's arrays and Python's numbers as arguments of the JAX backend: taken where JAX's own functions take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asserting import assert_same_bits
from jax.test_util import check_grads

import fwpkm
from fwpkm import FwPKMConfig
from fwpkm.backends.jax import FwPKM

BE = fwpkm.get_backend("jax")
CFG = FwPKMConfig(key_dim=4, value_dim=3, num_subkeys=3, top_k=2, chunk_size=3, score_eps=0.1)
LAYER = FwPKM(5, CFG)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def aligned(x):
    """A NumPy array that JAX could share: it begins at a multiple of 64 bytes."""
    buffer = np.empty(x.nbytes + 64, "u1")
    start = -buffer.ctypes.data % 64
    array = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    array[...] = x
    return array


@pytest.fixture(scope="module")
def given():
    """A state and tokens as JAX's arrays, in float32."""
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=(2, 4, n)).astype("f4") for n in (4, 3)] + [rng.uniform(size=(2, 4)).astype("f4")]
    return BE.init_state(CFG, BE.init_memory(CFG), 2), *map(jnp.asarray, tokens)


CALLS = {
    "apply": lambda state, *tokens: BE.apply(CFG, state, *tokens),
    "apply from a memory": lambda state, *tokens: BE.apply(
        CFG, jax.tree.map(lambda x: x[:1], state.memory), *tokens, mask=np.ones((2, 4), bool)
    ),
    "packed": lambda state, *tokens: BE.apply(
        CFG, state, *(x[:1] for x in tokens), cu_seqlens=np.array([0, 1, 4], "int32")
    ),
    "flush": lambda state, *_: BE.flush(CFG, state, np.array([True, False])),
    "lookup": lambda state, query, *_: BE.lookup(CFG, state.memory, query),
    "chunk_update": lambda state, *tokens: BE.chunk_update(CFG, state.memory, *tokens),
    "init_state": lambda state, *_: BE.init_state(CFG, state.memory, 2),
    "reset": lambda state, *_: BE.reset(CFG, state, state.memory, np.array([1])),
    "select": lambda state, *_: BE.select(CFG, state, np.array([1, 0])),
    "concat": lambda state, *_: BE.concat(CFG, [state, state]),
    "put": lambda state, *_: BE.put(CFG, state, [1, 0], state),
    "pending": lambda state, *_: BE.pending(CFG, state),
    "detach": lambda state, *_: BE.detach(state),
    "to_device": lambda state, *_: BE.to_device(state, jax.devices()[0]),
    "start_decoding": lambda state, *_: BE.start_decoding(state),
    "decode": lambda state, *tokens: BE.decode(CFG, BE.start_decoding(state), *(x[:, :1] for x in tokens)),
    "unpack": lambda state, *_: BE.unpack(CFG, BE.pack(CFG, state, state.memory), state.memory),
    "vjp": lambda state, query, *_: BE.vjp(lambda q: BE.lookup(CFG, state.memory, q).output, [query], query[..., :3]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_numpy_arrays_give_the_bits_of_jax_arrays(given, call):
    expected, received = call(*given), call(*numpy(given))
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert isinstance(x, jax.Array)
        assert_same_bits(np.asarray(x), np.asarray(y))


def test_a_layer_takes_them_in_variables_inputs_and_states(given):
    variables, x = LAYER.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4, 5))
    mask = jnp.array([[True] * 4, [True, False, True, True]])
    expected = LAYER.apply(variables, x, LAYER.init_state(variables, 2), mask)
    received = LAYER.apply(*numpy((variables, x, LAYER.init_state(numpy(variables), 2), mask)))
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


def test_a_numpy_state_is_copied(given):
    """Whoever overwrites the array afterwards, or donates what came back, changes nobody's numbers."""
    state = given[0].map(aligned)
    kept = BE.detach(state)
    for x in jax.tree.leaves(state):
        x[...] = 1
    for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(given[0]), strict=True):
        assert_same_bits(np.asarray(x), np.asarray(y))


def test_a_numpy_state_is_not_rounded_by_a_jax_of_32_bits(given):
    """As other arrays are, by JAX's own custom: what a state remembers is lost without a word."""
    state, *tokens = numpy(given)
    narrow, wide = state, state.map(lambda x: x.astype("f8") if x.dtype == np.float32 else x)
    with jax.enable_x64(False):
        for call in (lambda: BE.apply(CFG, wide, *tokens), lambda: BE.concat(CFG, [narrow, wide])):
            with pytest.raises(ValueError, match=r"float64 needs JAX's 64-bit mode.*Received: float64 tables in stat"):
                call()
        assert BE.apply(CFG, narrow, *tokens)[1].memory.values.dtype == jnp.float32


def test_what_numpy_knows_stays_known_under_jit(given):
    """A mask, packing or position that a caller closes over is checked there too."""
    state, *tokens = given
    with pytest.raises(ValueError, match="cu_seqlens must begin with 0"):
        jax.jit(lambda *row: BE.apply(CFG, state, *row, cu_seqlens=np.array([0, 9, 4], "int32")))(
            *(x[:1] for x in tokens)
        )


def test_check_grads_feeds_its_own_arrays():
    """JAX's own check, which calls with NumPy arrays; over a write, for inputs, gate and tables."""
    rng = np.random.default_rng(3)
    query, value, gate = (rng.normal(size=(1, 7, n)) for n in (4, 3, 1))
    memory = jax.tree.map(lambda x: x.astype("float64"), BE.init_memory(CFG, seed=1))

    def read(query, value, gate, memory):
        return BE.apply(CFG, memory, query, value, gate[..., 0])[0]

    check_grads(read, (query, value, jax.nn.sigmoid(gate), memory), order=1, modes=["rev"], eps=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(">f4"), "query must be in this machine's byte order"),
        (lambda x: x.astype(int), "query must have a floating dtype. Received: dtype int"),
        (lambda x: x.astype(object), "query must have a floating dtype. Received: dtype object"),
        (lambda x: np.ma.masked_array(x, x > 0), r"query must not be a masked array, .*Received: numpy\.ma\.Masked"),
        (lambda x: x[0], r"query must have shape \[B, T, H\*Dk=4\]. Received: shape \(4, 4\)"),
        (lambda x: np.array(0.5), r"query must have shape \[B, T, H\*Dk=4\]. Received: shape \(\)"),
        (lambda x: 0.5, "query must be a jax.Array or numpy.ndarray. Received: float"),
        (lambda x: x.tolist(), "query must be a jax.Array or numpy.ndarray. Received: list"),
        (lambda x: 1, "query must be a jax.Array or numpy.ndarray. Received: int"),
    ],
)
def test_what_does_not_fit_is_named(given, change, message):
    state, query, value, _ = numpy(given)
    with pytest.raises(ValueError, match=message):
        BE.apply(CFG, state, change(query), value)


@pytest.mark.parametrize("name", ["cu_seqlens", "position"])
def test_integers_that_a_jax_of_32_bits_would_wrap_are_refused(given, name):
    """2³² + 9 would become 9."""
    state, *row = given[0], *(x[:1] for x in given[1:])
    state, ends = BE.select(CFG, state, [0]), np.array([0, 4])
    with jax.enable_x64(False):
        assert BE.apply(CFG, state, *row, cu_seqlens=ends)[1].position.tolist() == [4]
        if name == "cu_seqlens":
            ends = ends + 2**32
        else:
            state = state._replace(position=np.array([2**32 + 9]))
        with pytest.raises(ValueError, match=r"must hold integers that fit int32.* Received: 4294967\d+"):
            BE.apply(CFG, state, *row, cu_seqlens=ends)
