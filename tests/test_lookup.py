"""Lookup (SPEC.md §2) against the plain definition: every slot's sum, sorted."""

import numpy as np
import pytest
from asserting import assert_close
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import FwPKMConfig, Memory, agreement, reference
from fwpkm.conformance.running import as_numpy, native
from fwpkm.conformance.strategies import FLOATS, cases, configs

RNG = np.random.default_rng


def brute_force(cfg, memory, query):
    """Slots and sums of every head by sorting all N slots in float64, and each token's smallest gap, order included.

    A tie goes to the slot whose sub-key ranks lower in the first codebook, then in the second; a tie in rank to the
    lower index.

    Returns:
        slots and sums ``[B, n, H, k]``, and the smallest gap among the first k + 1 entries ``[B, n]``.
    """
    batch, length, _ = query.shape
    s = cfg.num_subkeys
    halves = query.astype(np.float64).reshape(batch, length, cfg.num_heads, 2, 1, -1)
    keys = np.broadcast_to(memory.keys, (batch, *memory.keys.shape[1:])).astype(np.float64)[:, None]
    idw = cfg.score == "idw"
    scores = -np.log(cfg.score_eps + ((halves - keys) ** 2).sum(-1)) if idw else (halves * keys).sum(-1)
    ranks = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)
    sums, first, second = (
        np.broadcast_to(array, (batch, length, cfg.num_heads, s, s)).reshape(batch, length, cfg.num_heads, s * s)
        for array in (scores[..., 0, :, None] + scores[..., 1, None, :], ranks[..., 0, :, None], ranks[..., 1, None, :])
    )
    order = np.lexsort((second, first, -sums), axis=-1)
    ordered = np.take_along_axis(sums, order, axis=-1)
    gaps = -np.diff(ordered[..., : cfg.top_k + 1], axis=-1).reshape(batch, length, -1)
    return order[..., : cfg.top_k], ordered[..., : cfg.top_k], gaps.min(axis=-1, initial=np.inf)


def look_up(be, case):
    return as_numpy(be, be.lookup(case.cfg, native(be, case.memory), native(be, case.tokens.query)))


@given(cases(dtype=FLOATS, twists=("at_keys", "repeats")))
def test_slots_and_weights_are_those_of_all_slots_sorted(be, case):
    look = look_up(be, case)
    slots, sums, gap = brute_force(case.cfg, case.memory, case.tokens.query)
    clear = np.minimum(gap, agreement.deciding_gap(case.cfg, case.memory, case.tokens.query)) > agreement.GAP
    shape = look.slots.shape
    np.testing.assert_array_equal(look.slots[clear], slots.reshape(shape)[clear])
    logits = sums.reshape(shape) / case.cfg.temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    assert_close(look.weights, weights / weights.sum(-1, keepdims=True), case.dtype)


@given(cases(dtype=FLOATS, twists=("at_keys", "repeats", "twins")))
def test_output_is_the_weighted_sum_over_all_heads(be, case):
    look = look_up(be, case)
    values = np.broadcast_to(case.memory.values, (case.batch, *case.memory.values.shape[1:]))
    rows = values[np.arange(case.batch)[:, None, None], look.slots].astype(np.float64)
    assert_close(look.output, (look.weights[..., None] * rows).sum(axis=-2), case.dtype)
    assert_close(look.weights.sum(-1), np.ones((case.batch, case.length)), case.dtype)
    assert (look.weights >= 0).all()
    slots = look.slots.reshape(case.batch, case.length, case.cfg.num_heads, case.cfg.top_k)
    assert (np.diff(np.sort(slots, axis=-1), axis=-1) > 0).all(), "a head picks a slot once"
    assert slots.min() >= 0
    assert slots.max() < case.cfg.num_slots


