"""The language model's texts and facts: what a corpus holds, and what training and measuring ask."""

import hashlib
import json
import lzma
import pathlib
import re

import examples_folder  # noqa: F401  (makes examples importable)
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.language_model import corpus, facts

SIDES = ("train", "heldout")


def write_jsonl(path, documents):
    data = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items()).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


def write_tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)


def held_out(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def documents(texts):
    return {name: bytes(texts.document(i)) for i, name in enumerate(texts.names)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def books(tmp_path):
    """A folder of lines, packed and not, and what belongs on which side."""
    train = {"a": "Ah, née!\n", "b": "a second line\n" * 9, "c": "third"}
    heldout = {"d": "kept aside", "e": "and this"}
    folder = tmp_path / "books"
    folder.mkdir()
    write_jsonl(folder / "books-train.jsonl.xz", {name: train[name] for name in "ab"})
    write_jsonl(folder / "more.jsonl", {"c": train["c"]})
    write_jsonl(folder / "books-heldout.jsonl.xz", heldout)
    return folder, *({name: text.encode() for name, text in side.items()} for side in (train, heldout))


# Corpora


def test_lines_become_documents(books, tmp_path):
    folder, train, heldout = books
    out = corpus.prepare(folder, tmp_path / "made" / "corpus")
    assert out == tmp_path / "made" / "corpus"
    read = corpus.load(out)
    assert documents(read.train) == train
    assert documents(read.heldout) == heldout
    assert read.train.data.dtype == np.uint8
    assert read.train.starts.dtype == np.int64
    assert read.sha256 == hashlib.sha256(b"".join([*train.values(), *heldout.values()])).hexdigest()
    about = json.loads((out / "corpus.json").read_text("utf-8"))
    assert about["kind"] == "jsonl"
    for side in SIDES:
        data = (out / f"{side}.bin").read_bytes()
        assert about[side]["sha256"] == hashlib.sha256(data).hexdigest()
        assert about[side]["bytes"] == len(data)
    assert [about[side]["documents"] for side in SIDES] == [3, 2]
    with pytest.raises(IndexError, match="0 to 2"):
        read.train.document(3)


def test_the_same_source_gives_the_same_bytes(books, tmp_path):
    first = contents(corpus.prepare(books[0], tmp_path / "first"))
    second = contents(corpus.prepare(books[0], tmp_path / "second"))
    again = contents(corpus.prepare(books[0], tmp_path / "first"))
    assert first == second == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "first", "second"]


def test_one_file_of_lines_may_be_for_one_side(books, tmp_path):
    read = corpus.load(corpus.prepare(books[0] / "books-heldout.jsonl.xz", tmp_path / "corpus"))
    assert documents(read.heldout) == books[2]
    assert read.train.names == ()
    with pytest.raises(ValueError, match="No document is long enough"):
        facts.training_batch(read.train, np.random.default_rng(0), 1, 4, 0.0)


def test_a_folder_of_text(tmp_path):
    files = {f"part {i // 10}/{i}.txt": f"document {i}" for i in range(40)} | {"README.md": "é", "b.txt": b"\xff."}
    write_tree(tmp_path / "texts", files | {"picture.png": b"\x89PNG", "empty.txt": ""})
    (tmp_path / "texts" / "again.txt").symlink_to("b.txt")
    read = corpus.load(corpus.prepare(tmp_path / "texts", tmp_path / "corpus"))
    expected = {name: text.encode() if isinstance(text, str) else "\ufffd.".encode() for name, text in files.items()}
    for side, kept in zip(SIDES, (False, True)):
        assert documents(getattr(read, side)) == {n: t for n, t in expected.items() if held_out(n) == kept}


@pytest.mark.parametrize("kept", [False, True])
def test_text_needs_both_sides(tmp_path, kept):
    names = [name for name in (f"{i}.txt" for i in range(50)) if held_out(name) == kept][:2]
    write_tree(tmp_path / "texts", dict.fromkeys(names, "text"))
    with pytest.raises(ValueError, match=r"add documents .*'heldout' in its name"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def code_folders(kept, number):
    return [name for name in (f"drivers/net/n{i}" for i in range(200)) if held_out(name) == kept][:number]


def test_a_tree_of_code(tmp_path):
    (train, small, wide), (aside,) = code_folders(False, 3), code_folders(True, 1)
    many = {f"{wide}/w{i:02}.c": "w" * 199_990 for i in range(12)}
    files = {
        f"{train}/a.c": "a" * 10_000,
        f"{train}/B.h": "b" * 10_000,
        f"{train}/huge.c": "h" * 200_001,
        f"{train}/notes.txt": "t" * 20_000,
        f"{small}/s.c": "s" * 15_000,
        f"{aside}/deep/er/o.c": b"\xe9" + b"o" * 200_000,
        f"{aside}/deep/er/p.c": b"\xe9" + b"p" * 199_999,
        **many,
        **{f"{aside}/{i:02}.c": "k" * 199_990 for i in range(12)},
    }
    write_tree(tmp_path / "tree", files)
    read = corpus.load(corpus.prepare(tmp_path / "tree", tmp_path / "corpus", code=True))
    wide_text = "".join(f"/* FILE: {name} */\n{text}" for name, text in sorted(many.items()))
    header = "/* FILE: {} */\n"
    assert documents(read.train) == {
        train: (header.format(f"{train}/B.h") + "b" * 10_000 + header.format(f"{train}/a.c") + "a" * 10_000).encode(),
        wide: wide_text[:2_000_000].encode(),
    }
    kept = documents(read.heldout)
    assert list(kept) == [aside, f"{aside}/deep/er"]
    assert len(kept[aside]) > 12 * 199_990
    assert kept[f"{aside}/deep/er"] == (header.format(f"{aside}/deep/er/p.c") + "\ufffd" + "p" * 199_999).encode()
    assert json.loads((tmp_path / "corpus/corpus.json").read_bytes())["kind"] == "code"


@pytest.mark.parametrize(
    ("line", "found"),
    [('{"id": "x", "text": 3}', "text"), ('["x"]', "x"), ('{"id": "x", "te', "te"), ("not JSON", "not JSON")],
)
def test_a_bad_line_is_named_and_nothing_is_written(books, tmp_path, line, found):
    path = books[0] / "more.jsonl"
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"more\.jsonl, line 3: .*Received: .*{found}"):
        corpus.prepare(books[0], tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["books"]


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"PK" + data[2:]])
def test_a_damaged_archive_leaves_the_old_corpus(books, tmp_path, damage):
    out = corpus.prepare(books[0], tmp_path / "corpus")
    before = contents(out)
    path = books[0] / "books-train.jsonl.xz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"books-train\.jsonl\.xz is damaged or was cut off"):
        corpus.prepare(books[0], out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "corpus"]


