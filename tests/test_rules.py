"""The rules that backends share, held to the equations of the reference, and their derivatives to differences."""

import numpy as np
import pytest

from fwpkm import FwPKMConfig, equations, rules
from fwpkm.agreement import DIFFERENCE_STEP

RNG = np.random.default_rng(0)


def weights() -> np.ndarray:
    drawn = RNG.uniform(0.1, 1, size=(5, 8))
    return drawn / drawn.sum(-1, keepdims=True)


def slope_by_differences(function, x: np.ndarray) -> np.ndarray:
    """The derivative of an elementwise function, by central differences."""
    return (function(x + DIFFERENCE_STEP) - function(x - DIFFERENCE_STEP)) / (2 * DIFFERENCE_STEP)


@pytest.mark.parametrize("scale", ["slots", "unit", "normalized"])
def test_the_write_scale_is_the_equations(scale):
    cfg, w = FwPKMConfig(write_scale=scale, num_heads=2, top_k=4), weights()
    np.testing.assert_allclose(rules.write_scale(np, cfg, w) * np.ones(5), equations.write_scale(cfg, w), rtol=1e-14)


def test_one_token_is_rewritten_exactly_under_the_normalized_scale():
    """§4: κ Σ w² = 1."""
    w = weights()
    scale = rules.write_scale(np, FwPKMConfig(write_scale="normalized"), w)
    np.testing.assert_allclose(scale * np.square(w).sum(-1), 1, rtol=1e-14)


def test_the_addressing_loss_is_the_equations_and_the_slope_is_its_derivative():
    mean = RNG.uniform(0.01, 0.5, size=(2, 2, 6))
    np.testing.assert_allclose(rules.addressing_loss(np, mean).sum(), equations.addressing_loss(mean), rtol=1e-14)
    by_differences = slope_by_differences(lambda x: rules.addressing_loss(np, x), mean)
    np.testing.assert_allclose(rules.addressing_slope(np, mean), by_differences, rtol=1e-7)


def test_a_sub_key_that_nothing_chose_has_a_finite_slope():
    np.testing.assert_allclose(rules.addressing_slope(np, np.zeros(1)), np.log(1e-8), rtol=1e-14)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rates", [None, np.linspace(0.1, 0.7, 6)], ids=["one rate", "a rate for each row"])
def test_a_step_is_the_equations(clip, decay, rates):
    cfg = FwPKMConfig(grad_clip=clip, weight_decay=decay, learning_rate=0.7)
    rows, gradient = RNG.normal(size=(2, 6, 4))
    received, expected = rules.step(np, cfg, rows, gradient, rates), equations.step(cfg, rows, gradient, rates)
    np.testing.assert_allclose(received, expected, rtol=1e-14)


def test_learning_rates_are_the_equations():
    cfg, uses = FwPKMConfig(usage_weight=0.3, learning_rate=0.7), np.arange(6.0)
    reads = np.array([1.0, 2, 9, 1, 4, 3])
    expected = equations.learning_rates(cfg, reads, uses)
    np.testing.assert_allclose(rules.learning_rates(cfg, reads, uses), expected, rtol=1e-14)
    assert expected[0] == 0.7, "without uses the plain rate"


def test_rms_norm_and_zscore_by_their_definitions():
    x, weight = RNG.normal(size=(3, 7)), RNG.normal(size=7)
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rules.rms_norm(np, x, weight), expected, rtol=1e-13)
    expected = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rules.zscore(np, x), expected, rtol=1e-12)
    assert (rules.zscore(np, np.full((2, 7), 3.3)) == 0).all()


def test_mix_weighs_reads_against_values():
    read, value, gate = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4)), np.array([0.0, 0.25, 1.0])
    mixed = rules.mix(gate, read, value)
    np.testing.assert_allclose(mixed, [value[0], 0.25 * read[1] + 0.75 * value[1], read[2]], rtol=1e-14)
    np.testing.assert_array_equal(rules.mix(None, read, value), read + value)
