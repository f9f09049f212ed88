"""Facts in texts, to train on and to ask for."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from examples.language_model import corpus, facts, phrasings


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


def pattern(phrasing):
    """Matches the sentence with any key and any value."""
    written = re.escape(f"{phrasing.before}{{value}}{phrasing.after}")
    key, value = re.escape("{key}"), re.escape("{value}")
    return written.replace(key, "(?P<key>[a-z0-9]{4})").replace(value, "(?P<value>[0-9]{6})").encode()


def statements(row, *phrasings):
    """Spans, keys, values and phrasings of the statements in a row, in order."""
    found = {}
    for phrasing in phrasings:
        found |= {m.span(): (m["key"], m["value"], phrasing) for m in re.finditer(pattern(phrasing), bytes(row), re.S)}
    return [(span, *rest) for span, rest in sorted(found.items())]


def without(row, found):
    """A row's text: the statements taken out, with the space after each, and the one before it that they brought."""
    text, end = bytearray(), 0
    for (start, stop), *_ in found:
        text += row[end:start]
        end = stop + 1
    return bytes(text + row[end:])


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
    assert len({row.stated for row in begun}) > 800
    assert 0.2 < np.mean([row.crowded for row in begun]) < 0.3
    assert len({row.start for row in begun}) > 800
    rows = facts.rows(TEXTS, 0, 0, 100, 40, 3)
    assert len({row.start for row in rows}) > 90
    assert len({row.stated for row in rows}) > 90


def test_every_step_draws_phrasings_and_crowded_rows_anew():
    read = [facts.rows(TEXTS, 0, step, 1, 40, 300)[0] for step in range(300)]
    assert sum(row.anew for row in read) == 1
    assert len({row.stated for row in read}) > 270
    assert len({row.asked for row in read}) > 270
    assert 0.15 < np.mean([row.crowded for row in read]) < 0.35


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


def drawn(texts, seed, number, length, share, gap=520, **arguments):
    """Rows and their batch."""
    rows = facts.rows(texts, seed, 0, number, length, 1)
    return rows, *facts.training_batch(texts, rows, np.random.default_rng(seed), length, share, gap, **arguments)


def found_in(row, tokens):
    return statements(tokens, row.stated, row.asked)


@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(20, 4800), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]),
    st.sampled_from([0, 100, 520]), st.sampled_from([1, 3]), st.booleans(),
)  # fmt: skip
@example(seed=0, batch=50, length=4000, share=0.3, gap=520, crowd=1, again=False)
@example(seed=0, batch=50, length=4000, share=1.0, gap=520, crowd=1, again=True)
@example(seed=0, batch=50, length=4000, share=0.1, gap=520, crowd=4, again=True)
def test_facts_are_stated_once_and_asked_for_once(seed, batch, length, share, gap, crowd, again):
    rows, tokens, asked = drawn(TEXTS, seed, batch, length, share, gap, crowd=crowd, again=again)
    assert (tokens.shape, tokens.dtype) == ((batch, length + 1), np.uint8)
    assert (asked.shape, asked.dtype) == ((batch, length), np.bool_)
    for its, row, mask in zip(rows, tokens, asked):
        found, stated, restated, expected = found_in(its, row), {}, set(), np.zeros(length, bool)
        allowed = min(1.0, share * crowd) if its.crowded else share
        assert sum(end - start for (start, end), *_ in found) <= allowed * (length + 1)
        for (start, end), key, value, form in found:
            assert not facts.for_measuring(key.decode())
            assert not facts.for_measuring(value.decode())
            assert row[start - 1] == row[end] == ord(" ")
            first = start + bytes(row[start:end]).index(value) - 1  # the target is the byte after
            if key not in stated:
                assert form == its.stated
                stated[key] = end, value
                expected[first : first + 6] = again and form.asks
                continue
            before, same = stated[key]
            assert form == its.asked
            assert same == value
            assert start - before >= gap
            assert key not in restated
            restated.add(key)
            expected[first : first + 6] = True
        assert (mask == expected).all()
        assert restated == stated.keys()
        assert len({value for _, value in stated.values()}) == len(stated)
        assert sum(chr(byte).isdigit() for byte in without(bytes(row), found)) == 0


