"""``fwpkm inspect``: the page of a recording is whole, holds its data, and asks for nothing from outside."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from recordings import CFG, HOSTILE, record

from fwpkm import Recorder, cli
from fwpkm.diagnostics.history import read_history
from fwpkm.diagnostics.page import NAME, write_page
from fwpkm.diagnostics.record import open_recording

VOID = {"meta", "input", "link", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, their attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)


def inspect(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "a <b>&{{data}}.fwpkm"
    record(path)
    return Page(write_page(path, tmp_path / "out").read_text(encoding="utf-8"))


def test_it_is_well_formed_and_names_its_parts(page):
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == tags.count("main") == tags.count("canvas") == 1
    assert dict(page.elements)["html"] == {"lang": "en"}
    assert "a <b>&{{data}}.fwpkm" in page.texts


def test_it_asks_for_nothing_from_outside(page, tmp_path):
    text = (tmp_path / "out" / NAME).read_text(encoding="utf-8")
    assert not {"src", "href", "srcset", "action"} & {name for _, attributes in page.elements for name in attributes}
    assert "default-src 'none'" in text
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "innerHTML"):
        assert word not in text
    assert text.count("http") == 2  # http-equiv, and the name of SVG's namespace


def test_it_fits_a_narrow_window_and_both_schemes(page, tmp_path):
    """What a browser shows is looked at in test_page_in_browser.py."""
    text = (tmp_path / "out" / NAME).read_text(encoding="utf-8")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.elements]
    for rule in ("prefers-color-scheme: dark", "color-scheme: light dark", ":focus-visible", "overflow-wrap: anywhere"):
        assert rule in text


def test_all_data_is_there_and_no_text_gets_out(page, tmp_path):
    assert len(page.scripts) == 2  # the data and the program: no token has ended the first
    data = json.loads(page.scripts[0])
    recording = open_recording(tmp_path / "a <b>&{{data}}.fwpkm")
    history = read_history(CFG, recording.entries())
    assert data["config"] == json.loads(CFG.to_json())
    assert [row["text"] for row in data["rows"]] == [row.text for row in history.rows]
    assert set(HOSTILE) <= set(data["rows"][0]["text"])
    for found, slots in zip(data["memories"], history.memories):
        assert found["slots"] == slots.slot.tolist()
        assert found["writers"] == slots.writers.tolist()
        assert found["chunks"] == slots.chunks.tolist()
        assert [[w[:2] for w in writers] for writers in found["recent"]] == [
            [[row, number] for row, number, _ in writers] for writers in slots.recent
        ]
        assert len(found["norms"]["tokens"]) == 4
    assert data["rows"][0]["dead"] == [15]
    assert (data["calls"], data["chunks"], data["cut"]) == (5, 9, 0)
    assert len(data["rows"][0]["gate"]) == 33
    assert data["rows"][0]["gate"][0] == pytest.approx(float(history.rows[0].gate[0]), rel=1e-2)


def test_a_page_is_not_replaced_unless_told(tmp_path, capsys):
    record(tmp_path / "r")
    status, out, _ = inspect(capsys, tmp_path / "r", "--out", tmp_path / "out")
    target = tmp_path / "out" / NAME
    assert (status, out) == (0, f"{target}\n")
    target.write_text("mine")
    status, _, error = inspect(capsys, tmp_path / "r", "--out", tmp_path / "out")
    assert status == 2
    assert "exists already" in error
    assert "--overwrite" in error
    assert target.read_text() == "mine"
    assert inspect(capsys, tmp_path / "r", "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert target.read_text() != "mine"
    assert [path.name for path in target.parent.iterdir()] == [NAME]


def test_bad_recordings_are_one_line_and_leave_nothing(tmp_path, capsys):
    record(tmp_path / "r")
    whole = (tmp_path / "r").read_bytes()
    Recorder(tmp_path / "none", CFG).close()
    for name, data in {"empty": b"", "foreign": b"\0" * 99, "flipped": whole[:-3] + b"abc"}.items():
        (tmp_path / name).write_bytes(data)
    words = {"empty": "an empty file", "foreign": "no recording", "flipped": "damaged", "none": "holds no call"}
    words |= {"missing": "no such file", ".": "Is a directory"}
    for name, expected in words.items():
        status, out, error = inspect(capsys, tmp_path / name, "--out", tmp_path / "out")
        assert (status, out) == (2, "")
        assert error.count("\n") == 1
        assert expected in error
        assert not (tmp_path / "out").exists()


def test_a_recording_that_was_stopped_tells_what_is_left_out(tmp_path):
    record(tmp_path / "r")
    (tmp_path / "r").write_bytes((tmp_path / "r").read_bytes()[:-9])
    data = json.loads(Page(write_page(tmp_path / "r", tmp_path).read_text()).scripts[0])
    assert data["calls"] == 4
    assert data["cut"] > 100


def test_a_memory_that_wrote_nothing_has_a_page(tmp_path):
    record(tmp_path / "r", dataclasses.replace(CFG, chunk_size=64, lookahead=63))
    data = json.loads(Page(write_page(tmp_path / "r", tmp_path).read_text()).scripts[0])
    assert [memory["slots"] for memory in data["memories"]] == [[], []]
