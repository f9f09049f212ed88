"""Facts in texts, to train on and to ask for."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from examples.language_model import corpus, facts


def texts_of(*documents):
    """Texts without files."""
    data = np.frombuffer("".join(documents).encode(), np.uint8)
    starts = np.cumsum([0, *(len(document.encode()) for document in documents)])
    return corpus.Texts(data, starts, tuple(map(str, range(len(documents)))))


def prose(seed, size):
    """Words of letters, with spaces and newlines between them and no digits."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(97, 123, size=size)
    ends = np.cumsum(rng.integers(2, 12, size=size))
    letters[ends[ends < size]] = rng.choice([32, 32, 32, 10], size=(ends < size).sum())
    return bytes(letters.astype(np.uint8).tolist()).decode()


TEXTS = texts_of(prose(1, 9000), prose(2, 200), prose(3, 5000))
PHRASINGS = facts.SEEN + facts.UNSEEN


def parted(phrasing):
    """What stands before the key, and what between key and value."""
    opening, _, rest = phrasing.partition("{key}")
    return opening, rest.removesuffix("{value}.")


def any_of(texts):
    return "|".join(map(re.escape, sorted(set(texts))))


STATEMENT = re.compile(
    "({})([a-z0-9]{{4}})({})([0-9]{{6}})\\.".format(*map(any_of, zip(*map(parted, PHRASINGS)))).encode()
)


def statements(row):
    """Spans, keys, values and phrasings of the statements in a row, in order."""
    return [(m.span(), m[2], m[4], f"{m[1].decode()}{{key}}{m[3].decode()}{{value}}.") for m in STATEMENT.finditer(row)]


def without(row, found):
    """A row's text: the statements taken out, with the space after each, and the one before it that they brought."""
    text, end = bytearray(), 0
    for (start, stop), *_ in found:
        text += row[end:start]
        end = stop + 1
    return bytes(text + row[end:])


def test_phrasings_are_sentences_that_end_with_the_value():
    assert facts.SEEN[0] == "The secret number for ID-{key} is {value}."
    for phrasing in PHRASINGS:
        assert phrasing.isascii()
        assert phrasing.count("{key}") == phrasing.count("{value}") == 1
        assert phrasing.endswith("{value}.")


def test_training_shows_each_opening_with_each_link_and_nothing_else():
    seen = list(map(parted, facts.SEEN))
    openings, links = map(set, zip(*seen))
    assert len(seen) == len(set(seen)) == len(openings) * len(links) == 120
    assert (openings, links) == (set(facts.OPENINGS), set(facts.LINKS))
    known = [(opening in openings, link in links) for opening, link in map(parted, facts.UNSEEN)]
    assert known == [(False, False)] * 3 + [(True, False), (False, True)]
    for one, other in itertools.permutations({opening for opening, _ in map(parted, PHRASINGS)}, 2):
        assert not one.endswith(other)  # else a statement could be read in two ways


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_training_and_measuring_share_no_key_and_no_value(seed, number):
    drawn = {side: facts.draw(np.random.default_rng(seed), number, side) for side in (False, True)}
    for measuring, found in drawn.items():
        for words, form in zip(zip(*found), ("[a-z0-9]{4}", "[0-9]{6}")):
            assert len(set(words)) == number
            assert all(re.fullmatch(form, word) for word in words)
            assert {facts.for_measuring(word) for word in words} == {measuring}
    assert drawn[True] == facts.draw(np.random.default_rng(seed), number, True)


def test_an_eighth_of_the_values_is_for_measuring():
    share = np.mean([facts.for_measuring(f"{n:06}") for n in range(10**6)])
    assert 0.12 < share < 0.13
    with pytest.raises(ValueError, match=r"between 0 and 100,000. Received: 100001"):
        facts.draw(np.random.default_rng(0), 100_001, True)


# Rows


def document_of(texts, row):
    """Where the document of a row begins and ends."""
    number = np.searchsorted(texts.starts, row.start, side="right")
    return texts.starts[number - 1], texts.starts[number]


LENGTHS = st.integers(20, 8999) | st.sampled_from([1000, 2500, 5000])  # that a document is a multiple of
SPANS = st.integers(1, 7)


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 5), LENGTHS, SPANS)
def test_rows_follow_from_seed_and_step(seed, step, batch, length, span):
    found = facts.rows(TEXTS, seed, step, batch, length, span)
    facts.rows(TEXTS, seed, step + 1, batch, length, span)
    assert facts.rows(TEXTS, seed, step, batch, length, span) == found
    assert len(found) == batch
    others = [facts.rows(TEXTS, other, step, 5, 20, span) for other in (seed, seed + 1)]
    assert others[0] != others[1]