@given(configs(score_eps=0.0123457), st.integers(0, 2**32 - 1), FLOATS)
def test_ties_go_to_the_lower_index(be, cfg, seed, dtype):
    """Keys and queries on a grid of few points: equal sub-scores and sums are exactly equal, and there are many.

    With this ε, products of two (ε + ‖q - K‖²) are equal only where their factors are: no rounding decides a tie.
    """
    rng = RNG(seed)
    keys = rng.choice([-0.5, 0.0, 0.5], size=(1, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2)).astype(dtype)
    query = rng.choice([-0.5, 0.0, 0.5], size=(1, 6, cfg.num_heads * cfg.key_dim)).astype(dtype)
    memory = Memory(keys, rng.normal(size=(1, cfg.num_slots, cfg.value_dim)).astype(dtype))
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query)))
    expected = brute_force(cfg, memory, query)[0]
    np.testing.assert_array_equal(look.slots, expected.reshape(look.slots.shape))


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_all_equal_keys_give_the_first_slots(be, score, dtype, top_k):
    """All sums tie: the grid's first row, rank in the first codebook first."""
    cfg = FwPKMConfig(key_dim=4, value_dim=2, num_heads=2, num_subkeys=8, top_k=top_k, score=score)
    memory = Memory(np.ones((1, 2, 2, 8, 2), dtype), np.ones((1, 64, 2), dtype))
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, RNG(0).normal(size=(1, 5, 8)).astype(dtype))))
    np.testing.assert_array_equal(look.slots, np.broadcast_to(np.tile(np.arange(top_k), 2), (1, 5, 2 * top_k)))


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_keys_tie_wherever_they_stand(be, score, dtype):
    """In a product of matrices, and where an array's end is no whole register, equal numbers can round apart."""
    rng = RNG(0)
    for num_subkeys, top_k, key_dim in ((31, 1, 16), (7, 7, 4), (33, 8, 34)):
        cfg = FwPKMConfig(key_dim, 1, 1, num_subkeys, top_k, score=score)
        for length in [1, 3] * 10:
            keys = np.repeat(rng.normal(size=(1, 1, 2, 1, key_dim // 2)), num_subkeys, -2).astype(dtype)
            memory = Memory(keys, np.ones((1, cfg.num_slots, 1), dtype))
            query = rng.normal(size=(1, length, key_dim)).astype(dtype)
            slots = be.to_numpy(be.lookup(cfg, native(be, memory), native(be, query)).slots)
            np.testing.assert_array_equal(slots, np.broadcast_to(np.arange(top_k), slots.shape))


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("num_subkeys", [8, 300])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_a_score_that_is_no_number_ranks_first_so_its_tokens_are_dead(be, score, num_subkeys, nan):
    """§2. Of two memories one has a sub-key with a NaN; among few and among many, of which a backend searches some."""
    cfg = FwPKMConfig(4, 2, 1, num_subkeys, 2, score=score)
    keys = RNG(0).uniform(-1, 1, (2, 1, 2, num_subkeys, 2)).astype("float32")
    keys[0, 0, 1, 5, 1] = nan
    memory = Memory(keys, np.ones((2, cfg.num_slots, 2), "float32"))
    query = RNG(1).uniform(-1, 1, (2, 20, 4)).astype("float32")
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query)))
    assert np.isnan(look.output[0]).all()
    assert np.isnan(look.weights[0]).all()
    assert (look.slots[0] >= 0).all()
    assert (look.slots[0] < cfg.num_slots).all()
    np.testing.assert_allclose(look.output[1], 1.0, rtol=1e-6)


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@pytest.mark.parametrize("feature", [0, 1])
@pytest.mark.parametrize("number", [np.inf, -np.inf, 3e38])
def test_a_key_that_no_token_selects_harms_none(be, score, feature, number):
    cfg = FwPKMConfig(4, 1, 1, 4, 2, score=score)
    keys = RNG(0).uniform(0.5, 1, (1, 1, 2, 4, 2)).astype("float32")
    keys[0, 0, 1, 2, feature] = number
    query = np.float32(-np.sign(number)) * RNG(1).uniform(0.5, 1, (1, 3, 4)).astype("float32")
    look = as_numpy(be, be.lookup(cfg, native(be, Memory(keys, np.ones((1, 16, 1), "float32"))), native(be, query)))
    np.testing.assert_allclose(look.output, 1.0, rtol=1e-6)
    assert not (look.slots % 4 == 2).any()


def test_zeros_of_either_sign_tie(be):
    cfg = FwPKMConfig(2, 1, 1, 4, 2, score="dot_product")
    keys = np.array([-0.5, 0.5, -1, 1], "float32").reshape(1, 1, 1, 4, 1).repeat(2, 2)
    memory = Memory(keys, np.ones((1, 16, 1), "float32"))
    slots = be.lookup(cfg, native(be, memory), native(be, np.zeros((1, 1, 2), "float32"))).slots
    assert be.to_numpy(slots).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("length", [1, 3])
