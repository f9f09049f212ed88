"""One table of models that differ in a choice, from files whose numbers are known."""

import json
import re
import shlex

import numpy as np
import pytest
from sources import ROOT
from test_language_model_retention import measured

from examples.language_model import choices, commands
from examples.language_model.commands import main


def write(folder, name, *, right=None, bits=None, speed=None):
    """Files of a model: digits right of each context of 128K, bits of each document, steps per second."""
    if right is not None:
        about = {"control": "memory", "kind": "near", "readings": 1}
        rows = [{**about, "length": 131072, "right": right}, {**about, "length": 131072, "readings": 2, "right": [[0]]},
                {**about, "control": "learning rate 0", "length": 4096, "right": [[0]]}]  # fmt: skip
        (folder / f"{name}.needle.json").write_text(json.dumps({"rows": rows}))
    if bits is not None:
        (folder / f"{name}.bits.json").write_text(json.dumps({"bits": {"reset": bits, "frozen": [[9]]}}))
    if speed is not None:
        line = {"step": 1, "device": "CPU", "steps_per_second": speed, "digits_right": 0.0, "first_right": 0.0}
        (folder / f"{name}.record.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def folder(tmp_path):
    half = [[6, 5], [6, 5], [6, 5], [6, 5]]
    write(tmp_path, "plain-0", right=half, bits=[[2.0, 2.0], [4.0, 4.0]], speed=10.0)
    write(tmp_path, "plain-1", right=[[6, 6]] * 4, bits=[[2.0, 2.0], [4.0, 4.0]], speed=10.0)
    write(tmp_path, "better-0", right=[[6, 6]] * 4, bits=[[1.0, 2.0], [3.0, 3.0]], speed=5.0)
    write(tmp_path, "quick-0", speed=20.0)
    return tmp_path


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_a_line_for_each_model_and_a_column_for_what_was_measured(folder, capsys):
    main(["choices", str(folder), "--against", "plain"])
    head, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    assert head == ["model", "seeds", "needles, 128K", "bits per byte", "time of training"]
    assert rows == [
        ["plain", "0, 1", "75.0%", "3.0000", "1.00"],
        ["better", "0", "100.0%, +25.0 (+25.0 to +25.0)", "2.2500, -25.0 (-25.0 to -25.0)", "2.00"],
        ["quick", "0", "-", "-", "0.50"],
    ]


def test_differences_are_paired_and_their_intervals_over_units():
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    apart = rng.normal(0.5, 0.1, size=400)
    found = choices.against(base + apart, base, relative=False)
    assert found.value == pytest.approx(apart.mean())
    error = apart.std() / 20
    assert (found.value - found.low, found.high - found.value) == pytest.approx((1.96 * error,) * 2, rel=0.15)
    ratio = choices.against(1.1 * (base + 9), base + 9, relative=True)
    assert ratio == pytest.approx((0.1,) * 3)


def test_retention_stands_in_the_table(folder, monkeypatch):
    for name, holds in (("plain-0", 2048), ("better-0", 10**6)):
        measured(monkeypatch, folder / f"{name}.retention.json", holds, texts=1)
    head, _, plain, better, quick = map(cells, choices.report(choices.load(folder), "plain").splitlines())
    assert head[2:5] == ["R, what was read", "R, its domain", "needles of the first domain"]
    assert plain[2:5] == ["0.00 (0.00 to 0.00)", "0.00 (0.00 to 0.00)", "0.0%"]
    assert better[2:5] == ["1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)", "100.0%"]
    assert quick[2:5] == ["-"] * 3
    assert (head[-1], plain[-1], quick[-1]) == ("state", "0 MB", "-")


def test_what_does_not_fit_is_said(folder):
    with pytest.raises(ValueError, match="no model is called 'none': there are better, plain, quick"):
        choices.report(choices.load(folder), "none")
    write(folder, "other-0", right=[[6, 6]] * 3)
    with pytest.raises(ValueError, match=r"must be of the same texts\. Received: 3 and 4"):
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
    lines = re.findall(r"^\$LM (.+)$", page, re.MULTILINE)
    assert {line.split()[0] for line in lines} >= {"domains", "retention", "retained", "run", "choices"}
    for line in lines:
        assert commands._parser().parse_args(shlex.split(line)).run
