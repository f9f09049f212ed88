"""The domains that retention reads: what a list names, from lines and archives, and what is said of bad ones."""

import hashlib
import io
import json
import re
import tarfile
import tomllib
import zipfile

import pytest

from examples.language_model import corpus, domains

LINES = {"train": {"learned": "L"}, "heldout": {"a\rb": "é one", "two": "2", "three": "33", "four": "4"}}
FILES = {
    "top/src/b.c": b"int b;\n", "top/src/a.c": b"int \xff;\n", "top/src/a.h": b"int h;\n", "top/src/notes.txt": b"no\n",
    "top/src/in/deep.c": b"int deep;\n", "top/one.py": b"x = 1\n",
}  # fmt: skip
LIST = """
[sources.books]
get = "the packs"
[sources.code]
get = "`fetch code`"
sha256 = "{sha256}"
files = [".c", ".h"]
head = "/* FILE: {{path}} */"

[[domains]]
name = "letters"
source = "books"
read = ["two", "a\\rb"]
other = ["three"]

[[domains]]
name = "C"
source = "code"
read = ["top/src/"]
other = ["top/src/in/", "top/one.py"]

[filler]
name = "history"
source = "books"
read = ["four"]
"""
CODE = b"/* FILE: top/src/a.c */\nint \xef\xbf\xbd;\n/* FILE: top/src/a.h */\nint h;\n/* FILE: top/src/b.c */\nint b;\n"
EXPECTED = {
    "letters": ("2é one".encode(), b"33"), "C": (CODE, b"/* FILE: top/src/in/deep.c */\nint deep;\nx = 1\n"),
    "history": (b"4", b""),
}  # fmt: skip


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)


def tarred(path):
    with tarfile.open(path, "w:xz") as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("top/src/link.c")
        link.type, link.linkname = tarfile.SYMTYPE, "b.c"
        archive.addfile(link)


@pytest.fixture
def root(tmp_path):
    """Books, their corpus, code in an archive, and a list of both."""
    (tmp_path / "books").mkdir()
    for side, its in LINES.items():
        lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in its.items())
        (tmp_path / "books" / f"{side}.jsonl").write_text(lines)
    corpus.prepare(tmp_path / "books", tmp_path / "corpus")
    zipped(tmp_path / "code.whl")
    listed(tmp_path, "code.whl")
    return tmp_path


def listed(root, code):
    digest = hashlib.sha256((root / code).read_bytes()).hexdigest()
    (root / "list.toml").write_text(LIST.format(sha256=digest))


def build(root, out="out", code="code.whl", **sources):
    given = {"books": root / "books", "code": root / code, **sources}
    return domains.build(root / "list.toml", given, root / "corpus", root / out)


def edit(root, old, new):
    path = root / "list.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize("code", ["code.whl", "code.tar.xz"])
def test_documents_become_domains(root, code):
    if code.endswith(".xz"):
        tarred(root / code)
        listed(root, code)
    found = domains.load(build(root, code=code))
    assert {x.name: (x.read.data.tobytes(), x.other.data.tobytes()) for x in (*found.domains, found.filler)} == EXPECTED
    assert found.filler.name == "history"
    letters = found.domains[0].read
    assert (letters.names, letters.starts.tolist()) == (("two", "a\rb"), [0, 1, 7])
    assert letters.document(1).tobytes() == "é one".encode()
    assert found.corpus == corpus.load(root / "corpus").sha256


def test_the_same_sources_give_the_same_bytes(root):
    first, second = ({x.name: x.read_bytes() for x in build(root, out).iterdir()} for out in ("first", "second"))
    assert first == second
    assert sorted(first) == sorted([
        "domains.json", *(f"{name}.{part}.txt" for name in EXPECTED for part in ("read", "other"))
    ])  # fmt: skip
    assert domains.load(root / "first").sha256 == domains.load(root / "second").sha256
    edit(root, '"two", ', "")
    assert domains.load(build(root, "third")).sha256 != domains.load(root / "first").sha256