def test_a_failed_rename_leaves_the_old_corpus(books, tmp_path, monkeypatch):
    out = corpus.prepare(books[0] / "books-heldout.jsonl.xz", tmp_path / "corpus")
    before = contents(out)
    rename = pathlib.Path.rename

    def fail(path, target):
        if path.name.endswith(".tmp"):
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        corpus.prepare(books[0], out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books", "corpus"]


def test_sources_and_targets_that_cannot_be(books, tmp_path):
    with pytest.raises(FileNotFoundError, match="Name a folder of text files"):
        corpus.prepare(tmp_path / "nowhere", tmp_path / "corpus")
    (tmp_path / "empty").mkdir()
    for code in (False, True):
        with pytest.raises(ValueError, match="holds no documents"):
            corpus.prepare(tmp_path / "empty", tmp_path / "corpus", code=code)
    write_tree(tmp_path / "mine", {"diary.txt": "dear"})
    for target, said in ((tmp_path / "mine", "other files than a corpus"), (tmp_path / "mine/diary.txt", "is a file")):
        with pytest.raises(FileExistsError, match=said):
            corpus.prepare(books[0], target)
    out = corpus.prepare(books[0], tmp_path / "corpus")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        corpus.prepare(books[0], out)
    assert contents(tmp_path / "mine") == {"diary.txt": b"dear"}


def edited(out, change):
    about = json.loads((out / "corpus.json").read_bytes())
    change(about)
    (out / "corpus.json").write_text(json.dumps(about))


SPOILED = {
    "no folder": (lambda out: [path.unlink() for path in out.iterdir()], FileNotFoundError),
    "no texts": (lambda out: (out / "train.bin").unlink(), FileNotFoundError),
    "cut texts": (lambda out: (out / "heldout.bin").write_bytes(b"kept"), ValueError),
    "cut json": (lambda out: (out / "corpus.json").write_bytes((out / "corpus.json").read_bytes()[:50]), ValueError),
    "foreign json": (lambda out: (out / "corpus.json").write_text('{"name": "x"}'), ValueError),
    "a list": (lambda out: (out / "corpus.json").write_text("[]"), ValueError),
    "a side less": (lambda out: edited(out, lambda about: about.pop("heldout")), ValueError),
    "an id less": (lambda out: edited(out, lambda about: about["train"]["ids"].pop()), ValueError),
    "no starts": (lambda out: edited(out, lambda about: about["train"].pop("starts")), ValueError),
    "words for starts": (lambda out: edited(out, lambda about: about["train"].update(starts=["x"])), ValueError),
    "starts that fall": (lambda out: edited(out, lambda about: about["train"]["starts"].insert(1, 10**9)), ValueError),
}


@pytest.mark.parametrize(("spoil", "kind"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_corpus_says_what_to_run(books, tmp_path, spoil, kind):
    out = corpus.prepare(books[0], tmp_path / "corpus")
    spoil(out)
    with pytest.raises(kind, match=re.escape(f"python -m examples.language_model prepare SOURCE {out}")):
        corpus.load(out)


# Facts


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
STATEMENTS = [
    re.compile(re.escape(p).replace(r"\{key\}", "([a-z0-9]{4})").replace(r"\{value\}", "([0-9]{6})").encode())
    for p in facts.SEEN + facts.UNSEEN
]


def statements(row):
    """Spans, keys, values and phrasings of the statements in a row, in order."""
    found = [(m.span(), m[1], m[2], i) for i, pattern in enumerate(STATEMENTS) for m in pattern.finditer(bytes(row))]
    return sorted(found)


def without(row, found):
    """A row's text: the statements taken out, with the space after each, and the one before it that they brought."""
    text, end = bytearray(), 0
    for (start, stop), *_ in found:
        text += row[end:start]
        end = stop + 1
    return bytes(text + row[end:])


def test_phrasings_are_sentences_that_end_with_the_value():
    phrasings = facts.SEEN + facts.UNSEEN
    assert (len(facts.SEEN), len(facts.UNSEEN)) == (6, 2)
    assert facts.SEEN[0] == "The secret number for ID-{key} is {value}."
    assert len({phrasing.partition("{key}")[0] for phrasing in phrasings}) == 8
    for phrasing in phrasings:
        assert phrasing.isascii()
        assert phrasing.count("{key}") == phrasing.count("{value}") == 1
        assert phrasing.endswith("{value}.")
        assert 35 <= len(phrasing.format(key="a" * 4, value="1" * 6)) <= 50


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


@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(20, 4800), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]),
    st.sampled_from([0, 100, 520]),
)  # fmt: skip
def test_rows_for_training(seed, batch, length, share, gap):
    tokens, asked = facts.training_batch(TEXTS, np.random.default_rng(seed), batch, length, share, gap)
    assert (tokens.shape, tokens.dtype) == ((batch, length + 1), np.uint8)
    assert (asked.shape, asked.dtype) == ((batch, length), np.bool_)
    for row, mask in zip(tokens, asked):
        found, last, expected = statements(row), {}, np.zeros(length, bool)
        assert sum(end - start for (start, end), *_ in found) <= share * (length + 1)
        for (start, end), key, value, phrasing in found:
            assert not facts.for_measuring(key.decode())
            assert not facts.for_measuring(value.decode())
            assert row[start - 1] == row[end] == ord(" ")
            if key in last:
                stated, *same = last[key]
                assert same == [value, phrasing]
                assert start - stated >= gap
                expected[end - 8 : end - 2] = True  # the targets are one further: the digits
            last[key] = end, value, phrasing
        assert (mask == expected).all()
        times = [sum(f[1] == key for f in found) for key in last]
        assert all(2 <= count <= 4 for count in times)
        assert len({value for _, _, value, _ in found}) == len(last)
        assert sum(chr(byte).isdigit() for byte in without(bytes(row), found)) == 0