@given(st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 5), LENGTHS, SPANS)
def test_a_row_reads_on_until_it_begins_anew(seed, first, batch, length, span):
    steps = [facts.rows(TEXTS, seed, step, batch, length, span) for step in range(first, first + 3 * span)]
    for row in zip(*steps):
        for before, now in itertools.pairwise(row):
            begin, end = document_of(TEXTS, now)
            assert now.start + length + 1 <= end
            if now.anew:
                continue
            assert now.phrasing == before.phrasing
            assert document_of(TEXTS, before) == (begin, end)
            if now.start != before.start + length:  # from the beginning again
                assert before.start + 2 * length + 1 > end
                assert now.start - begin < length
        begins = [i for i, now in enumerate(row) if now.anew]
        assert np.diff(begins).tolist() == [span] * (len(begins) - 1)
        assert len(begins) == 3
        read = [now.start for now in row[begins[0] : begins[1]]]
        begin, end = document_of(TEXTS, row[begins[0]])
        assert len(set(read)) == min(span, (end - begin - 1) // length)  # all that a short document has
        assert min(read) == read[0]


@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 20), st.integers(1, 12))
def test_rows_begin_anew_in_turn(first, steps, batch, span):
    begun = [row.anew for step in range(first, first + steps) for row in facts.rows(TEXTS, 0, step, batch, 20, span)]
    assert abs(sum(begun) - steps * batch / span) < 1


def test_a_row_that_begins_anew_has_another_place_and_phrasing():
    begun = [row for step in range(900) for row in facts.rows(TEXTS, 0, step, 3, 40, 3) if row.anew]
    assert len(begun) == 900
    assert {row.phrasing for row in begun} == set(facts.SEEN)
    assert len({row.start for row in begun}) > 800
    rows = facts.rows(TEXTS, 0, 0, 100, 40, 3)
    assert len({row.start for row in rows}) > 90
    assert len({row.phrasing for row in rows}) > 50


def test_documents_come_by_length_and_every_window_of_theirs():
    texts = texts_of("a" * 3000, "b" * 99, "c" * 1000)
    for span in (1, 4):
        rows = facts.rows(texts, 0, 0, 2000, 99, span)
        drawn, counts = np.unique(texts.data[[row.start for row in rows]], return_counts=True)
        assert bytes(drawn) == b"ac"
        assert 0.7 < counts[0] / 2000 < 0.8
    assert {row.start for row in facts.rows(texts, 0, 0, 3, 2999, 1)} == {0}
    assert {row.start for row in facts.rows(texts_of("a" * 9, "b" * 4), 0, 0, 100, 4, 1)} == set(range(5))


def test_no_document_is_long_enough():
    with pytest.raises(ValueError, match=r"window of 9,001 bytes: of 3 documents the longest has 9,000\."):
        facts.rows(TEXTS, 0, 0, 1, 9000, 1)


# Batches


def drawn(texts, seed, number, length, share, gap=520):
    """Rows and their batch."""
    rows = facts.rows(texts, seed, 0, number, length, 1)
    return rows, *facts.training_batch(texts, rows, np.random.default_rng(seed), length, share, gap)


@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(20, 4800), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]),
    st.sampled_from([0, 100, 520]),
)  # fmt: skip
@example(seed=0, batch=50, length=4000, share=0.3, gap=520)
@example(seed=0, batch=50, length=4000, share=1.0, gap=520)
def test_facts_are_each_stated_twice_in_the_phrasing_of_the_row(seed, batch, length, share, gap):
    rows, tokens, asked = drawn(TEXTS, seed, batch, length, share, gap)
    assert (tokens.shape, tokens.dtype) == ((batch, length + 1), np.uint8)
    assert (asked.shape, asked.dtype) == ((batch, length), np.bool_)
    for (_, _, phrasing), row, mask in zip(rows, tokens, asked):
        found, stated, restated, expected = statements(row), {}, set(), np.zeros(length, bool)
        assert sum(end - start for (start, end), *_ in found) <= share * (length + 1)
        for (start, end), key, value, form in found:
            assert form == phrasing
            assert not facts.for_measuring(key.decode())
            assert not facts.for_measuring(value.decode())
            assert row[start - 1] == row[end] == ord(" ")
            if key not in stated:
                stated[key] = end, value
                continue
            before, same = stated[key]
            assert same == value
            assert start - before >= gap
            assert key not in restated
            restated.add(key)
            expected[end - 8 : end - 2] = True  # the targets are one further: the digits
        assert (mask == expected).all()
        assert restated == stated.keys()
        assert len({value for _, value in stated.values()}) == len(stated)
        assert sum(chr(byte).isdigit() for byte in without(bytes(row), found)) == 0