def test_products_that_overflow_kill_a_token_in_any_company(be, length):
    cfg = FwPKMConfig(8, 1, 1, 8, 1, score="dot_product")
    keys = RNG(0).uniform(-1, 1, (1, 1, 2, 8, 4)).astype("float32")
    keys[0, 0, 0, 3] = [1e30, -1e30, 1e30, -1e30]
    query = np.ones((1, length, 8), "float32")
    query[0, 0, :4] = 1e30
    memory = Memory(keys, np.ones((1, 64, 1), "float32"))
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query)))
    np.testing.assert_array_equal(np.isnan(look.output[0, :, 0]), np.arange(length) == 0)


def test_heads_share_one_softmax(be):
    """A head whose keys are far away gets almost no weight: each head alone would get a half."""
    cfg = FwPKMConfig(key_dim=2, value_dim=1, num_heads=2, num_subkeys=2, top_k=2)
    keys = np.zeros((1, 2, 2, 2, 1))
    keys[0, 1] = 100.0
    memory = Memory(keys, np.ones((1, 4, 1)))
    weights = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, np.zeros((1, 1, 4))))).weights[0, 0]
    near, far = 1 / cfg.score_eps**2, 1 / (cfg.score_eps + 1e4) ** 2
    assert_close(weights, np.array([near, near, far, far]) / (2 * (near + far)), "float64")


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2])
def test_scores_near_a_key_come_from_differences(be, distance):
    """Keys far from the origin and close to one another: ‖q‖² + ‖K‖² - 2q·K in float32 cannot tell them apart.

    There are more of them than a shortlist by that expansion would hold.
    """
    cfg = FwPKMConfig(key_dim=8, value_dim=1, num_subkeys=24, top_k=2, score_eps=distance**2)
    base, offsets = 30 + np.arange(4.0), np.sqrt(RNG(0).permutation(24)) * distance * 2**10
    both = np.stack([base + offsets[:, None], base + 1.5 * offsets[:, None]])
    memory = Memory(both.astype(np.float32)[None, None], RNG(0).normal(size=(1, 576, 1)).astype(np.float32))
    query = np.concatenate(list(memory.keys[0, 0]), axis=-1)[None]
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query)))
    expected, _, gap = brute_force(cfg, memory, query)
    clear = gap > agreement.GAP
    assert clear.any()
    np.testing.assert_array_equal(look.slots[clear], expected.reshape(1, 24, 2)[clear])
    np.testing.assert_array_equal(look.slots[0, :, 0], np.arange(24) * 25)


@pytest.mark.parametrize("query_dtype", ["float16", "float32", "float64"])
def test_outputs_have_the_dtype_of_the_query_and_weights_that_of_the_tables(be, query_dtype):
    cfg = FwPKMConfig(key_dim=4, value_dim=3, num_subkeys=4, top_k=2)
    query = RNG(0).normal(size=(2, 3, 4)).astype(query_dtype)
    memory = Memory(*(np.concatenate([table, table]) for table in reference.init_memory(cfg)))
    look = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query)))
    same = as_numpy(be, be.lookup(cfg, native(be, memory), native(be, query.astype(np.float32))))
    assert look.output.dtype == query_dtype
    assert look.weights.dtype == np.float32
    np.testing.assert_array_equal(look.weights, same.weights)
    np.testing.assert_array_equal(look.output, same.output.astype(query_dtype))


@given(cases(dtype=FLOATS, twists=()), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_a_query_that_is_not_finite_reads_nan_and_leaves_others_alone(be, case, number, data):
    row, token = data.draw(st.integers(0, case.batch - 1)), data.draw(st.integers(0, case.length - 1))
    before = look_up(be, case)
    case.tokens.query[row, token, data.draw(st.integers(0, case.cfg.key_dim - 1))] = number
    look = look_up(be, case)
    assert np.isnan(look.output[row, token]).all()
    assert np.isnan(look.weights[row, token]).all()
    assert (look.slots[row, token] >= 0).all()
    assert (look.slots[row, token] < case.cfg.num_slots).all()
    others = np.ones((case.batch, case.length), bool)
    others[row, token] = False
    for received, expected in zip(look, before):
        np.testing.assert_array_equal(received[others], expected[others])


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e7])
def test_weights_sum_to_one_however_large_the_scores(be, scale):
    cfg = FwPKMConfig(4, 3, 1, 4, 3, 3, score="dot_product")
    case = drawn(cfg, 1, 50, dtype="float32")
    query = case.tokens.query * np.where(np.arange(4) < 2, scale, 1).astype("float32")
    weights = as_numpy(be, be.lookup(cfg, native(be, case.memory), native(be, query)).weights)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