def test_statements_stand_between_words():
    tokens, _ = facts.training_batch(TEXTS, np.random.default_rng(5), 20, 4000, 0.1)
    words = set(bytes(TEXTS.data).split())
    for row in tokens:
        found = statements(row)
        assert len(found) >= 6
        assert b"  " not in bytes(row)
        pushed = without(bytes(row), found).split()
        assert set(pushed[1:-1]) <= words  # the window itself cuts the first and the last
        # In the order of the text, none left out.
        assert b" ".join(pushed[1:-1]) in b" ".join(bytes(TEXTS.data).split())


def test_statements_add_no_second_space_to_indented_text():
    code = texts_of("if (x)\n        run(x);\n" * 300)
    tokens, _ = facts.training_batch(code, np.random.default_rng(0), 9, 4000, 0.1)
    for row in tokens:
        for (start, end), *_ in statements(row):
            assert bytes(row[start - 1 : start]) == b" "
            assert re.fullmatch(rb" [^ ]", bytes(row[end : end + 2]))


def test_a_text_without_spaces_takes_facts_too():
    tokens, asked = facts.training_batch(texts_of("x" * 5000), np.random.default_rng(0), 2, 4000, 0.1)
    assert all(len(statements(row)) >= 6 for row in tokens)
    assert asked.any(axis=1).all()


