"""Contexts with facts in them, and what is asked of them."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_language_model_facts import TEXTS, statements, texts_of

from examples.language_model import facts, phrasings
from examples.language_model.haystacks import haystacks
from examples.language_model.needle import KINDS


def kept(phrase, pairs):
    """``phrase``, noting what it drew."""

    def draw(rng):
        pairs.append(phrase(rng))
        return pairs[-1]

    return draw


@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1500, 4800), st.sampled_from(sorted(KINDS)),
    st.integers(1, 6), st.sampled_from([0, 60, 600]), st.sampled_from([4, 32]),
)  # fmt: skip
def test_haystacks(seed, number, length, kind, needles, clear, nearby):
    pairs = []
    rng = np.random.default_rng(seed)
    phrase = kept(KINDS[kind], pairs)
    hay = haystacks(TEXTS, rng, number, length, phrase, facts=needles, clear=clear, nearby=nearby)
    assert (hay.tokens.shape, hay.tokens.dtype) == ((number, length), np.uint8)
    assert hay.asked.shape[:2] == hay.value.shape == hay.depth.shape == hay.begin.shape == (number, needles)
    assert ((hay.depth >= 0) & (hay.depth <= 1)).all()
    for row, asked, value, begins, (stated, question) in zip(hay.tokens, hay.asked, hay.value, hay.begin, pairs):
        found = statements(row, stated)
        assert [span[0] for span, *_ in found] == begins.tolist()
        assert len({f[1] for f in found}) == len({f[2] for f in found}) == needles
        assert all(start < length - clear and row[start - 1] == row[end] == ord(" ") for (start, end), *_ in found)
        for (_, key, its, _), line, at in zip(found, asked, value):
            assert facts.for_measuring(key.decode())
            assert facts.for_measuring(its.decode())
            expected = b" " + question.question(key.decode()) + its
            assert bytes(line) == expected.ljust(len(line), bytes(1))
            assert at == len(expected) - 6


def test_facts_stand_everywhere_and_depths_follow():
    length, clear = 4000, 600
    hay = haystacks(TEXTS, np.random.default_rng(0), 60, length, phrasings.near, clear=clear)
    assert (np.diff(hay.begin, axis=1) > 0).all()
    np.testing.assert_allclose(hay.depth, hay.begin / (length - clear - 1))
    assert np.histogram(hay.depth, 4, (0, 1))[0].min() > 0.15 * hay.depth.size


def test_haystacks_repeat_with_the_seed_alone():
    first, second, other = (haystacks(TEXTS, np.random.default_rng(s), 3, 3000, phrasings.near) for s in (1, 1, 2))
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first.tokens, other.tokens)
    assert all(map(np.array_equal, first.part(np.array([2, 0])), (x[[2, 0]] for x in first)))


def test_the_shortest_haystack_holds_all_facts():
    def phrase(rng):
        return (phrasings.Phrasing("By order, box {key} is ", "."),) * 2

    with pytest.raises(ValueError, match=r"length must be at least ([\d,]+) for 5 statements of 29 bytes") as error:
        haystacks(TEXTS, np.random.default_rng(0), 1, 700, phrase)
    least = int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))
    far_between = texts_of(("x" * (facts.NEARBY - 1) + " ") * 100)
    hay = haystacks(far_between, np.random.default_rng(0), 300, least, phrase)
    assert all(len(statements(row, phrase(None)[0])) == 5 for row in hay.tokens)
    assert 0 < least - 600 - hay.begin.max() <= facts.NEARBY
    with pytest.raises(ValueError, match="length must be at least"):
        haystacks(far_between, np.random.default_rng(0), 1, least - 1, phrase)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"number": 0}, "number=0"),
        ({"facts": 0}, "facts=0"),
        ({"clear": -1}, "clear=-1"),
        ({"nearby": -1}, "nearby=-1"),
        ({"length": 9001}, "No document is long enough"),
    ],
)
def test_arguments_of_haystacks(changed, said):
    arguments = {"number": 2, "length": 3000, "phrase": phrasings.near} | changed
    with pytest.raises(ValueError, match=re.escape(said)):
        haystacks(TEXTS, np.random.default_rng(0), **arguments)
