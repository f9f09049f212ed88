"""The language model's texts: what a corpus is made of, what it holds, and what is said of bad ones."""

import hashlib
import json
import lzma
import pathlib
import re

import numpy as np
import pytest

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
        facts.rows(read.train, seed=0, step=0, batch=1, length=4, span=1)


def test_a_folder_of_text(tmp_path):
    files = {f"part {i // 10}/{i}.txt": f"document {i}" for i in range(40)}
    files |= {"README.md": "é", "b.TXT": b"\xef\xbb\xbfmarked"}
    write_tree(tmp_path / "texts", files | {"picture.png": b"\x89PNG", "empty.txt": ""})
    (tmp_path / "texts" / "again.txt").symlink_to("b.TXT")
    (tmp_path / "texts" / "part 9").symlink_to("part 0")
    read = corpus.load(corpus.prepare(tmp_path / "texts", tmp_path / "corpus"))
    expected = {name: text.encode() if isinstance(text, str) else b"marked" for name, text in files.items()}
    for side, kept in zip(SIDES, (False, True)):
        assert documents(getattr(read, side)) == {n: t for n, t in expected.items() if held_out(n) == kept}
    assert json.loads((tmp_path / "corpus/corpus.json").read_bytes())["left_out"] == {
        "again.txt": "a link", "part 9": "a link", "empty.txt": "empty", "picture.png": "another kind of file",
    }  # fmt: skip


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
        f"{train}/utf16.h": "int".encode("utf-16"),
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
    about = json.loads((tmp_path / "corpus/corpus.json").read_bytes())
    assert about["kind"] == "code"
    assert about["replaced"] == {f"{aside}/deep/er/p.c": 1}
    assert about["left_out"] == {f"{train}/utf16.h": "it holds NUL bytes: binary, or UTF-16"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"id": "x", "text": 3}', "text"),
        ('["x"]', "x"),
        ('{"id": "x", "te', "te"),
        ("not JSON", "not JSON"),
        ('{"id": "x", "text": ' + 100_000 * "[", "id"),
        ('{"id": "x", "text": "half \\ud83d"}', "half"),
    ],
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
        if path.name == "corpus.json" and "unfinished" in path.parent.name:
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
    "deep json": (lambda out: (out / "corpus.json").write_text(100_000 * "["), ValueError),
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
