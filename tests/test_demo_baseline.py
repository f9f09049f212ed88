"""The demo's baseline: a dictionary of the last eight tokens, and what the memory finds beside it."""

import numpy as np
import pytest

import fwpkm
from fwpkm.demo import dictionary, recall, report, text

HALF = recall.Asked(0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def small() -> text.Text:
    whole = text.load([])
    return text.tokenize("the beginning", " ".join(whole.vocabulary[i] for i in whole.ids[:420]))


def test_dictionary_has_what_followed_the_last_eight_tokens():
    read = text.tokenize("", "a b c d e f g h a b c d e f g h")
    ids, next_ids, known = read.ids, read.next_ids, dictionary.Dictionary(len(read.vocabulary))
    first = known.read(ids, next_ids)
    assert first.tolist() == [-1] * 15 + [0]  # the last eight stood there once before, and a followed
    assert known.ask(ids).tolist() == [*next_ids[:7], 8, *next_ids[8:]]  # after "h" the text ended, the last time
    second = known.read(ids, next_ids)
    assert second[:7].tolist() == next_ids[:7].tolist()
    assert (second[7], second[15]) == (8, 0)  # each tells what followed the last time


def test_dictionary_falls_back_on_fewer_tokens_and_notes_nothing_when_asked():
    read = text.tokenize("", "a b c d e f g h i j k l")
    known = dictionary.Dictionary(len(read.vocabulary))
    known.read(read.ids, read.next_ids)
    other = read.ids.copy()
    other[3] = 0  # "d" reads "a"
    for _ in range(2):
        assert known.ask(other).tolist() == [1, 2, 3, *[-1] * 8, 12]
        assert known.ask(other, fall_back=True).tolist() == [1, 2, 3, 1, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(("length", "count"), [(2, 1), (39, 1), (40, 2), (1000, 50)])
def test_one_token_in_twenty_is_replaced_by_another(length, count):
    ids = np.arange(length) % 7
    replaced = dictionary.replace_some(ids, 7, 0)
    assert (replaced != ids).sum() == count
    assert ((replaced >= 0) & (replaced < 7)).all()
    assert ids.tolist() == [t % 7 for t in range(length)]


@pytest.mark.eager
def test_asking_once_more_writes_nothing(be, small):
    trial, told = recall.Trial(be, recall.config(64, 50), small), []
    for _ in range(2):
        trial.read(lambda tokens: None)
    plain, other, again = (trial.ask(told.append, replaced=replaced) for replaced in (False, True, True))
    assert other == again
    assert sum(told) == 3 * len(small.ids)
    assert plain.memory > 0.95
    assert plain.dictionary == plain.falling_back > 0.99
    whole = 0.95**8
    assert abs(other.dictionary - whole) < 0.1  # which knows contexts that are whole, and no other
    assert other.falling_back > other.dictionary
    assert other.memory < plain.memory


def test_conclusion_names_the_baseline_where_it_wins_too(small):
    rounds = [recall.Trial(fwpkm.reference, recall.config(16, 50), small).read(lambda tokens: None)]
    plain, other = recall.Asked(0.98, 0.99, 0.99), recall.Asked(0.81, 0.66, 0.88)
    said = " ".join(report.beside_the_dictionary(rounds, plain, other).split())
    assert "gives 98.00%, less than the dictionary's 99.00%" in said
    assert "gives 81.00%, more than the dictionary's 66.00%" in said
    assert "less than the 88.00% of one that falls back" in said
    assert "gives 50.00%, as much as the dictionary's 50.00%" in report.beside_the_dictionary(
        rounds, HALF, HALF
    ).replace("\n", " ")