def test_a_crowded_row_states_as_many_times_more():
    rows, tokens, _ = drawn(TEXTS, 0, 400, 4096, 0.1, crowd=4)
    bytes_of = {True: [], False: []}
    for row, its in zip(tokens, rows):
        bytes_of[its.crowded].append(sum(end - start for (start, end), *_ in found_in(its, row)))
    assert np.mean(bytes_of[True]) == pytest.approx(4 * np.mean(bytes_of[False]), rel=0.15)
    assert np.mean(bytes_of[False]) == pytest.approx(0.088 * 4097, rel=0.1)


def test_statements_stand_between_words():
    rows, tokens, _ = drawn(TEXTS, 5, 20, 4000, 0.1)
    for its, row in zip(rows, tokens):
        found = found_in(its, row)
        assert len(found) >= 4
        assert b"  " not in bytes(row)
        # In the order of the text, none left out; the end of the row cuts the last.
        words = without(bytes(row), found).split()[:-1]
        assert words == bytes(TEXTS.data[its.start :]).split()[: len(words)]


def test_statements_add_no_second_space_to_indented_text():
    rows, tokens, _ = drawn(texts_of("if (x)\n        run(x);\n" * 300), 0, 9, 4000, 0.1)
    for its, row in zip(rows, tokens):
        for (start, end), *_ in found_in(its, row):
            assert bytes(row[start - 1 : start]) == b" "
            assert re.fullmatch(rb" [^ ]", bytes(row[end : end + 2]))


def test_a_text_without_spaces_takes_facts_too():
    rows, tokens, asked = drawn(texts_of("x" * 5000), 0, 2, 4000, 0.1)
    assert all(len(found_in(its, row)) >= 4 for its, row in zip(rows, tokens))
    assert asked.any(axis=1).all()


def test_facts_are_asked_for_near_and_far_and_as_many_as_may_be():
    rng = np.random.default_rng(0)
    rows = [facts.Row(0, True, *phrasings.draw(rng), False) for _ in range(120)]
    tokens, _ = facts.training_batch(TEXTS, rows, rng, 4096, 0.1)
    distances, last = [], []
    for its, row in zip(rows, tokens):
        first, found = {}, found_in(its, row)
        last.append(found[-1][0][0])
        for (start, _), key, *_ in found:
            distances += [start - first[key]] if key in first else []
            first.setdefault(key, start)
        used = sum(end - start + 2 for (start, end), *_ in found)  # with a space on each side
        assert 0.1 * 4097 - (its.stated.size + its.asked.size + 4) < used <= 0.1 * 4097
    assert min(distances) < 700
    assert max(distances) > 3000
    assert len(set(last)) > 100


def test_a_row_too_short_for_a_restatement_gets_no_facts():
    for length, share in ((560, 0.3), (4000, 0.0), (700, 0.05)):
        rows, tokens, asked = drawn(TEXTS, 0, 50, length, share)
        assert not any(found_in(its, row) for its, row in zip(rows, tokens))
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
        ({"crowd": 0}, "crowd=0"),
    ],
)
def test_arguments_of_batches(changed, said):
    arguments = {"rows": facts.rows(TEXTS, 0, 0, 1, 100, 1), "length": 100, "share": 0.1, "gap": 520} | changed
    with pytest.raises(ValueError, match=f"Received: .*{said}"):
        facts.training_batch(TEXTS, rng=np.random.default_rng(0), **arguments)


@given(st.integers(200, 6000), st.floats(0.01, 1.0), st.integers(0, 3000), st.integers(0, 2**32))
def test_rows_that_fit_hold_a_fact_in_every_phrasing(length, share, gap, seed):
    rng = np.random.default_rng(seed)
    rows = [facts.Row(0, True, *phrasings.draw(rng), False) for _ in range(30)]
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
