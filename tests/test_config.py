"""FwPKMConfig (SPEC.md §1 and §8): every field's rule, and what a frozen config promises."""

import dataclasses
import json
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwpkm import FwPKMConfig

DEFAULTS = {
    "key_dim": 256,
    "value_dim": 256,
    "num_heads": 1,
    "num_subkeys": 128,
    "top_k": 8,
    "chunk_size": 512,
    "lookahead": 1,
    "boundary": "drop",
    "score": "idw",
    "score_eps": 1e-3,
    "temperature": 1.0,
    "learning_rate": 1.0,
    "write_scale": "slots",
    "weight_decay": 0.0,
    "grad_clip": None,
    "addressing_weight": 1.0,
    "memory_scope": "sequence",
    "usage_weight": 0.0,
    "initial_decay": 0.0,
    "recent_penalty": 0.0,
}
MINIMA = {"key_dim": 1, "value_dim": 1, "num_heads": 1, "num_subkeys": 1, "top_k": 1, "chunk_size": 1, "lookahead": 0}
POSITIVE = ["score_eps", "temperature", "grad_clip"]
NON_NEGATIVE = ["learning_rate", "weight_decay", "addressing_weight", "usage_weight", "initial_decay", "recent_penalty"]
CHOICES = {
    "boundary": ["drop", "wait"],
    "score": ["idw", "dot_product"],
    "write_scale": ["slots", "unit", "normalized"],
    "memory_scope": ["sequence", "batch"],
}

INTEGERS = st.sampled_from(list(MINIMA))
NUMBERS = st.sampled_from(POSITIVE + NON_NEGATIVE)
CHOICE_FIELDS = st.sampled_from(list(CHOICES))


def refuse(field: str, value: object) -> None:
    """The value is refused by a message that names the field, a rule and the value."""
    with pytest.raises(ValueError, match=rf"^{field} must be .+\. Received: ") as caught:
        FwPKMConfig(**{field: value})
    assert f"{field}={value!r}" in str(caught.value)


def test_defaults_are_those_of_the_specification() -> None:
    assert dataclasses.asdict(FwPKMConfig()) == DEFAULTS
    assert [field.name for field in dataclasses.fields(FwPKMConfig)] == list(DEFAULTS)


def test_every_field_has_a_rule_here() -> None:
    assert {*MINIMA, *POSITIVE, *NON_NEGATIVE, *CHOICES} == set(DEFAULTS)


def test_paper() -> None:
    cfg = FwPKMConfig.paper()
    assert cfg == FwPKMConfig(key_dim=512, value_dim=512, num_subkeys=512)
    assert 4 * cfg.num_slots * cfg.value_dim == 512 * 2**20


def test_derived_sizes() -> None:
    cfg = FwPKMConfig(num_heads=3, num_subkeys=10, top_k=4)
    assert (cfg.num_slots, cfg.slots_per_token) == (100, 12)
    assert 4 * FwPKMConfig().num_slots * FwPKMConfig().value_dim == 16 * 2**20


def test_is_frozen_hashable_and_equal_by_value() -> None:
    cfg, same, other = FwPKMConfig(top_k=4), FwPKMConfig(top_k=4), FwPKMConfig(top_k=5)
    assert cfg == same
    assert hash(cfg) == hash(same)
    assert cfg != other
    for field, value in DEFAULTS.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cfg, field, value)


@pytest.mark.parametrize(("field", "minimum"), MINIMA.items())
def test_integers_meet_their_minimum_and_no_more(field: str, minimum: int) -> None:
    smallest = {"key_dim": 2, "num_subkeys": 8, "chunk_size": 2}.get(field, minimum)  # what the other rules allow
    assert getattr(FwPKMConfig(**{field: smallest}), field) == smallest
    refuse(field, minimum - 1)


REFUSED = {
    "integers below the minimum": (INTEGERS, st.integers(max_value=-1) | st.integers(-(2**70), -(2**60))),
    "no integers": (
        INTEGERS,
        st.floats() | st.booleans() | st.text() | st.none() | st.binary() | st.fractions() | st.lists(st.integers()),
    ),
    "negative numbers": (NUMBERS, st.floats(max_value=-1e-300) | st.integers(max_value=-1)),
    "not finite": (
        NUMBERS,
        st.sampled_from([math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 10**400]),
    ),
    "no numbers": (NUMBERS, st.booleans() | st.text() | st.lists(st.floats()) | st.complex_numbers()),
    "an odd key_dim": (st.just("key_dim"), st.integers(0, 2**40).map(lambda half: 2 * half + 1)),
}


@pytest.mark.parametrize(("fields", "values"), REFUSED.values(), ids=REFUSED)
@given(data=st.data())
def test_what_no_field_takes_is_refused(fields, values, data: st.DataObject) -> None:
    refuse(data.draw(fields), data.draw(values))


@pytest.mark.parametrize("value", [np.True_, np.float32(2), np.array([2]), Decimal(2), 2j], ids=repr)
@pytest.mark.parametrize("field", MINIMA)
def test_what_only_resembles_an_integer_is_refused(field: str, value: object) -> None:
    refuse(field, value)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16])
def test_numpy_integers_are_stored_as_int(kind: type) -> None:
    fields = {"key_dim": 6, "value_dim": 5, "num_heads": 2, "num_subkeys": 9, "top_k": 3, "chunk_size": 7}
    cfg = FwPKMConfig(**{name: kind(value) for name, value in {**fields, "lookahead": 0}.items()})
    assert cfg == FwPKMConfig(**fields, lookahead=0)
    assert all(type(getattr(cfg, name)) is int for name in MINIMA)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("value", [np.True_, b"2", np.complex128(2 + 1j)], ids=repr)
