"""Books' own names asked for, and intervals over writers: what is selected, what counts as right, what is averaged."""

import json
import math

import numpy as np
import pytest
import torch
from test_language_model_commands import CONFIG
from test_language_model_measures import CPU, small

from examples.language_model import by_position, intervals, names
from examples.language_model.commands import main
from examples.language_model.corpus import Texts
from examples.language_model.intervals import Interval, Measured

FAR = b"so it went on. " * 280  # 4,200 bytes


def texts(*documents):
    data = np.frombuffer(b"".join(documents), np.uint8)
    return Texts(data, np.cumsum([0, *map(len, documents)]), tuple(map(str, range(len(documents)))))


# Names


def test_words_are_all_of_training_in_small_letters():
    known = names.words(texts(b"The OLD Mansfield, 12,345 of 1845; S\xc3\xa9verine's", b"don't Kim mansfield 99999,"))
    assert known == {b"mansfield", b"12,345", b"s\xc3\xa9verine", b"99999"}


def asked(document, known=()):
    return [(q.name.decode(), q.place, q.known) for q in names.questions(document, set(known))]


def test_a_name_is_asked_where_it_stands_again_far_away():
    document = b"Wickham met Wickham. " + FAR + b"Then Wickham " + FAR + b"and Wickham came."
    first, again = document.index(b"met Wickham") + 4, document.index(b"Then Wickham") + 5
    assert asked(document) == [("Wickham", again, again - first)]
    near = b"Wickham " + FAR[: names.GAP - 9] + b" Wickham then Wickham."  # GAP bytes from one's start to the other's
    assert asked(near) == []
    assert asked(b"Wickham  " + near[8:]) == [("Wickham", names.GAP + 1, names.GAP + 1)]


@pytest.mark.parametrize(
    ("name", "is_asked"),
    [
        ("Wickham", True), ("12,345", True), ("31415", True), ("Séverine", True), ("Étretat", True),
        ("Kate", False), ("1845", False), ("wickham", False), ("WICKHAM", False), ("1,84", False), ("McKay5", False),
    ],
)  # fmt: skip
def test_what_is_a_name(name, is_asked):
    document = f"of {name} it ".encode() + FAR + f"to {name}; and".encode()
    assert [found for found, *_ in asked(document)] == [name] * is_asked
    assert asked(document, [name.encode().lower()]) == []


def test_a_name_is_whole_words_and_never_a_word_of_the_book():
    assert asked(b"Wickhams " + FAR + b"Wickham ") == []
    assert asked(b"Thither " + FAR + b"Thither went they thither; ") == []
    assert asked(b"Wickham " + FAR + b"a Wickham") == []  # which may go on: texts are cut


def test_right_bytes_are_counted_from_the_end():
    seen = np.array([0, 1, 1, 0, 1, 1, 1, 0], bool)  # of bytes 1 to 8
    assert names.correct(seen, 5, b"abc") == 3
    assert names.correct(seen, 4, b"abcd") == 3
    assert names.correct(seen, 2, b"abcd") == 1
    assert names.correct(seen, 6, b"abc") == 0


