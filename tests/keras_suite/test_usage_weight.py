"""Writes weighted by use (SPEC.md §11): the functions on tensorflow; those of torch and jax have tests of their own."""

import dataclasses

import keras
import numpy as np
import pytest
from asserting import assert_close, assert_same_bits
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st
from keras_suite.layers import BACKEND, leaves

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement, reference
from fwpkm.backends.keras import as_state
from fwpkm.conformance.running import as_numpy, draw_cotangents, gradients, native, start, stream
from fwpkm.conformance.strategies import PACKED, PADDED, cases, splits

USED = FwPKMConfig(4, 3, 2, 4, 2, 3, 1, usage_weight=0.7, weight_decay=0.05)
WEIGHTS = st.sampled_from([0.25, 1.0, 3.0])


def half_read(be, cfg=USED, rows=2, length=8):
    """A case, its state after one call, and the uses that this holds."""
    case = drawn(cfg, rows, length)
    state = stream(be, cfg, start(be, case), case.tokens)[1]
    return case, state, as_numpy(be, state.uses)


if BACKEND == "tensorflow":

    @given(cases(usage_weight=WEIGHTS, untied=True), st.data())
    def test_any_split_gives_what_the_reference_gives(be, case, data):
        sizes = data.draw(splits(case.length))
        layouts = [PADDED, PACKED] if case.cfg.memory_scope == "sequence" else [PADDED]
        layout = data.draw(st.sampled_from(layouts))
        wanted, expected = stream(reference, case.cfg, start(reference, case), case.tokens, flush=True)
        received, state = stream(be, case.cfg, start(be, case), case.tokens, sizes, flush=True, layout=layout)
        for name in ("output", "memory"):
            assert_close(getattr(received, name), getattr(wanted, name), case.dtype, name=name)
        assert_same_bits(as_numpy(be, state.uses), expected.uses)

    @given(cases(usage_weight=WEIGHTS, untied=True))
    def test_gradients_are_those_of_torch(be, case):
        """Which equal central differences of the reference (tests/test_uses.py)."""
        weights = draw_cotangents(case, np.random.default_rng(0))
        wanted = gradients(fwpkm.get_backend("torch"), case, weights)
        for i, (a, b) in enumerate(zip(gradients(be, case, weights), wanted, strict=True)):
            assert (a is None) == (b is None)
            if b is not None:
                assert_close(a, b, case.dtype, "gradient", name=str(i))

    def test_no_gradient_passes_through_the_counts(be):
        """Nor into those that a state begins with, which only say how far rows move."""
        case, state, _ = half_read(be)

        def read_on(uses):
            after = be.flush(USED, be.apply(USED, state._replace(uses=uses), *native(be, case.tokens))[1])[0]
            return (*after.memory, after.uses)

        outputs = read_on(state.uses)
        (found,) = be.vjp(read_on, [state.uses], [keras.ops.ones_like(x) for x in outputs])
        assert not be.to_numpy(found).any()
        assert not np.array_equal(be.to_numpy(read_on(10 * state.uses)[1]), be.to_numpy(outputs[1]))

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_one_graph_serves_every_batch_time_and_position(jit_compile, be):
        import tensorflow

        cfg, bound = dataclasses.replace(USED, boundary="wait"), agreement.BOUNDS["float32"].gradient
        memory, shapes = be.init_memory(cfg), {"query": (8,), "value": (3,), "gate": ()}

        def run(uses, position, mask, *arrays):
            with tensorflow.GradientTape() as tape:
                tape.watch(arrays)
                state = be.init_state(cfg, memory, keras.ops.shape(mask)[0])
                output, state, _ = be.apply(cfg, state._replace(uses=uses, position=position), *arrays, mask)
                after, _ = be.flush(cfg, state)
                loss = keras.ops.sum(output**2) + keras.ops.sum(after.memory.values**2)
            zero = tensorflow.UnconnectedGradients.ZERO  # what an eager call without a write does not depend on
            return output, state, after, tape.gradient(loss, arrays, unconnected_gradients=zero)

        unknown = [tensorflow.TensorSpec((None, cfg.num_slots)), tensorflow.TensorSpec((None,), "int32")]
        unknown += [tensorflow.TensorSpec((None, None), "bool")]
        unknown += [tensorflow.TensorSpec((None, None, *width)) for width in shapes.values()]
        graph = tensorflow.function(run, jit_compile=jit_compile, input_signature=unknown, autograph=False)
        for rows, length in ((2, 11), (3, 2)):
            tokens = drawn(cfg, rows, length, dtype="float32").tokens
            uses = np.arange(rows * cfg.num_slots, dtype="float32").reshape(rows, -1)
            inputs = [native(be, x) for x in (uses, np.arange(rows, dtype="int32"), tokens.mask, *tokens[:3])]
            found, expected = (leaves(call(*inputs)) for call in (graph, run))
            for a, b in zip(found, expected, strict=True):
                assert agreement.relative_error(be.to_numpy(a), be.to_numpy(b)) < bound

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_graph_fails_where_uses_are_of_other_rows(jit_compile, be):
        import tensorflow

        state = be.init_state(USED, be.init_memory(USED), 2)
        tokens = native(be, drawn(USED, 2, 4, dtype="float32").tokens)
        unknown = [tensorflow.TensorSpec((None, *x.shape[1:]), x.dtype) for x in leaves(state)]

        def run(*arrays):
            return be.apply(USED, as_state(arrays), *tokens)[0]

        graph = tensorflow.function(run, jit_compile=jit_compile, input_signature=unknown, autograph=False)
        assert graph(*leaves(state)).shape == (2, 4, 3)
        with pytest.raises(tensorflow.errors.InvalidArgumentError):
            graph(*leaves(state)[:-1], state.uses[:1])

    def test_a_chunk_without_a_pair_counts_nothing(be):
        cfg = dataclasses.replace(USED, chunk_size=2)
        case = drawn(cfg, 2, 4, left_out=["mask"])
        case.tokens.value[0, 3] = np.nan  # no partner in the second chunk of row 0
        case.tokens.value[1, 1] = np.nan  # nor in the first of row 1
        reading, state = stream(be, cfg, start(be, case), case.tokens)
        assert reading.writes.tolist() == [2, 2]
        assert be.to_numpy(state.uses).sum(axis=1).tolist() == [2 * cfg.slots_per_token] * 2

    def test_a_row_that_keeps_its_bits_counts_as_used(be):
        """Its new value would not be finite."""
        case = drawn(dataclasses.replace(USED, learning_rate=1e300), 1, 3, left_out=["mask"])
        case = dataclasses.replace(case, memory=case.memory._replace(values=case.memory.values * 1e10))
        _, state = stream(be, case.cfg, start(be, case), case.tokens)
        assert_same_bits(as_numpy(be, state.memory.values), case.memory.values)
        assert be.to_numpy(state.uses).sum() == 3 * case.cfg.slots_per_token

    def test_what_only_reads_counts_nothing(be):
        case, state, _ = half_read(be)
        tokens = native(be, case.tokens)
        after = be.apply(USED, state, *tokens, update=False)[1]
        assert_same_bits(as_numpy(be, after), as_numpy(be, state))
        memory = Memory(*(x[:1] for x in state.memory))
        from_memory, from_state = (
            be.apply(USED, begun, *tokens)[0] for begun in (memory, be.init_state(USED, memory, 2))
        )
        assert_same_bits(as_numpy(be, from_memory), as_numpy(be, from_state))

    def test_uses_and_their_weight_go_together(be):
        case, state, _ = half_read(be)
        tokens = native(be, case.tokens)
        for cfg, uses, words in (
            (USED, None, r"state\.uses must be an array \[M, N\].*usage_weight is 0\.7"),
            (dataclasses.replace(USED, usage_weight=0.0), state.uses, r"must be \(\), since usage_weight is 0\.0"),
            (USED, state.uses[:, 1:], r"state\.uses must have shape \[M=2, N=16\]"),
            (USED, keras.ops.cast(state.uses, "float32"), r"state\.uses must have the tables' dtype, float64"),
        ):
            with pytest.raises(ValueError, match=words):
                be.apply(cfg, state._replace(uses=uses), *tokens)
        with pytest.raises(ValueError, match="usage_weight must be 0 here"):
            be.chunk_update(USED, native(be, case.memory), *tokens[:2])
        plain = dataclasses.replace(case, cfg=dataclasses.replace(USED, usage_weight=0.0))
        assert stream(be, plain.cfg, start(be, plain), plain.tokens)[1].uses == ()

    def test_rows_keep_their_uses(be):
        case, state, uses = half_read(be, rows=3)
        memory = native(be, Memory(*(x[:1] for x in case.memory)))
        picked = be.select(USED, state, [2, 0])
        np.testing.assert_array_equal(be.to_numpy(picked.uses), uses[[2, 0]])
        np.testing.assert_array_equal(be.to_numpy(be.concat(USED, [picked, state]).uses), uses[[2, 0, 0, 1, 2]])
        np.testing.assert_array_equal(be.to_numpy(be.put(USED, state, [0, 1], picked).uses), uses[[2, 0, 2]])
        anew = be.to_numpy(be.reset(USED, state, memory, [1]).uses)
        assert not anew[1].any()
        np.testing.assert_array_equal(anew[[0, 2]], uses[[0, 2]])
        flushed = be.to_numpy(be.flush(USED, state, [1])[0].uses)
        np.testing.assert_array_equal(flushed[[0, 2]], uses[[0, 2]])
        assert flushed[1].sum() > uses[1].sum()
        assert be.nbytes(state) == be.nbytes(state._replace(uses=None)) + uses.nbytes
        shared = half_read(be, dataclasses.replace(USED, memory_scope="batch"))
        assert_same_bits(as_numpy(be, be.select(shared[0].cfg, shared[1], [1, 1, 0]).uses), shared[2])

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_traced_rows_keep_their_uses(jit_compile, be):
        """One that a state does not have leaves the others alone, and shows none."""
        import tensorflow

        case, state, uses = half_read(be)
        memory, other = native(be, Memory(*(x[:1] for x in case.memory))), be.select(USED, state, [1, 1])

        def traced(function):
            return tensorflow.function(lambda rows: function(rows).uses, jit_compile=jit_compile, autograph=False)

        rows = be.asarray([1, 2], "int32")
        selected = be.to_numpy(traced(lambda rows: be.select(USED, state, rows))(rows))
        np.testing.assert_array_equal(selected, [uses[1], 0 * uses[1]])
        anew = be.to_numpy(traced(lambda rows: be.reset(USED, state, memory, rows))(rows))
        np.testing.assert_array_equal(anew, [uses[0], 0 * uses[1]])
        replaced = be.to_numpy(traced(lambda rows: be.put(USED, state, rows, other))(be.asarray([0, 2], "int32")))
        np.testing.assert_array_equal(replaced, uses[[1, 1]])

    def test_files_and_packed_states_hold_the_uses(be, tmp_path):
        case, state, _ = half_read(be)
        expected, memory = as_numpy(be, state), native(be, case.memory)
        fwpkm.save_state(tmp_path / "state.safetensors", state, USED)
        for backend in ("numpy", "keras"):
            loaded = fwpkm.load_state(tmp_path / "state.safetensors", USED, backend)
            assert_same_bits(as_numpy(fwpkm.get_backend(backend), loaded), expected)
        fwpkm.save_packed(tmp_path / "packed.safetensors", {"a": be.pack(USED, state, memory)})
        packed = fwpkm.load_packed(tmp_path / "packed.safetensors")["a"]
        assert_same_bits(as_numpy(be, be.unpack(USED, packed, memory)), expected)
        assert_same_bits(as_numpy(be, be.detach(state)), expected)