@pytest.mark.parametrize("field", POSITIVE + NON_NEGATIVE)
def test_what_only_resembles_a_number_is_refused(field: str, value: object) -> None:
    refuse(field, value)


@pytest.mark.parametrize("field", [name for name in POSITIVE + NON_NEGATIVE if name != "grad_clip"])
def test_only_grad_clip_may_be_none(field: str) -> None:
    assert FwPKMConfig(grad_clip=None).grad_clip is None
    refuse(field, None)


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.float32(0)], ids=repr)
def test_zero_is_a_number_only_where_it_makes_sense(zero: float) -> None:
    for field in POSITIVE:
        refuse(field, zero)
    for field in NON_NEGATIVE:
        assert getattr(FwPKMConfig(**{field: zero}), field) == 0


@pytest.mark.parametrize("value", [2, np.int64(2), np.float32(2), np.float64(2), Decimal(2), Fraction(2)], ids=repr)
@pytest.mark.parametrize("field", POSITIVE + NON_NEGATIVE)
def test_numbers_are_stored_as_float(field: str, value: object) -> None:
    stored = getattr(FwPKMConfig(**{field: value}), field)
    assert type(stored) is float
    assert stored == 2.0


@given(field=CHOICE_FIELDS, value=st.text() | st.none() | st.booleans() | st.integers() | st.lists(st.text()))
def test_unknown_choices_are_refused(field: str, value: object) -> None:
    if value not in CHOICES[field]:
        refuse(field, value)


@pytest.mark.parametrize(("field", "choice"), [(field, choice) for field in CHOICES for choice in CHOICES[field]])
def test_choices(field: str, choice: str) -> None:
    assert getattr(FwPKMConfig(**{field: choice}), field) == choice
    refuse(field, choice.upper())
    with pytest.raises(ValueError, match=re.escape(", ".join(map(repr, CHOICES[field])))):
        FwPKMConfig(**{field: "x"})


@given(subkeys=st.integers(1, 50), top_k=st.integers(1, 60))
def test_top_k_is_at_most_num_subkeys(subkeys: int, top_k: int) -> None:
    if top_k <= subkeys:
        assert FwPKMConfig(num_subkeys=subkeys, top_k=top_k).top_k == top_k
    else:
        with pytest.raises(ValueError, match=f"top_k must be .*num_subkeys.*top_k={top_k}, num_subkeys={subkeys}"):
            FwPKMConfig(num_subkeys=subkeys, top_k=top_k)


@given(chunk=st.integers(1, 50), lookahead=st.integers(0, 60))
def test_lookahead_is_less_than_chunk_size(chunk: int, lookahead: int) -> None:
    if lookahead < chunk:
        assert FwPKMConfig(chunk_size=chunk, lookahead=lookahead).lookahead == lookahead
    else:
        with pytest.raises(ValueError, match=f"lookahead must be .*lookahead={lookahead}, chunk_size={chunk}"):
            FwPKMConfig(chunk_size=chunk, lookahead=lookahead)


positive = st.floats(min_value=5e-324, max_value=1e308)
configs = st.builds(
    FwPKMConfig,
    key_dim=st.integers(1, 99).map(lambda half: 2 * half),
    value_dim=st.integers(1, 99),
    num_heads=st.integers(1, 9),
    num_subkeys=st.integers(9, 99),
    top_k=st.integers(1, 9),
    chunk_size=st.integers(9, 99),
    lookahead=st.integers(0, 8),
    score_eps=positive,
    temperature=positive,
    grad_clip=st.none() | positive,
    **{name: st.floats(min_value=0, max_value=1e308) for name in NON_NEGATIVE if name != "recent_penalty"},
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
)  # recent_penalty is not drawn: a score of "dot_product" refuses it


@given(cfg=configs)
def test_json_round_trip(cfg: FwPKMConfig) -> None:
    assert FwPKMConfig.from_json(cfg.to_json()) == cfg
    assert list(json.loads(cfg.to_json())) == list(DEFAULTS)


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", '"drop"', "[" * 100_000, '{"top_k": ' + "[" * 100_000])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Received|Expecting"):
        FwPKMConfig.from_json(text)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    assert FwPKMConfig.from_json("\ufeff" + FwPKMConfig(top_k=3).to_json()) == FwPKMConfig(top_k=3)


@pytest.mark.parametrize("field", DEFAULTS)
def test_json_takes_defaults_for_missing_fields_and_refuses_unknown_ones(field: str) -> None:
    assert FwPKMConfig.from_json(json.dumps({field: DEFAULTS[field]})) == FwPKMConfig()
    fewer = {name: value for name, value in DEFAULTS.items() if name != field}
    assert FwPKMConfig.from_json(json.dumps(fewer)) == FwPKMConfig()
    for fields in ({**fewer, field.upper(): DEFAULTS[field]}, {**DEFAULTS, field + "_": 1}):
        with pytest.raises(ValueError, match=f"(?i)with fields among .*Received: .*{field}"):
            FwPKMConfig.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "true", '"1"', "-1"])
def test_json_fields_keep_their_rules(text: str) -> None:
    whole = FwPKMConfig().to_json()
    with pytest.raises(ValueError, match="temperature must be"):
        FwPKMConfig.from_json(whole.replace('"temperature": 1.0', f'"temperature": {text}'))
