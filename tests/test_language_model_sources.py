"""The language model's readers of users' files: encodings, mixed folders, folders to fill, contributors held out."""

import hashlib
import json
import lzma
import os

import pytest
from test_language_model_corpus import contents, documents, held_out, write_jsonl, write_tree

from examples.language_model import corpus, holdout
from examples.language_model.sources import Document

BOM = b"\xef\xbb\xbf"
FOREIGN = {
    "cp1252": ("née", "byte 1 is 0xe9"),
    "gbk": ("快速权重", "byte 0 is 0xbf"),
    "utf-16": ("plain", "UTF-16 or UTF-32, by its byte order mark"),
    "utf-32": ("plain", "UTF-16 or UTF-32, by its byte order mark"),
    "utf-16-le": ("plain", "byte 1 is NUL: binary, or UTF-16"),
}
KEPT, ASIDE = ([name for name in (f"{i}.txt" for i in range(60)) if held_out(name) == kept] for kept in (False, True))


def about(folder):
    return json.loads((folder / "corpus.json").read_bytes())


# Encodings


@pytest.mark.parametrize("encoding", FOREIGN)
def test_a_text_in_another_encoding_is_refused_by_name(tmp_path, encoding):
    text, fault = FOREIGN[encoding]
    write_tree(tmp_path / "texts", {KEPT[0]: "good", ASIDE[0]: "good", "sub/bad.md": text.encode(encoding)})
    with pytest.raises(ValueError, match=rf"1 of 3 files are not UTF-8: sub/bad\.md \({fault}\)\. .*iconv"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_all_texts_in_other_encodings_are_named_at_once(tmp_path):
    write_tree(tmp_path / "texts", {f"{i}.txt": "née".encode("cp1252") for i in range(7)} | {KEPT[-1]: "good"})
    with pytest.raises(ValueError, match=r"7 of 8 .*: 0\.txt .*4\.txt \(byte 1 is 0xe9\) and 2 more"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")


@pytest.mark.parametrize("encoding", FOREIGN)
def test_lines_in_another_encoding_are_refused_by_number(tmp_path, encoding):
    text, fault = FOREIGN[encoding]
    line = json.dumps({"id": "x", "text": text}, ensure_ascii=False).encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "w", "text": "good"}\n' * (not encoding.startswith("utf")) + line)
    number = 1 if encoding.startswith("utf") else 2
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {number}: .* UTF-8 \({fault[:4]}"):
        corpus.prepare(tmp_path / "a.jsonl", tmp_path / "corpus")


@pytest.mark.parametrize("packed", [False, True])
def test_byte_order_marks_come_off(tmp_path, packed):
    data = BOM + json.dumps({"id": "a", "text": "\ufeffone \ufeff"}).encode() + b'\n{"id": "b", "text": "two"}\n'
    path = tmp_path / ("a.jsonl.xz" if packed else "a.jsonl")
    path.write_bytes(lzma.compress(data) if packed else data)
    read = corpus.load(corpus.prepare(path, tmp_path / "corpus"))
    assert documents(read.train) == {"a": "one \ufeff".encode(), "b": b"two"}


def test_ids_differ(tmp_path):
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts/a.jsonl", {"x": "one"})
    write_jsonl(tmp_path / "texts/heldout.jsonl", {"x": "two"})
    with pytest.raises(ValueError, match="two documents have the id 'x'"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")


# Folders


def test_a_folder_of_lines_and_texts_is_read_whole(tmp_path, capsys):
    files = {KEPT[0]: "kept", ASIDE[0]: "aside", "sub/deep.md": "deep", "e.md": ""}
    write_tree(tmp_path / "texts", files | {"sub/notes.json": "{}", ".git/x": ""})
    write_jsonl(tmp_path / "texts/one.jsonl", {"a": "lines", "b": ""})
    write_jsonl(tmp_path / "texts/sub/heldout.JSONL.xz", {"c": "lines aside"})
    (tmp_path / "texts/record.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    out = corpus.prepare(tmp_path / "texts", tmp_path / "corpus")
    read = corpus.load(out)
    deep = {"sub/deep.md": b"deep"}
    kept, aside = {"a": b"lines", KEPT[0]: b"kept"}, {"c": b"lines aside", ASIDE[0]: b"aside"}
    (aside if held_out("sub/deep.md") else kept).update(deep)
    assert (documents(read.train), documents(read.heldout)) == (kept, aside)
    assert about(out)["kind"] == "jsonl and text"
    no = "another kind of file"
    others = 'lines of other objects, without "id" and "text"'
    assert about(out)["left_out"] == {"sub/notes.json": no, "record.jsonl": others, "b": "empty", "e.md": "empty"}
    inputs = about(out)["inputs"]
    assert inputs["sub/deep.md"] == hashlib.sha256(b"deep").hexdigest()
    assert set(inputs) == {*files, "one.jsonl", "sub/heldout.JSONL.xz", "record.jsonl"}
    said = capsys.readouterr().err
    assert "left out: 4" in said
    assert f"record.jsonl ({others})" in said


def test_lines_of_other_objects_alone_are_no_corpus(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text('{"title": "x", "body": "y"}\n')
    with pytest.raises(ValueError, match=r"holds no documents\. .*Found: a\.jsonl \(lines of other objects"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*\"id\" and a \"text\""):
        corpus.prepare(tmp_path / "texts/a.jsonl", tmp_path / "corpus")


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    write_tree(tmp_path / "texts", {KEPT[0]: "kept", ASIDE[0]: "aside", "locked/c.txt": "hidden"})
    scan = os.scandir

    def locked(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError, match="locked"):
        corpus.prepare(tmp_path / "texts", tmp_path / "corpus")


@pytest.mark.parametrize("holds", [[], ["lost+found"], [".unfinished-corpus-0"]])
def test_an_empty_folder_is_filled_in_place(tmp_path, holds):
    write_jsonl(tmp_path / "a.jsonl", {"a": "one"})
    out = tmp_path / "corpus"
    out.mkdir()
    for name in holds:
        (out / name).mkdir()
    number = out.stat().st_ino
    for text in ("one", "another"):  # the second time there is a corpus, whose place is the same
        write_jsonl(tmp_path / "a.jsonl", {"a": text})
        corpus.prepare(tmp_path / "a.jsonl", out)
        assert out.stat().st_ino == number
        assert sorted(path.name for path in out.iterdir()) == sorted([*corpus.FILES, *holds])
        assert documents(corpus.load(out).train) == {"a": text.encode()}


def test_a_mount_point_is_filled_from_within(tmp_path, monkeypatch):
    """What lies beside it is on another file system, so that no rename could come from there."""
    write_jsonl(tmp_path / "a.jsonl", {"a": "one"})
    out = tmp_path / "corpus"
    out.mkdir()
    rename = type(out).rename

    def within(path, target):
        if out not in path.parents:
            raise OSError(18, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(type(out), "rename", within)
    assert documents(corpus.load(corpus.prepare(tmp_path / "a.jsonl", out)).train) == {"a": b"one"}


# Contributors held out


def pack(*names):
    return [Document("heldout" in name, name.removeprefix("heldout "), name.encode()) for name in names]


def test_the_rule_is_the_smallest_sha256_of_names():
    names = ["Austen", "Zola", "Bacon", "Müller", "Ibsen"]
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest())
    for number in range(5):
        assert holdout.chosen(names + names, number) == set(ordered[:number])
    for number in (-1, 5):
        with pytest.raises(ValueError, match=f"less than the 5 contributors .*Received: {number}"):
            holdout.chosen(names, number)


def test_no_writer_is_on_both_sides_and_no_edition_is_held_out_twice():
    first, second, third = sorted(("Ann", "Ben", "Cid"), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    given = pack(f"{first}/1", f"{first}/2", f"{first}/tales", f"{first}/Eve's", f"{second}/1", f"{second}/tales",
                 f"{second}/as {first}", "Eve/1", f"{third}/1", "heldout Eddy/2", "heldout Eddy/1", "heldout Eddy/3",
                 "heldout Eddy/Eve's")  # fmt: skip
    books = holdout.Books(
        {f"{first}/tales": (first, third), f"{second}/tales": (second, first), f"{second}/as {first}": (first,),
         f"{first}/Eve's": ("Eve",)},
        {"Eddy/1": "Works", "Eddy/2": "Works"},
    )  # fmt: skip
    stay, left_out = holdout.hold_out(given, 1, books)
    assert [x.name for x in stay if x.heldout] == [
        f"{first}/1", f"{first}/2", f"{first}/Eve's", "Eddy/1", "Eddy/3", "Eddy/Eve's",
    ]  # fmt: skip
    assert [x.name for x in stay if not x.heldout] == [f"{second}/1", f"{third}/1"]
    assert left_out == {
        f"{first}/tales": f"of several writers: {first}, {third}",
        "Eddy/2": "of an edition that Eddy/1 is of",
        f"{second}/tales": f"by {first}, whose books are held out",
        f"{second}/as {first}": f"by {first}, whose books are held out",
        "Eve/1": "by Eve, whose books are held out",
    }
    with pytest.raises(ValueError, match="no training document is left"):
        holdout.hold_out(pack("Ann/1", "Ben/1"), 1, holdout.Books({"Ann/1": ("Eve",), "Ben/1": ("Eve",)}, {}))


def test_a_corpus_says_who_wrote_what_is_held_out(tmp_path, capsys):
    hugo = "Hapgood, Isabel Florence/Notre-Dame de Paris.txt"
    write_jsonl(tmp_path / "heldout.jsonl", {hugo: "Hugo's", "Doe/x": "Doe's"})
    write_jsonl(tmp_path / "train.jsonl", {"Ann/1": "a", "Ann/2": "aa", "Ben/1": "b", "Hugo, Victor/y": "no"})
    (tmp_path / "packs").mkdir()
    for name in ("heldout", "train"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "packs" / f"{name}.jsonl")
    out = corpus.prepare(tmp_path / "packs", tmp_path / "corpus", hold_out=1)
    read = corpus.load(out)
    more = holdout.chosen(["Ann", "Ben", "Hugo, Victor"], 1).pop()
    assert set(read.heldout.names) >= {hugo, "Doe/x", f"{more}/1"}
    assert (read.writer(hugo), read.writer("Doe/x"), read.writer(f"{more}/1")) == ("Hugo, Victor", "Doe", more)
    assert set(documents(read.train)) == {"Ann/1", "Ann/2", "Ben/1"} - {f"{more}/1", f"{more}/2"}
    assert about(out)["left_out"] == {"Hugo, Victor/y": "by Hugo, Victor, whose books are held out"}
    assert about(out)["hold_out"] == 1
    assert "taken to be by their contributors" in capsys.readouterr().err
    plain = corpus.load(corpus.prepare(tmp_path / "packs", tmp_path / "plain"))
    assert len(plain.train.names) == 4
    assert plain.writer(hugo) == "Hugo, Victor"
    assert contents(out) == contents(corpus.prepare(tmp_path / "packs", tmp_path / "again", hold_out=1))


def test_the_list_of_writers_is_sound():
    books = holdout.Books.read()
    assert len(books.writers) > 100
    assert set(books.editions) <= set(books.writers)
    for edition in set(books.editions.values()):
        assert len({books.writers[name] for name, found in books.editions.items() if found == edition}) == 1
    for writers in books.writers.values():
        assert writers
        assert all(writer == writer.strip() != "" for writer in writers)
