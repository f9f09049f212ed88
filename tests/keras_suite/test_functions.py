"""The functions: on torch and jax those of the native backend, which has its own tests; on tensorflow, tested here."""

import keras
import numpy as np
import pytest
import test_vectors
from keras_suite.layers import BACKEND, leaves
from test_vectors import NAMES, worst  # noqa: F401 (a fixture)

import fwpkm
from fwpkm import FwPKMConfig, Memory, State, agreement
from fwpkm.backends.keras import FwPKM, as_state

if BACKEND == "tensorflow":
    from test_errors import *  # noqa: F403
    from test_lookup import *  # noqa: F403
    from test_packing import *  # noqa: F403
    from test_rows import *  # noqa: F403
    from test_state import *  # noqa: F403

FUNCTIONS = """
    init_memory init_state apply flush lookup chunk_update reset select concat put pending nbytes pack unpack detach
    asarray to_numpy vjp device_name
"""
# Elsewhere these are the native functions, which read every vector in their own tests.
CHOSEN = NAMES if BACKEND == "tensorflow" else ["nonfinite", "wait_mask"]


def test_torch_and_jax_run_their_native_functions(be):
    for name in FUNCTIONS.split():
        native = fwpkm.get_backend(BACKEND) if BACKEND != "tensorflow" else None
        assert callable(getattr(be, name))
        assert native is None or getattr(be, name) is getattr(native, name)


@pytest.mark.parametrize(("dtype", "split"), [("float64", "uneven"), ("float32", "one call")])
@pytest.mark.parametrize("name", CHOSEN)
def test_the_vectors(name, dtype, split, worst):  # noqa: F811
    test_vectors.test_forward(name, "keras", dtype, split, worst)


@pytest.mark.parametrize(("dtype", "split"), [("float64", "one call"), ("float32", "one call")])
@pytest.mark.parametrize("name", CHOSEN)
def test_the_gradients_of_the_vectors(name, dtype, split, worst):  # noqa: F811
    test_vectors.test_gradients(name, "keras", dtype, split, worst)


def test_single_tokens(worst):  # noqa: F811
    test_vectors.test_forward("wait_mask", "keras", "float64", "single tokens", worst)