def test_a_domain_is_held_to_its_sha256(root):
    right = hashlib.sha256(b"".join(EXPECTED["letters"])).hexdigest()
    edit(root, 'name = "letters"', f'name = "letters"\nsha256 = "{right}"')
    build(root)
    edit(root, right, "0" * 64)
    with pytest.raises(ValueError, match=rf"domain 'letters' must have the sha256 0+, .*the packs.* Received: {right}"):
        build(root, "again")
    assert not [path.name for path in root.iterdir() if "again" in path.name]


WRONG = {
    "of training": ('"two", ', '"learned", ', ValueError, "'learned' of domain 'letters' is a training document"),
    "twice": ('"two", ', '"a\\rb", ', ValueError, "'letters' lists a document twice"),
    "not there": ('"two", ', '"five", ', FileNotFoundError, "has no document 'five', and lacks 1 of 4"),
    "no folder": ('"top/src/"', '"top/none/"', FileNotFoundError, "has no document 'top/none/'"),
    "a source": ('source = "code"', 'source = "kode"', ValueError, r"has no \[sources.kode\]"),
    "an archive": ("sha256 = ", 'sha256 = "0"  # ', ValueError, "must have the sha256 0, of 'code': `fetch code`"),
    "a name": ('name = "C"', 'name = "../C"', ValueError, "be letters and digits"),
    "one name": ('name = "C"', 'name = "letters"', ValueError, "names of domains must differ"),
    "no other": ('other = ["three"]', "", ValueError, r"with documents to read and others"),
    "no filler": ("[filler]", "[filled]", ValueError, r"and a \[filler\], with name, source and read: 'filler'"),
    "a field": ('name = "C"', 'nam = "C"', ValueError, "and read: .* unexpected keyword argument 'nam'"),
    "no TOML": ("[filler]", "[filler", ValueError, "is not TOML"),
}


@pytest.mark.parametrize(("old", "new", "error", "said"), WRONG.values(), ids=WRONG)
def test_a_list_that_does_not_fit_builds_nothing(root, old, new, error, said):
    edit(root, old, new)
    with pytest.raises(error, match=said):
        build(root)
    assert sorted(path.name for path in root.iterdir()) == ["books", "code.whl", "corpus", "list.toml"]


def test_sources_that_do_not_fit_build_nothing(root):
    for given in ({"books": root / "books"}, {"books": root, "code": root, "more": root}):
        with pytest.raises(
            ValueError, match=r"the sources of .* are books: the packs; code: `fetch code`\. Received: b"
        ):
            domains.build(root / "list.toml", given, root / "corpus", root / "out")
    with pytest.raises(FileNotFoundError, match=r"there is no .*none. Source 'code' is `fetch code`"):
        build(root, code="none")
    (root / "code.tar").write_bytes(b"no archive at all" * 99)
    listed(root, "code.tar")
    with pytest.raises(ValueError, match=r"code\.tar is no .* archive that can be read"):
        build(root, code="code.tar")
    (root / "out").mkdir()
    with pytest.raises(FileExistsError, match="there is something at"):
        build(root)


@pytest.mark.parametrize("how", ["text", "format", "JSON", "a part"])
def test_a_damaged_folder_is_told(root, how):
    out = build(root)
    about = out / "domains.json"
    if how == "text":
        (out / "C.read.txt").write_bytes(CODE[:-2] + b"!\n")
    elif how == "a part":
        (out / "C.read.txt").unlink()
    else:
        about.write_text(about.read_text().replace("domains 1", "domains 9") if how == "format" else "{")
    wanted = (
        (FileNotFoundError, "C.read.txt") if how == "a part" else (ValueError, re.escape(str(about)) + " is damaged")
    )
    with pytest.raises(wanted[0], match=wanted[1]):
        domains.load(out)
    with pytest.raises(FileNotFoundError, match="build the domains first"):
        domains.load(root / "none")


def test_the_list_of_the_example_is_whole():
    found = domains.listed(domains.LIST)
    assert len(found.parts) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", part.sha256) for part in found.parts)
    names = [(part.source, x) for part in found.parts for x in part.documents]
    assert len(set(names)) == len(names)
    assert {found.get(source) for source in found.sources} == {
        table["get"] for table in tomllib.loads(domains.LIST.read_text(encoding="utf-8"))["sources"].values()
    }
