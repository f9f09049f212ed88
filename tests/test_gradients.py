"""Outer gradients (SPEC.md §4): exact through reads, writes and κ, against central differences of the reference."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from asserting import assert_close, assert_same_bits
from drawn import drawn, masked_tick, row_alone
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement, reference
from fwpkm.conformance.running import INPUTS, as_numpy, draw_cotangents, forward, gradients, native
from fwpkm.conformance.strategies import LAYOUTS, NUMBERS, PADDED, UNMASKED, cases, floating, unmasked, untied_case

TORCH = fwpkm.get_backend("torch")
CLEAR = 100 * agreement.DIFFERENCE_STEP / 1e-3**0.5
"""A step of a difference moves no score by more than a hundredth of this: an idw score's slope is at most 1/√ε."""


def objective(case, weights):
    """Σ outputs · weights by the float64 reference, as a function of the arrays that follow."""
    function = lambda *arrays: sum((a * b).sum() for a, b in zip(forward(reference, case, arrays), weights))  # noqa: E731
    return function, [*floating(case.tokens).values(), *case.memory]


def assert_central_differences(rng, gradients, function, arrays):
    """Along a drawn direction of each array alone; no gradient is None where an array is."""
    step = agreement.DIFFERENCE_STEP
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (
            function(*(x + sign * step * direction if i == j else x for j, x in enumerate(arrays))) for sign in (1, -1)
        )
        error = abs((ahead - behind) / (2 * step) - (gradient * direction).sum())
        assert error <= agreement.DIFFERENCE_BOUND * max(1.0, np.linalg.norm(gradient)), f"argument {i}: {error}"


@given(
    cases(
        untied=True,
        gap=CLEAR,
        learning_rate=st.sampled_from([1.0, 0.5]),
        score_eps=st.sampled_from([1e-2, 0.1]),
        max_length=12,
        min_length=4,
    )
)
def test_gradients_equal_central_differences_of_the_reference(gradient_be, case):
    """Every input alone, over several chunks and a flush, into outputs and both final tables."""
    rng = np.random.default_rng(case.seed)
    weights = draw_cotangents(case, rng)
    assert_central_differences(rng, gradients(gradient_be, case, weights), *objective(case, weights))


@given(cases(untied=True, max_length=12), st.data())
def test_gradients_do_not_depend_on_the_split(gradient_be, case, data):
    at = data.draw(st.integers(0, case.length))
    weights = draw_cotangents(case, np.random.default_rng(case.seed))
    whole = gradients(gradient_be, case, weights)
    split = gradients(gradient_be, case, weights, sizes=[at, case.length - at])
    for received, expected in zip(split, whole):
        if expected is not None:
            assert_close(received, expected, case.dtype, "gradient")


@pytest.mark.parametrize("write_scale", ["slots", "unit", "normalized"])
@pytest.mark.parametrize("output", ["output", "keys", "values"])
def test_each_output_alone_reaches_the_first_chunk(gradient_be, write_scale, output):
    """A cotangent on one output only: the last chunk's reads, the final keys, or the final values."""
    cfg = FwPKMConfig(4, 3, 2, 4, 2, 3, 1, write_scale=write_scale, score_eps=0.1)
    rng = np.random.default_rng(2)
    case = untied_case(cfg, 2, "float64", frozenset(), 2, 9, ["mask"], None, gap=CLEAR)
    weights = [np.zeros_like(array) for array in draw_cotangents(case, rng)]
    index = ("output", "keys", "values").index(output)
    weights[index][...] = rng.normal(size=weights[index].shape)
    weights[0][:, :6] = 0
    received = gradients(gradient_be, case, weights)
    first = [array[:, :3] for array in received[:3]]
    assert np.any(first[0]), "queries of the first chunk"
    assert np.any(first[1]) == np.any(first[2]) == (output != "keys"), "its values and gates"
    assert_central_differences(rng, received, *objective(case, weights))