def test_a_name_is_right_exactly_if_the_model_would_say_it():
    """Greedily, byte after byte, with memories that go on; in a whole document, and from GAP bytes before it on."""
    model = small(memory_scope="sequence")
    rng, size, place, length = np.random.default_rng(0), 4700, 4600, 6
    tokens = rng.choice(np.frombuffer(b"etaoin shrdlu", np.uint8), (2, size))
    spoken = {}
    for mode, begin in (("whole", 0), ("anew", place - names.GAP), ("frozen", 0)):
        update = mode != "frozen"
        for row in range(2):
            said = tokens[row : row + 1].copy()
            _, reading = model(torch.from_numpy(said[:, begin : place - 1]).long(), model.start(1), update=update)
            for at in range(place, place + length):
                hidden, reading = model(torch.from_numpy(said[:, at - 1 : at]).long(), reading, update=update)
                said[0, at] = model.logits(hidden[:, -1]).argmax()
            spoken[mode, row] = said[0]
    for mode in ("whole", "anew", "frozen"):
        text = np.stack([spoken[mode, 0], spoken[mode, 1]])
        text[1, place + 1] ^= 1  # the second name is right but for its second byte, or for what follows from it
        question = [[names.Question(place, row[place : place + length].tobytes(), 4500)] for row in text]
        found = (
            names.anew(model, text, question, CPU)
            if mode == "anew"
            else names.whole(model, text, question, CPU, update=mode == "whole")
        )
        assert found[0] == length
        assert 0 <= found[1] < length - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was never trained to speak of, with a memory and without, and books that hold names."""
    root = tmp_path_factory.mktemp("names")
    lines = {"heldout": {}, "train": {"Zoe/z": "Elinor walked. " + FAR.decode()}}
    for i, name in enumerate(("Wickham", "Bingley", "Darcysson")):
        said = f"So {name} and Elinor met 31{i}15. " + FAR.decode() + f"Then {name} and Elinor had 31{i}15. "
        lines["heldout"][f"{'AB'[i // 2]}/{i}"] = (said + FAR.decode())[:5121]
    for side, documents in lines.items():
        data = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
        (root / f"{side}.jsonl").write_text(data)
    (root / "packs").mkdir()
    for side in lines:
        (root / f"{side}.jsonl").rename(root / "packs" / f"{side}.jsonl")
    main(["prepare", str(root / "packs"), str(root / "corpus")])
    for name, memories in (("memory", [1]), ("plain", [])):
        config = CONFIG.replace("facts = 0.3", "facts = 0").replace("memories = [1]", f"memories = {memories}")
        (root / f"{name}.toml").write_text(config)
        main(["train", str(root / f"{name}.toml"), "--corpus", str(root / "corpus"), "--out", str(root / name),
              "--device", "cpu", "--steps", "1"])  # fmt: skip
    return root


@pytest.mark.parametrize("model", ["memory", "plain"])
def test_from_a_corpus_to_names(folder, tmp_path, capsys, model):
    ask = ["names", "--model", str(folder / model), "--corpus", str(folder / "corpus"), "--out", str(tmp_path / "o"),
           "--device", "cpu", "--length"]  # fmt: skip
    main([*ask, "5120"])
    results = json.loads((tmp_path / "o").read_text())
    assert [(i, name) for i, _, name, _ in results["questions"]] == [
        (i, name) for i, own in enumerate(("Wickham", "Bingley", "Darcysson")) for name in (own, f"31{i}15")
    ]
    assert results["writers"] == ["A", "A", "B"]
    modes = ["carried", "reset", "frozen"] if model == "memory" else ["no memory"]
    assert {mode: len(right) for mode, right in results["right"].items()} == dict.fromkeys(modes, 6)
    said = capsys.readouterr().out
    assert f"{modes[0]}: of 6 names " in said
    assert ("carried less reset, from the left context: " in said) == (model == "memory")
    with pytest.raises(SystemExit):
        main([*ask, "1024"])
    assert "no name of 3 held-out documents stands again after 4,096 bytes" in capsys.readouterr().err


def test_shares_are_of_documents_and_after_given_bytes():
    results = {
        "documents": ["a", "b", "c"], "writers": ["x", "x", "y"],
        "questions": [[0, 9, "Étretat", 5000], [0, 99, "Wickham", 5000], [2, 9, "31415", 5000]],
        "right": {"carried": [8, 5, 2], "reset": [7, 7, 5]},
    }  # fmt: skip
    assert names.shares(results, "carried", 0).values == {"a": 0.5, "c": 0.0}
    assert names.shares(results, "carried", 2).values == {"a": 1.0, "c": 0.0}
    assert names.shares(results, "reset", 0).values == {"a": 0.5, "c": 1.0}  # É has two bytes
    assert "of 3 names 25.0% (-292.7 to 342.7)" in next(names.summary(results))


# Intervals


def test_students_t_against_published_quantiles():
    # Abramowitz and Stegun, table 26.10, 0.95 of two sides.
    for freedom, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (27, 2.052), (120, 1.980)):
        assert intervals.student(freedom) == pytest.approx(t, abs=5e-4)
    assert intervals.student(10, 0.99) == pytest.approx(3.169, abs=5e-4)


def test_a_writer_is_one_unit_however_many_books():
    writers = {"a1": "A", "a2": "A", "a3": "A", "b": "B", "c": "C"}
    measured = Measured({"a1": 1.0, "a2": 2.0, "a3": 3.0, "b": 4.0, "c": 6.0}, writers)
    assert measured.by_writer() == {"A": 2.0, "B": 4.0, "C": 6.0}
    half = 4.3027 * 2 / math.sqrt(3)
    assert intervals.over_writers(measured) == pytest.approx((4, 4 - half, 4 + half, 3), abs=1e-3)


def test_pairs_see_what_writers_alone_do_not():
    writers = {name: name for name in "abcd"}
    base = Measured(dict(zip("abcd", (1.0, 2.0, 4.0, 8.0))), writers)
    less = Measured({name: 0.9 * x for name, x in base.values.items()}, writers)
    assert intervals.relative(less, base) == pytest.approx((-0.1, -0.1, -0.1, 4))
    found = intervals.difference(less, base)
    values = np.array([-0.1, -0.2, -0.4, -0.8])
    half = 3.1824 * values.std(ddof=1) / 2
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half, 4), abs=1e-4)
    with pytest.raises(ValueError, match=r"same documents.*Received: 4 and 3, 1 only on one side \['d'\]"):
        intervals.difference(less, Measured(dict(zip("abc", (1.0, 2.0, 4.0))), writers))
    with pytest.raises(ValueError, match="same writers"):
        intervals.relative(less, Measured(base.values, {**writers, "a": "b"}))


def test_seeds_are_units_of_their_own():
    runs = [Interval(mean, 0.0, 1.0, 28) for mean in (1.0, 2.0, 3.0)]
    half = 4.3027 / math.sqrt(3)
    assert intervals.over_seeds(runs) == pytest.approx((2, 2 - half, 2 + half, 3), abs=1e-4)
    alone = intervals.over_seeds(runs[:1])
    assert (alone.mean, math.isnan(alone.low), math.isnan(alone.high), alone.units) == (1.0, True, True, 1)
    with pytest.raises(ValueError, match="one value or more"):
        intervals.interval([])


def test_bits_of_a_file_by_document(folder, tmp_path):
    from examples.language_model.corpus import load

    by_position.measure(folder / "memory", load(folder / "corpus"), tmp_path / "bits.json", CPU, length=5120)
    data = json.loads((tmp_path / "bits.json").read_text())
    found = intervals.bits(tmp_path / "bits.json", "frozen", start=2048)
    assert found.values == dict(zip(("A/0", "A/1", "B/2"), np.mean(data["bits"]["frozen"], 1, where=np.arange(5) >= 2)))
    assert found.writers == {"A/0": "A", "A/1": "A", "B/2": "B"}
    with pytest.raises(ValueError, match=r"bits of reset, carried, frozen .*Received: 'no memory'"):
        intervals.bits(tmp_path / "bits.json", "no memory")
