"""The grammar of sentences: what training shows, what it never shows, and where key and value stand."""

import re
from itertools import product

import numpy as np
import pytest

from examples.language_model import phrasings
from examples.language_model.phrasings import FAR, HELD_OUT, NEAR

KEY, VALUE = "wgql", "148759"
DRAWN = 4000


def drawn(make, number=400, seed=0, **arguments):
    rng = np.random.default_rng(seed)
    return [make(rng, **arguments) for _ in range(number)]


def between(phrasing):
    """The bytes between key and value, whichever comes first."""
    return re.search(rf"{KEY}(.*){VALUE}|{VALUE}(.*){KEY}", phrasing.sentence(KEY, VALUE).decode(), re.S)


def held_words(text):
    """Which held-out openings, nouns and links stand in a sentence."""
    openings = [o for o in phrasings.HELD_OPENINGS if o in text]
    nouns = [n for n in phrasings.HELD_NOUNS if re.search(rf"(^| ){re.escape(n)}['\"(<]?{KEY}", text, re.I)]
    links = [x for x in phrasings.HELD_LINKS if re.search(rf"{KEY}['\")>]?{re.escape(x)}['\"(<]?{VALUE}", text)]
    return openings, nouns, links


def pair_of(text):
    """The opening and the link of a sentence, where both are of training."""
    opening = max((o for o in phrasings.OPENINGS if text.startswith(o)), key=len, default=None)
    link = next((x for x in phrasings.LINKS if re.search(rf"{KEY}['\")>]?{re.escape(x)}['\"(<]?{VALUE}", text)), None)
    return opening, link


def test_the_grammar_is_large_and_its_words_are_apart():
    assert phrasings.number_of_sentences() > 10**6
    for seen, held in (("OPENINGS", "HELD_OPENINGS"), ("NOUNS", "HELD_NOUNS"), ("LINKS", "HELD_LINKS")):
        seen, held = getattr(phrasings, seen), getattr(phrasings, held)
        assert len(set(seen)) == len(seen)
        assert len(held) >= 10
        assert not set(seen) & set(held)
        assert all(word.isascii() for word in (*seen, *held))
    assert max(map(len, (*phrasings.LINKS, *phrasings.HELD_LINKS))) <= NEAR
    pairs = [phrasings.pair_held_out(*pair) for pair in product(phrasings.OPENINGS, phrasings.LINKS)]
    assert 0.08 < np.mean(pairs) < 0.17


def test_the_number_of_sentences_is_that_of_different_ones(monkeypatch):
    for name, words in (("OPENINGS", ("By ", "In ")), ("NOUNS", ("box ",)), ("LINKS", (": ", " counts ", " costs "))):
        monkeypatch.setattr(phrasings, name, words)
    rng = np.random.default_rng(0)
    found = {phrasings.near(rng)[0] for _ in range(40_000)}
    assert len(found) == phrasings.number_of_sentences()


def test_training_never_shows_what_is_held_out():
    kinds = {"near": 0, "far": 0, "value first": 0, "short": 0}
    for stated, asked in drawn(phrasings.draw, DRAWN):
        for phrasing in {stated, asked}:
            text = phrasing.sentence(KEY, VALUE).decode()
            assert held_words(text) == ([], [], []), text
            opening, link = pair_of(text)
            assert opening is None or link is None or not phrasings.pair_held_out(opening, link), text
            assert len(text) == phrasing.size <= phrasings.longest()
        assert asked.asks
        space = between(stated)[1] if stated.asks else None
        kind = "value first" if space is None else "far" if len(space) > NEAR else "near"
        kinds[kind] += 1
        kinds["short"] += kind == "near" and stated.before.startswith(tuple(_capital(n) for n in phrasings.NOUNS))
    shares = {kind: count / DRAWN for kind, count in kinds.items()}
    assert shares == pytest.approx({"near": 0.75, "far": 0.15, "value first": 0.1, "short": 0.1}, abs=0.03)