@given(cases(left_out=st.just(()), twists=("repeats",), untied=True), st.data())
def test_no_gradient_passes_through_masked_contents_of_others_or_dead_tokens(gradient_be, case, data):
    """Dead tokens get 0, though numbers that are not finite stand in the graph; others get what a mask would give."""
    row = data.draw(st.integers(0, case.batch - 1))
    if case.cfg.memory_scope == "sequence":
        case, row = row_alone(case, row), 0
    assume(case.length)
    at = data.draw(st.integers(0, case.length - 1))
    weights = draw_cotangents(case, np.random.default_rng(case.seed))
    weights[0][row, at] = 0
    place = data.draw(st.sampled_from(["query", "value", "gate"]))
    number = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e200]))
    if number == 1e200 and (place != "query" or case.cfg.score != "idw"):
        number = np.nan
    dead = dataclasses.replace(case, tokens=case.tokens.map(np.copy))
    getattr(dead.tokens, place)[(row, at, 0) if place != "gate" else (row, at)] = number
    received = gradients(gradient_be, dead, weights)
    expected = gradients(gradient_be, masked_tick(case, row, at), weights)
    for gradient, other in zip(received, expected):
        assert np.isfinite(gradient).all()
        assert_close(gradient, other, case.dtype, "gradient")
    for gradient in received[: len(NUMBERS)]:
        assert not gradient[row, at].any()


@st.composite
def ragged_cases(draw):
    """A case in a layout, whose masked tokens hold NaN as a caller's padding may."""
    case = draw(cases(memory_scope="sequence", untied=True, left_out=st.sampled_from([(), ("gate",)]), max_length=12))
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == UNMASKED:
        ends = [draw(st.integers(0, case.length)) for _ in range(case.batch)]
        case = dataclasses.replace(case, tokens=case.tokens._replace(mask=np.arange(case.length) < np.c_[ends]))
    for array in floating(case.tokens).values():
        if array is not None:
            array[~case.tokens.mask] = draw(st.sampled_from([np.nan, np.inf, 1.0]))
    return dataclasses.replace(case, layout=layout)


@given(ragged_cases(), st.data())
def test_gradients_of_a_batch_are_those_of_each_row_alone(gradient_be, case, data):
    """Padded in two calls, so that rows stand apart in the second, or packed; 0 for what is masked, NaN or not."""
    at = data.draw(st.integers(0, case.length))
    weights = draw_cotangents(case, np.random.default_rng(case.seed))
    together = dict(zip(INPUTS, gradients(gradient_be, case, weights, sizes=[at, case.length - at])))
    for row, own in enumerate(unmasked(case.tokens)):
        alone = dataclasses.replace(row_alone(case, row), layout=PADDED)
        output, *tables = weights
        cotangents = (output[row : row + 1, own], *(table[row : row + 1] for table in tables))
        for name, expected in zip(INPUTS, gradients(gradient_be, alone, cotangents)):
            if expected is None:
                assert together[name] is None
            elif name in Memory._fields:
                assert_close(together[name][row], expected[0], case.dtype, "gradient", name)
            else:
                assert_close(together[name][row][own], expected[0], case.dtype, "gradient", name)
                assert not together[name][row][~own].any()


@given(cases(untied=True, max_length=12))
def test_inplace_either_refuses_or_keeps_gradients_right(gradient_be, case):
    """Tables without gradient, but queries, values and gates with one: the graph may hold what inplace overwrites."""
    rng = np.random.default_rng(case.seed)
    weights, memory = draw_cotangents(case, rng), native(gradient_be, case.memory)
    present = [array is not None for array in floating(case.tokens).values()]
    args = native(gradient_be, tuple(array for array in floating(case.tokens).values() if array is not None))
    received = []
    for inplace in (False, True):

        def function(*given, inplace=inplace):
            given = iter(given)
            return forward(
                gradient_be, case, [*(next(given) if here else None for here in present), *memory], inplace=inplace
            )

        try:
            received.append(as_numpy(gradient_be, tuple(gradient_be.vjp(function, args, native(gradient_be, weights)))))
        except (ValueError, RuntimeError):
            if not inplace:
                raise
            return
    assert_same_bits(*received)