def test_facts_are_restated_near_and_far_and_in_every_phrasing():
    tokens, asked = facts.training_batch(TEXTS, np.random.default_rng(0), 200, 4096, 0.1)
    distances, seen, first, last = [], set(), {}, []
    for row in tokens:
        first = {}
        found = statements(row)
        last.append(found[-1][0][0])
        for (start, _), key, _, phrasing in found:
            seen.add(phrasing)
            distances += [start - first[key]] if key in first else []
            first.setdefault(key, start)
    assert seen == set(range(6))
    assert min(distances) < 700
    assert max(distances) > 3000
    assert 4.5 < asked.sum() / 200 / 6 < 6.5  # restatements of a row, of about nine statements
    assert len(set(last)) > 100


def test_a_row_too_short_for_a_restatement_gets_no_facts():
    for length, share in ((560, 0.3), (4000, 0.0), (700, 0.05)):
        tokens, asked = facts.training_batch(TEXTS, np.random.default_rng(0), 50, length, share)
        assert not any(statements(row) for row in tokens)
        assert not asked.any()
        assert all(bytes(row) in bytes(TEXTS.data) for row in tokens)


def test_windows_keep_within_documents_and_documents_come_by_length():
    texts = texts_of("a" * 3000, "b" * 99, "c" * 1000)
    tokens, _ = facts.training_batch(texts, np.random.default_rng(0), 2000, 99, 0.0)
    assert (tokens == tokens[:, :1]).all()
    drawn, counts = np.unique(tokens[:, 0], return_counts=True)
    assert bytes(drawn) == b"ac"
    assert 0.7 < counts[0] / 2000 < 0.8
    exact, _ = facts.training_batch(texts, np.random.default_rng(0), 3, 2999, 0.0)
    assert bytes(exact[0]) == b"a" * 3000


def test_batches_repeat_with_the_seed_alone():
    first, second, other = (facts.training_batch(TEXTS, np.random.default_rng(s), 2, 2000, 0.1) for s in (1, 1, 2))
    assert all(map(np.array_equal, first, second))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("changed", [{"batch": 0}, {"length": 0}, {"share": 1.5}, {"share": np.nan}, {"gap": -1}])
def test_arguments_of_batches(changed):
    arguments = {"batch": 1, "length": 100, "share": 0.1, "gap": 520} | changed
    with pytest.raises(ValueError, match=f"Received: .*{next(iter(changed))}={next(iter(changed.values()))}"):
        facts.training_batch(TEXTS, np.random.default_rng(0), **arguments)


def test_no_document_is_long_enough():
    with pytest.raises(ValueError, match=r"window of 9,001 bytes: of 3 documents the longest has 9,000\."):
        facts.training_batch(TEXTS, np.random.default_rng(0), 1, 9000, 0.1)


# Haystacks


@given(
    st.integers(0, 2**32), st.integers(1, 6), st.integers(1300, 4800), st.sampled_from(facts.SEEN + facts.UNSEEN),
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