if BACKEND == "tensorflow":  # which alone has tf.function

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_one_graph_serves_every_batch_time_and_position(jit_compile, be):
        """Nothing but widths is known while it is traced: outputs, states and gradients equal those of eager calls."""
        import tensorflow

        cfg = FwPKMConfig(4, 3, 2, 4, 2, 4, 1, boundary="wait")

        def run(*args):
            *arrays, position = args
            with tensorflow.GradientTape() as tape:
                tape.watch(arrays)
                keys, values, query, value, gate = arrays
                state = be.init_state(cfg, Memory(keys, values), keras.ops.shape(query)[0])
                output, state, trace = be.apply(cfg, state._replace(position=position), query, value, gate)
                loss = keras.ops.sum(output**2) + keras.ops.sum(state.memory.values**2)
            zero = tensorflow.UnconnectedGradients.ZERO  # what an eager call without a write does not depend on
            return output, state, trace, tape.gradient(loss, arrays, unconnected_gradients=zero)

        memory, rng, bound = be.init_memory(cfg), np.random.default_rng(0), agreement.BOUNDS["float32"].gradient
        unknown = [tensorflow.TensorSpec((None, None, 8)), tensorflow.TensorSpec((None, None, 3))]
        unknown += [tensorflow.TensorSpec((None, None)), tensorflow.TensorSpec((None,), "int32")]
        tables = [tensorflow.TensorSpec(table.shape) for table in memory]
        graph = tensorflow.function(run, jit_compile=jit_compile, input_signature=[*tables, *unknown], autograph=False)
        for position, *shape in ((3, 2, 11), (6, 3, 2)):
            arrays = (rng.normal(size=(*shape, 8)), rng.normal(size=(*shape, 3)), rng.uniform(size=shape))
            inputs = [*memory, *(be.asarray(array, "float32") for array in arrays)]
            inputs.append(be.asarray(np.full(shape[0], position), "int32"))
            for actual, expected in zip(leaves(graph(*inputs)), leaves(run(*inputs)), strict=True):
                assert agreement.relative_error(be.to_numpy(actual), be.to_numpy(expected)) < bound

    @pytest.mark.parametrize("usage_weight", [0.0, 0.5])
    def test_loops_carry_a_state(usage_weight, be):
        """The loops of a graph carry tensors alone: where nothing is weighed by use, no field may be a None."""
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2, 0, usage_weight=usage_weight)
        query, value = (tensorflow.random.stateless_normal((3, 2, 5, width), seed=(0, 1)) for width in (4, 3))
        begun = be.init_state(cfg, be.init_memory(cfg), 2)

        def while_loop(state):
            def read_on(i, state):
                return i + 1, be.apply(cfg, state, query[i], value[i])[1]

            return tensorflow.while_loop(lambda i, _: i < 3, read_on, (tensorflow.constant(0), state))[1]

        def for_loop(state):
            for i in tensorflow.range(3):
                state = be.apply(cfg, state, query[i], value[i])[1]
            return state

        expected = begun
        for i in range(3):
            expected = be.apply(cfg, expected, query[i], value[i])[1]
        for function in (while_loop, for_loop):
            after = tensorflow.function(function)(begun)
            assert type(after) is State
            for a, b in zip(leaves(after), leaves(expected), strict=True):
                assert agreement.relative_error(be.to_numpy(a), be.to_numpy(b)) < agreement.BOUNDS["float32"].forward
        tensorflow.nest.assert_same_structure(begun, after)

    def test_a_graph_of_unknown_length_takes_no_tokens(be):
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2)
        state = be.init_state(cfg, be.init_memory(cfg), 2)
        unknown = [tensorflow.TensorSpec((2, None, 4)), tensorflow.TensorSpec((2, None, 3))]
        graph = tensorflow.function(lambda q, v: be.apply(cfg, state, q, v)[:2], input_signature=unknown)
        output, after = graph(keras.ops.zeros((2, 0, 4)), keras.ops.zeros((2, 0, 3)))
        assert output.shape == (2, 0, 3)
        assert be.to_numpy(after.position).tolist() == [0, 0]

    @pytest.mark.parametrize(
        ("jit_compile", "start"), [(False, "state"), (False, "memory"), (False, "read only"), (True, "state")]
    )
    def test_a_graph_shows_a_cu_seqlens_that_is_not_legal(jit_compile, start, be):
        """Nobody can raise there: its tokens read NaN, and nothing is written."""
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2, 1)
        rng, mask, bound = np.random.default_rng(0), np.arange(7)[None] != 3, agreement.BOUNDS["float32"].forward
        tokens = [be.asarray(rng.normal(size=(1, 7, width)), "float32") for width in (4, 3)]
        memory = be.init_memory(cfg)
        state = be.apply(
            cfg, be.init_state(cfg, memory, 2), *(x[:, :3] for x in (keras.ops.repeat(y, 2, 0) for y in tokens))
        )[1]
        begun = memory if start == "memory" else state

        def run(length, ends):
            query, value = (x[:, :length] for x in tokens)
            update, there = start != "read only", be.asarray(mask, "bool")[:, :length]
            return be.apply(cfg, begun, query, value, None, there, ends, update)

        unknown = [tensorflow.TensorSpec((), "int32"), tensorflow.TensorSpec((3,), "int32")]
        graph = tensorflow.function(run, jit_compile=jit_compile, input_signature=unknown, autograph=False)
        length = be.asarray(7, "int32")
        for ends in ([1, 3, 7], [0, 5, 2], [0, 5, 8], [0, -1, 7]):
            output, after, trace = graph(length, be.asarray(ends, "int32"))
            for x in (output, trace.weights):
                assert np.isnan(be.to_numpy(x)[mask]).all()
                assert (be.to_numpy(x)[~mask] == 0).all()
            assert not be.to_numpy(trace.writes).any()
            for a, b in zip(leaves(after or ()), leaves(state) if after else ()):
                np.testing.assert_array_equal(be.to_numpy(a), be.to_numpy(b))
        legal = be.asarray([0, 5, 7], "int32")
        found, expected = (leaves(call(length, legal)) for call in (graph, run))
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or agreement.relative_error(be.to_numpy(a), be.to_numpy(b)) < bound

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_graph_fails_where_a_state_has_other_rows(jit_compile, be):
        """Which nobody knows while it is traced: it would read, and reset, beyond the rows that there are."""
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2, 1)
        memory, rng = be.init_memory(cfg), np.random.default_rng(0)
        tokens = [be.asarray(rng.normal(size=(1, 2, width)), "float32") for width in (4, 3)]
        two, states = [keras.ops.repeat(x, 2, 0) for x in tokens], [be.init_state(cfg, memory, b) for b in (1, 2)]
        unknown = [tensorflow.TensorSpec((None, *x.shape[1:]), x.dtype) for x in leaves(states[0])]
        any_tokens = [tensorflow.TensorSpec((None, None, width)) for width in (4, 3)]

        def graph(function, *signature):
            def call(*args):
                state = as_state(args[: len(unknown)])
                return function(state, *args[len(unknown) :])

            signature = [*unknown, *signature]
            return tensorflow.function(call, jit_compile=jit_compile, input_signature=signature, autograph=False)

        def fails(function, state, *args):
            with pytest.raises(tensorflow.errors.InvalidArgumentError):  # of several nodes: which is first varies
                function(*leaves(state), *args)

        apply = graph(lambda state, q, v: be.apply(cfg, state, q, v)[0], *any_tokens)
        assert apply(*leaves(states[1]), *two).shape == (2, 2, 3)
        fails(apply, states[0], *two)
        fails(apply, states[1], *tokens)
        fails(apply, states[1]._replace(pending_gate=states[0].pending_gate), *two)
        packed = graph(
            lambda state, q, v, ends: be.apply(cfg, state, q, v, cu_seqlens=ends)[0],
            *any_tokens, tensorflow.TensorSpec((None,), "int32"),
        )  # fmt: skip
        fails(packed, states[0], *tokens, be.asarray([0, 1, 2], "int32"))
        flush = graph(lambda state, rows: be.flush(cfg, state, rows)[0], tensorflow.TensorSpec((None,), "bool"))
        fails(flush, states[1], be.asarray([True], "bool"))

    @pytest.mark.parametrize("jit_compile", [False, True])
    @pytest.mark.parametrize("field", ["value", "gate", "mask"])
    def test_a_graph_fails_where_a_token_has_other_rows(jit_compile, field, be):
        import tensorflow

        cfg, layer = FwPKMConfig(4, 3, 1, 4, 2, 2, 1), FwPKM(key_dim=4, num_subkeys=4, top_k=2, chunk_size=2)
        memory = be.init_memory(cfg)
        dtypes = {"query": "float32", "value": "float32", "gate": "float32", "mask": "bool"}
        one, two = (
            {"query": np.ones((b, 2, 4)), "value": np.ones((b, 2, 3)), "gate": np.ones((b, 2)), "mask": np.ones((b, 2))}
            for b in (1, 2)
        )
        unknown = [tensorflow.TensorSpec((None, *x.shape[1:]), dtypes[name]) for name, x in one.items()]

        def run(given, function=lambda *args: be.apply(cfg, memory, *args)[0], signature=unknown):
            graph = tensorflow.function(function, jit_compile=jit_compile, input_signature=signature, autograph=False)
            return graph(*(be.asarray(x, dtypes[name]) for name, x in given.items()))

        assert run(two).shape == (2, 2, 3)
        for given in (one | {field: two[field]}, two | {field: one[field]}):
            with pytest.raises(tensorflow.errors.InvalidArgumentError):
                run(given)
            if field == "mask":
                its = {name: given[name] for name in ("query", "mask")}
                with pytest.raises(tensorflow.errors.InvalidArgumentError):
                    run(its, lambda x, mask: layer(x, mask=mask), [unknown[0], unknown[3]])

    def test_a_graph_fails_in_words_where_a_batch_is_empty(be):
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2, 1)
        memory = be.init_memory(cfg)
        unknown = [tensorflow.TensorSpec((None, 2, width)) for width in (4, 3)]
        graph = tensorflow.function(lambda q, v: be.apply(cfg, memory, q, v)[0], input_signature=unknown)
        with pytest.raises(
            tensorflow.errors.InvalidArgumentError, match=r"query must have at least one row \(B >= 1\)"
        ):
            graph(keras.ops.zeros((0, 2, 4)), keras.ops.zeros((0, 2, 3)))

    @pytest.mark.parametrize("dtype", ["uint8", "int16"])
    def test_traced_rows_are_of_any_integer_type(dtype, be):
        import tensorflow

        cfg = FwPKMConfig(2, 1, 1, 2, 1, 1, 0)
        state = be.init_state(cfg, be.init_memory(cfg), 200)
        state = state._replace(position=keras.ops.arange(200, dtype="int32"))
        rows = keras.ops.convert_to_tensor([150 if dtype == "int16" else 120, 3], dtype)
        selected = tensorflow.function(lambda rows: be.select(cfg, state, rows).position)(rows)
        assert be.to_numpy(selected).tolist() == be.to_numpy(rows).tolist()
        left = tensorflow.function(lambda rows: be.reset(cfg, state, be.init_memory(cfg), rows).position)(rows)
        assert np.flatnonzero(be.to_numpy(left) == 0).tolist() == [0, 3, int(rows[0])]

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_traced_row_that_a_state_does_not_have_changes_nothing_or_shows(jit_compile, be):
        """Nobody can raise: put and reset leave it out, and what select makes of it reads NaN."""
        import tensorflow

        cfg = FwPKMConfig(4, 3, 1, 4, 2, 2, 1)
        rng, memory = np.random.default_rng(0), be.init_memory(cfg)
        tokens = [be.asarray(rng.normal(size=(2, 3, width)), "float32") for width in (4, 3)]
        state = be.apply(cfg, be.init_state(cfg, memory, 2), *tokens)[1]
        others = be.select(cfg, state, [1, 1])

        def compiled(function):
            return tensorflow.function(function, jit_compile=jit_compile, autograph=False)

        select, reset, put = (
            compiled(lambda rows: be.select(cfg, state, rows)),
            compiled(lambda rows: be.reset(cfg, state, memory, rows)),
            compiled(lambda rows: be.put(cfg, state, rows, others)),
        )
        for row in (-1, 2, 5):
            rows = be.asarray([0, row], "int32")
            selected = select(rows)
            output = be.to_numpy(be.apply(cfg, selected, *tokens)[0])
            assert np.isnan(output[1]).all()
            np.testing.assert_array_equal(output[0], be.to_numpy(be.apply(cfg, state, *tokens)[0])[0])
            assert be.to_numpy(selected.position).tolist() == [3, 0]
            for received, expected in ((reset(rows[1:]), state), (put(rows), others)):
                for a, b in zip(leaves(received), leaves(expected), strict=True):
                    np.testing.assert_array_equal(be.to_numpy(a), be.to_numpy(b))
        flags = be.asarray([True, True], "bool")
        one = compiled(lambda rows: be.put(cfg, state, rows, be.select(cfg, state, [1])))(flags)
        for a, b in zip(leaves(one), leaves(others), strict=True):
            np.testing.assert_array_equal(be.to_numpy(a), be.to_numpy(b))