def test_no_gradient_passes_through_the_traces():
    cfg = FwPKMConfig(4, 2, 1, 4, 2, 3, 1)
    case = drawn(cfg, 2, 5)
    memory = Memory(*(table.requires_grad_() for table in native(TORCH, case.memory)))
    tokens = native(TORCH, tuple(case.tokens))
    for array in tokens[:3]:
        array.requires_grad_()
    output, state, trace = TORCH.apply(cfg, TORCH.init_state(cfg, memory, batch_size=2), *tokens)
    assert output.requires_grad
    assert all(table.requires_grad for table in state.memory)
    flushed, last = TORCH.flush(cfg, state)
    assert all(table.requires_grad for table in flushed.memory)
    losses = TORCH.chunk_update(cfg, memory, *tokens)[1]
    records = (*trace, *last, *losses)
    assert not any(record.requires_grad for record in records if isinstance(record, torch.Tensor))


def test_gradient_reaches_queries_through_lookup_weights(gradient_be):
    cfg = FwPKMConfig(4, 3, 2, 4, 2, score_eps=0.1)
    case, be, rng = drawn(cfg, 2, 3), gradient_be, np.random.default_rng(1)
    weights = (rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 3, 4)))
    args = (case.tokens.query, *case.memory)

    def read(be, query, *tables):
        look = be.lookup(cfg, Memory(*tables), query)
        return look.output, look.weights

    received = as_numpy(be, tuple(be.vjp(functools.partial(read, be), native(be, args), native(be, weights))))
    total = lambda *args: sum((a * b).sum() for a, b in zip(read(reference, *args), weights))  # noqa: E731
    assert_central_differences(rng, received, total, args)


def test_vjp(gradient_be):
    """One output or several, and zeros in its shape for an argument without influence."""
    be = gradient_be
    a, b, unused = (be.asarray(np.array(x), "float64") for x in ([1.0, 2.0], [3.0, 5.0], [[7.0]]))
    one = be.asarray(np.array([1.0, 10.0]), "float64")
    single = be.vjp(lambda a, b, unused: a * b, (a, b, unused), one)
    assert [as_numpy(be, x).tolist() for x in single] == [[3.0, 50.0], [1.0, 20.0], [[0.0]]]
    double = be.vjp(lambda a, b, unused: (a * b, a + a), (a, b, unused), (one, one))
    assert isinstance(double, tuple)
    assert [as_numpy(be, x).tolist() for x in double] == [[5.0, 70.0], [1.0, 20.0], [[0.0]]]
    constant = be.vjp(lambda a, b, unused: (one, a), (a, b, unused), (one, one))
    assert [as_numpy(be, x).tolist() for x in constant] == [[1.0, 10.0], [0.0, 0.0], [[0.0]]]


@settings(max_examples=max(10, settings.default.max_examples // 3))
@given(cases(max_length=12))
def test_two_runs_give_equal_bits(gradient_be, case):
    """Forward and backward, in deterministic algorithms' absence: sums have one order (twins and repeats included)."""
    assert_two_equal_runs(gradient_be, case)


def assert_two_equal_runs(be, case):
    arrays, runs = (*floating(case.tokens).values(), *case.memory), []
    weights = tuple(x.astype(case.dtype) for x in draw_cotangents(case, np.random.default_rng(case.seed)))
    for _ in range(2):
        outputs = as_numpy(be, forward(be, case, native(be, arrays)))
        runs.append((*outputs, *(x for x in gradients(be, case, weights) if x is not None)))
    assert_same_bits(*runs)


def test_two_large_runs_give_equal_bits(gradient_be):
    """Large enough for several threads to share the sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_two_equal_runs(gradient_be, drawn(FwPKMConfig(16, 64, 2, 16, 8, 256, 1), 2, 600, dtype="float32"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("call", ["masked", "no tokens", "empty sequences"])
def test_every_weight_of_a_torch_layer_has_a_gradient_where_nothing_is_read(call, learn):
    """Zeros, as DDP waits for the gradient of each weight from every rank."""
    layer = TORCH.FwPKM(8, key_dim=8, value_dim=8, num_subkeys=6, top_k=2, chunk_size=4, learn_memory=learn)
    x, options = {
        "masked": (torch.ones(2, 5, 8), {"mask": torch.zeros(2, 5, dtype=torch.bool)}),
        "no tokens": (torch.ones(2, 0, 8), {}),
        "empty sequences": (torch.full((1, 5, 8), torch.nan), {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}),
    }[call]
    layer(x, **options)[0].sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert not weight.grad.any(), name
