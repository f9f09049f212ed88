"""One table of models that differ in a choice, from files whose numbers are known."""

import json
import re
import shlex

import pytest
from sources import ROOT
from test_language_model_retention import measured

from examples.language_model import choices, commands
from examples.language_model.commands import main


def write(folder, name, *, right=None, bits=None, speed=None, steps=1):
    """Files of a model: digits right of each context of 128K, bits of each document, steps (per second)."""
    if right is not None:
        about = {"control": "memory", "kind": "near", "readings": 1}
        rows = [{**about, "length": 131072, "right": right}, {**about, "length": 131072, "readings": 2, "right": [[0]]},
                {**about, "control": "learning rate 0", "length": 4096, "right": [[0]]}]  # fmt: skip
        (folder / f"{name}.needle.json").write_text(json.dumps({"rows": rows}))
    if bits is not None:
        (folder / f"{name}.bits.json").write_text(
            json.dumps(
                {"bits": {"reset": bits, "frozen": [[9]]}, "documents": ["d", "e"], "writers": ["D", "E"], "bin": 1}
            )
        )
    if speed is not None:
        line = {
            "step": steps,
            "device": "CPU",
            "side_by_side": 1,
            "steps_per_second": speed,
            "digits_right": 0.0,
            "first_right": 0.0,
        }
        (folder / f"{name}.record.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def folder(tmp_path):
    half = [[6, 5], [6, 5], [6, 5], [6, 5]]
    write(tmp_path, "plain-0", right=half, bits=[[2.0, 2.0], [4.0, 4.0]], speed=10.0)
    write(tmp_path, "plain-1", right=[[6, 6]] * 4, bits=[[2.0, 2.0], [4.0, 4.0]], speed=10.0)
    write(tmp_path, "better-0", right=[[6, 6]] * 4, bits=[[1.0, 2.0], [3.0, 3.0]], speed=5.0)
    write(tmp_path, "quick-0", speed=20.0, steps=3)
    return tmp_path


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_a_line_for_each_model_and_a_column_for_what_was_measured(folder, capsys):
    main(["choices", str(folder), "--against", "plain"])
    head, _, *rows = map(cells, capsys.readouterr().out.splitlines()[4:])
    assert head == ["model", "seeds", "needles, 128K", "bits per byte", "time of training"]
    assert rows == [
        ["plain", "0, 1", "75.0%", "3.0000", "1.00"],
        ["better", "0", "100.0%, +25.0 (+25.0 to +25.0)", "2.2500, -25.0 (-25.0 to -25.0)", "2.00"],
        ["quick", "0", "-", "-", "1.50"],
    ]


def test_differences_are_paired(folder):
    """Over contexts, which differ by 0, 0, 0 and 1: the mean 0.25, and 3.18 (Student's t) standard errors of 0.25."""
    write(folder, "plain-0", right=[[6, 6]] * 3 + [[0, 0]])
    write(folder, "plain-1", right=[[6, 6]] * 3 + [[0, 0]])
    rows = choices.report(choices.load(folder), "plain").splitlines()
    assert cells(rows[7])[:3] == ["better", "0", "100.0%, +25.0 (-54.6 to +104.6)"]


def test_a_model_without_memory_is_compared(folder):
    write(folder, "none-0", bits=[[2.0, 2.0], [1.0, 1.0]])
    path = folder / "none-0.bits.json"
    path.write_text(path.read_text().replace('"reset"', '"no memory"'))
    rows = choices.report(choices.load(folder), "plain").splitlines()
    assert cells(rows[8])[:4] == ["none", "0", "-", "1.5000, -37.5 (-514.0 to +439.0)"]


def test_retention_stands_in_the_table(folder, monkeypatch):
    for name, holds in (("plain-0", 2048), ("better-0", 10**6)):
        measured(monkeypatch, folder / f"{name}.retention.json", holds, texts=1)
    head, _, plain, better, quick = map(cells, choices.report(choices.load(folder), "plain").splitlines()[4:])
    assert head[2:6] == ["R, what was read", "R, its domain", "the last domain", "needles of the first domain"]
    assert [*plain[2:4], plain[5]] == ["0.00 (0.00 to 0.00)", "0.00 (0.00 to 0.00)", "0.0%"]
    assert [*better[2:4], better[5]] == ["1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "100.0%"]
    assert all(re.fullmatch(r"1\.0\d \(1\.0\d to 1\.0\d\)", row[4]) for row in (plain, better))
    assert quick[2:6] == ["-"] * 4
    assert (head[-1], plain[-1], quick[-1]) == ("state", "77 B", "-")


def test_what_does_not_fit_is_said(folder):
    with pytest.raises(ValueError, match="no model is called 'none': there are better, plain, quick"):
        choices.report(choices.load(folder), "none")
    write(folder, "other-0", right=[[6, 6]] * 3)
    with pytest.raises(ValueError, match="other was asked in 3 contexts and plain in 4"):
        choices.report(choices.load(folder), "plain")
    write(folder, "other-1", right=[[6, 6]] * 4)
    with pytest.raises(ValueError, match="the seeds of other were measured otherwise"):
        choices.load(folder)
    (folder / "other-1.needle.json").write_text('{"rows": [{}]}')
    with pytest.raises(ValueError, match=r"other-1\.needle\.json is damaged"):
        choices.load(folder)
    with pytest.raises(FileNotFoundError, match="holds no NAME-SEED"):
        choices.load(folder / "none")


def test_the_page_shows_commands_that_are_taken():
    page = (ROOT / "docs/retention.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^lm (.+)$", page, re.MULTILINE)
    assert {line.split()[0] for line in lines} >= {"domains", "retention", "retained", "run", "choices"}
    for line in lines:
        assert commands._parser().parse_args(shlex.split(line)).run