def test_statements_stand_between_words():
    rows, tokens, _ = drawn(TEXTS, 5, 20, 4000, 0.1)
    for (start, *_), row in zip(rows, tokens):
        found = statements(row)
        assert len(found) >= 6
        assert b"  " not in bytes(row)
        # In the order of the text, none left out; the end of the row cuts the last.
        words = without(bytes(row), found).split()[:-1]
        assert words == bytes(TEXTS.data[start:]).split()[: len(words)]


def test_statements_add_no_second_space_to_indented_text():
    _, tokens, _ = drawn(texts_of("if (x)\n        run(x);\n" * 300), 0, 9, 4000, 0.1)
    for row in tokens:
        for (start, end), *_ in statements(row):
            assert bytes(row[start - 1 : start]) == b" "
            assert re.fullmatch(rb" [^ ]", bytes(row[end : end + 2]))


def test_a_text_without_spaces_takes_facts_too():
    _, tokens, asked = drawn(texts_of("x" * 5000), 0, 2, 4000, 0.1)
    assert all(len(statements(row)) >= 6 for row in tokens)
    assert asked.any(axis=1).all()


def test_facts_are_restated_near_and_far_and_as_many_as_may_be():
    rows, rng = [facts.Row(0, True, phrasing) for phrasing in facts.SEEN], np.random.default_rng(0)
    tokens, _ = facts.training_batch(TEXTS, rows, rng, 4096, 0.1)
    distances, last = [], []
    for row in tokens:
        first, found = {}, statements(row)
        last.append(found[-1][0][0])
        for (start, _), key, *_ in found:
            distances += [start - first[key]] if key in first else []
            first.setdefault(key, start)
        used = [end - start + 2 for (start, end), *_ in found]  # with a space on each side
        assert 0.1 * 4097 - 2 * used[0] < sum(used) <= 0.1 * 4097
    assert min(distances) < 700
    assert max(distances) > 3000
    assert len(set(last)) > 100


def test_a_row_too_short_for_a_restatement_gets_no_facts():
    for length, share in ((560, 0.3), (4000, 0.0), (700, 0.05)):
        rows, tokens, asked = drawn(TEXTS, 0, 50, length, share)
        assert not any(statements(row) for row in tokens)
        assert not asked.any()
        assert all((row == TEXTS.data[start : start + length + 1]).all() for (start, *_), row in zip(rows, tokens))


def test_batches_repeat_with_the_seed_alone():
    rows = facts.rows(TEXTS, 0, 0, 2, 2000, 1)
    first, second, other = (facts.training_batch(TEXTS, rows, np.random.default_rng(s), 2000, 0.1) for s in (1, 1, 2))
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": []}, "0 rows"),
        ({"length": 0}, "length=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": np.nan}, "share=nan"),
        ({"gap": -1}, "gap=-1"),
    ],
)
def test_arguments_of_batches(changed, said):
    arguments = {"rows": [facts.Row(0, True, facts.SEEN[0])], "length": 100, "share": 0.1, "gap": 520} | changed
    with pytest.raises(ValueError, match=f"Received: .*{said}"):
        facts.training_batch(TEXTS, rng=np.random.default_rng(0), **arguments)


@given(st.integers(200, 6000), st.floats(0.01, 1.0), st.integers(0, 3000), st.integers(0, 2**32))
def test_rows_that_fit_hold_a_fact_in_every_phrasing(length, share, gap, seed):
    rows = [facts.Row(0, True, phrasing) for phrasing in facts.SEEN]
    rng = np.random.default_rng(seed)
    try:
        facts.check_fit(length, share, gap)
    except ValueError as error:
        least = int(re.search(r"at least ([\d,]+) ", str(error))[1].replace(",", ""))
        assert least > length
        facts.check_fit(length := least, share, gap)
    _, asked = facts.training_batch(texts_of("x " * 200_000), rows, rng, length, share, gap)
    assert asked.any(1).all()