def _capital(text):
    return text[0].upper() + text[1:]


def test_half_of_the_questions_of_training_are_in_other_words():
    pairs = [(s, a) for s, a in drawn(phrasings.draw, DRAWN) if s.asks]
    assert 0.45 < np.mean([s != a for s, a in pairs]) < 0.55


def test_a_quarter_of_the_sentences_has_invented_words():
    known = tuple(_capital(word) for word in (*phrasings.OPENINGS, *phrasings.NOUNS))
    unknown = [not s.before.startswith(known) for s, _ in drawn(phrasings.draw, DRAWN)]
    assert 0.1 < np.mean(unknown) < 0.15  # an invented beginning in half of a quarter


@pytest.mark.parametrize("make", ["invented_opening", "invented_noun", "invented_link"])
def test_invented_words_are_many_and_none_is_held_out(make, monkeypatch):
    made = drawn(getattr(phrasings, make), 2000)
    assert len(set(made)) > (400 if make == "invented_link" else 1500)
    assert all(word.isascii() for word in made)
    if make == "invented_link":
        assert max(map(len, made)) <= NEAR
    held = {"invented_opening": "HELD_OPENINGS", "invented_noun": "HELD_NOUNS", "invented_link": "HELD_LINKS"}[make]
    monkeypatch.setattr(phrasings, held, (made[0],))
    assert made[0] not in drawn(getattr(phrasings, make), 2000)


@pytest.mark.parametrize("new", HELD_OUT)
def test_a_held_out_sentence_is_new_by_what_it_says_alone(new):
    for stated, asked in drawn(phrasings.near, new=new):
        text = stated.sentence(KEY, VALUE).decode()
        openings, nouns, links = map(bool, held_words(text))
        everything = new == "all new"
        assert (openings, nouns, links) == (
            everything or new == "opening", everything or new == "noun", everything or new == "link",
        ), text  # fmt: skip
        if new == "pair":
            assert phrasings.pair_held_out(*pair_of(text)), text
        assert asked == stated
        assert len(between(stated)[1]) <= NEAR


def test_near_far_and_value_first_are_as_they_are_called():
    for stated, asked in drawn(phrasings.near):
        assert len(between(stated)[1]) <= NEAR
        assert stated == asked
        text = stated.sentence(KEY, VALUE).decode()
        assert held_words(text) == ([], [], [])
        assert not phrasings.pair_held_out(*pair_of(text))
    for stated, asked in drawn(phrasings.far):
        assert FAR[0] <= len(between(stated)[1]) <= FAR[1]
        assert stated == asked
    for stated, asked in drawn(phrasings.value_first):
        assert not stated.asks
        assert asked.asks
        with pytest.raises(ValueError, match="asks nothing"):
            stated.question(KEY)
    for stated, _ in drawn(phrasings.short):
        assert stated.size <= 30


def test_a_question_in_other_words_keeps_the_noun_alone():
    for stated, asked in drawn(phrasings.in_other_words):
        (opening, link), (others, other) = (pair_of(p.sentence(KEY, VALUE).decode()) for p in (stated, asked))
        assert opening != others
        assert link != other
        nouns = [re.sub(r"['\"(<]?\{key\}.*", "", p.before, flags=re.S) for p in (stated, asked)]
        assert nouns[0].removeprefix(opening) == nouns[1].removeprefix(others)


def test_questions_are_sentences_up_to_the_value():
    for stated, asked in drawn(phrasings.draw):
        for phrasing in (stated, asked):
            if phrasing.asks:
                assert phrasing.sentence(KEY, VALUE).startswith(phrasing.question(KEY) + VALUE.encode())


def test_an_unknown_novelty_is_refused():
    with pytest.raises(ValueError, match=r"held out by one of opening, .*Received: 'verb'"):
        phrasings.near(np.random.default_rng(0), new="verb")