def test_a_share_of_zero_fits_anywhere():
    facts.check_fit(1, 0.0, 520)


# Haystacks


@given(
    st.integers(0, 2**32), st.integers(1, 6), st.integers(1300, 4800), st.sampled_from(PHRASINGS),
    st.integers(1, 6), st.sampled_from([0, 60, 600]),
)  # fmt: skip
def test_haystacks(seed, number, length, phrasing, needles, clear):
    hay = facts.haystacks(TEXTS, np.random.default_rng(seed), number, length, phrasing, needles, clear)
    assert (hay.tokens.shape, hay.tokens.dtype) == ((number, length), np.uint8)
    assert hay.question.shape == (number, phrasing.index("{value}"))  # a space more, a key for {key}
    assert (hay.answer.shape, hay.depth.shape, hay.place.shape) == ((number, 6), (number,), (number,))
    assert hay.question.dtype == hay.answer.dtype == np.uint8
    assert ((hay.depth >= 0) & (hay.depth <= 1)).all()
    for row, question, answer, place in zip(hay.tokens, hay.question, hay.answer, hay.place):
        found = statements(row)
        assert len(found) == len({f[1] for f in found}) == len({f[2] for f in found}) == needles
        assert all(facts.for_measuring(word.decode()) for f in found for word in f[1:3])
        assert all(row[start - 1] == row[end] == ord(" ") for (start, end), *_ in found)
        assert all(start < length - clear for (start, _), *_ in found)
        stated = bytes(question) + bytes(answer) + b"."
        assert bytes(row[place - 1 : place - 1 + len(stated)]) == stated
        assert bytes(question).startswith(b" ")


def test_depths_are_even_and_needles_everywhere():
    number, length, clear = 50, 4000, 600
    hay = facts.haystacks(TEXTS, np.random.default_rng(0), number, length, facts.SEEN[0], clear=clear)
    late = np.sort(hay.depth) * number - np.arange(number)
    assert (late >= -0.6).all()  # places end 34 bytes, which is half a stratum, before the last depth
    assert (late <= 1.6).all()
    assert not (np.diff(hay.depth) > 0).all()
    np.testing.assert_allclose(hay.depth, hay.place / (length - clear - 1))
    starts = [start for row in hay.tokens for (start, _), *_ in statements(row)]
    assert np.histogram(starts, 4, (0, length - clear))[0].min() > 0.15 * len(starts)
    order = {
        [key for _, key, _, _ in statements(row)].index(bytes(q[-8:-4])) for row, q in zip(hay.tokens, hay.question)
    }
    assert order == set(range(5))


def test_haystacks_repeat_with_the_seed_alone():
    first, second, other = (
        facts.haystacks(TEXTS, np.random.default_rng(s), 3, 3000, facts.UNSEEN[0]) for s in (1, 1, 2)
    )
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first.tokens, other.tokens)


def test_the_shortest_haystack_holds_all_needles():
    with pytest.raises(ValueError, match=r"length must be at least ([\d,]+) for 5 statements") as error:
        facts.haystacks(TEXTS, np.random.default_rng(0), 1, 700, facts.SEEN[0])
    least = int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))
    far_between = texts_of(("x" * (facts.NEARBY - 1) + " ") * 100)
    hay = facts.haystacks(far_between, np.random.default_rng(0), 300, least, facts.SEEN[0])
    assert all(len(statements(row)) == 5 for row in hay.tokens)
    assert 0 < least - 600 - max(statements(row)[-1][0][0] for row in hay.tokens) <= facts.NEARBY


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"number": 0}, "number=0"),
        ({"needles": 0}, "needles=0"),
        ({"clear": -1}, "clear=-1"),
        ({"length": 9001}, "No document is long enough"),
        ({"phrasing": "{value} is the number of {key}."}, "phrasing must be"),
        ({"phrasing": "The number of {key} is {value}"}, "phrasing must be"),
        ({"phrasing": "The number is {value}."}, "phrasing must be"),
        ({"phrasing": "Née {key} is {value}."}, "phrasing must be"),
    ],
)
def test_arguments_of_haystacks(changed, said):
    arguments = {"number": 2, "length": 3000, "phrasing": facts.SEEN[0]} | changed
    with pytest.raises(ValueError, match=re.escape(said)):
        facts.haystacks(TEXTS, np.random.default_rng(0), **arguments)
