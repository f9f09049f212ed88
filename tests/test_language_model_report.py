"""The language model's report: its tables hold the numbers of the files, and its pictures are drawn."""

import json
import struct

import numpy as np
import pytest

from examples.language_model import commands, needle, pictures, report, results

LENGTHS = (4096, 8192)
DOCUMENTS = ["a", "b", "c", "d"]


def experiment(memories=(), **training):
    training = {"steps": 100, "batch": 2, "length": 512, "seed": 0, "facts": 0.1, **training}
    return {"model": {"memories": list(memories)}, "training": training}


def row(control, length, readings, right, phrasing="seen-0", samples=20):
    """Of ``samples`` needles, ``right`` are answered and the others have three digits right."""
    digits = np.repeat([6, 3], [right, samples - right])
    return {
        "control": control, "phrasing": phrasing, "length": length, "readings": readings, "samples": samples,
        "exact": right / samples, "exact_interval": needle.wilson(right, samples), "digits": digits.mean() / 6,
        "depth": ((np.arange(samples) + 0.5) / samples).tolist(), "right": digits.tolist(),
    }  # fmt: skip


def write(folder, name, settings, *, rows=None, unseen=None, bits=None, speed=None, first=0.1, documents=None):
    about = {"corpus": "c0ffee", "device": "a device", "experiment": settings}
    for kind, answers in (("needle", rows), ("needle-unseen", unseen)):
        if answers is not None:
            (folder / f"{name}.{kind}.json").write_text(json.dumps({**about, "rows": answers}))
    if bits is not None:
        data = {**about, "documents": documents or DOCUMENTS, "bin": 1024, "bits": bits}
        (folder / f"{name}.bits.json").write_text(json.dumps(data))
    if speed is not None:
        steps = settings["training"]["steps"]
        lines = [
            {"step": s, "digits_right": s / steps / 2, "first_right": first * s / steps, "steps_per_second": speed * f}
            | {"device": "a device"}
            for s, f in ((steps // 4, 0.1), (steps // 2, 1), (steps, 1))
        ]
        (folder / f"{name}.record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_bits(factor, bins=8):
    """Of documents that differ more than models do."""
    return (factor * np.outer([1.0, 1.5, 2.0, 2.5], np.linspace(1.2, 0.8, bins))).tolist()


@pytest.fixture
def folder(tmp_path):
    """A headline model of two seeds, one without facts, and without memory at equal steps and at equal time."""
    for seed in (0, 1):
        rows = [row("memory", length, n, 15 + n + seed) for length in LENGTHS for n in (1, 3)]
        rows += [row("another document's memory", length, n, n - 1) for length in LENGTHS for n in (1, 3)]
        rows += [row("learning rate 0", length, 1, 0) for length in LENGTHS]
        bits = {"reset": text_bits(0.9), "carried": text_bits(0.96), "frozen": text_bits(1.1)}
        unseen = [row("memory", 4096, 1, 5, "unseen-0")]
        write(
            tmp_path, f"x{seed}", experiment([1], seed=seed), rows=rows, unseen=unseen, bits=bits, speed=10, first=0.9
        )
    write(tmp_path, "y", experiment([1], facts=0.0), rows=[row("memory", 4096, n, 2 * n) for n in (1, 2)], speed=12)
    write(tmp_path, "z", experiment(), rows=[row("no memory", 4096, 1, 1)], bits={"no memory": text_bits(1)}, speed=16)
    bits = {"no memory": text_bits(0.8)[::-1]}
    write(tmp_path, "long", experiment(steps=160), bits=bits, speed=16, documents=DOCUMENTS[::-1])
    return tmp_path


def section(text, title):
    """The rows of the table below the heading that begins so, as lists of cells."""
    parts = [part for part in text.split("### ") if part.startswith(title)]
    assert len(parts) == 1, [part.splitlines()[0] for part in text.split("### ")[1:]]
    lines = [line for line in parts[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def test_needles(folder):
    text = report.report(folder)
    head, *rows = section(text, "Needles, seen in training (seen-0): memory, 100 steps, seed 0")
    assert head == ["context (bytes)", "1 reading", "3 readings"]
    # 16 of 20: (0.8 + 0.0960) / 1.1921 ± 0.1680; 0.8 + 0.2 / 2 of the digits
    assert rows[0] == ["4K", "80.0% (58.4 to 91.9), 90.0%", "90.0% (69.9 to 97.2), 95.0%"]
    assert [r[0] for r in rows] == ["4K", "8K"]
    assert section(text, "Needles, seen in training (seen-0): memory, 100 steps, seed 1")[1][1].startswith("85.0%")
    unseen = section(text, "Needles, never seen in training (unseen-0): memory, 100 steps, seed 0")
    assert [r[0] for r in unseen[1:]] == ["4K"]
    assert unseen[1][1].startswith("25.0% (")


def test_controls_are_at_their_worst(folder):
    head, *rows = section(report.report(folder), "Controls")
    assert head == ["control", "model", "4K", "8K"]
    shares = {(r[0], r[1]): [cell.split(" ")[0] for cell in r[2:]] for r in rows}
    assert shares == {
        ("learning rate 0", "memory, 100 steps, seed 0"): ["0.0%", "0.0%"],
        ("learning rate 0", "memory, 100 steps, seed 1"): ["0.0%", "0.0%"],
        ("another document's memory", "memory, 100 steps, seed 0"): ["10.0%", "10.0%"],
        ("another document's memory", "memory, 100 steps, seed 1"): ["10.0%", "10.0%"],
        ("no memory", "no memory, 100 steps, seed 0"): ["5.0%", "-"],
        ("trained without facts", "memory, no facts in training, 100 steps, seed 0"): ["20.0%", "-"],
    }


def test_bits(folder):
    head, *rows = section(report.report(folder), "Bits per byte by position")
    assert head[2:] == ["whole", "0 to 1K", "1K to 4K", "4K to 8K"]
    # the documents' mean is 1.75, and positions fall in a line from 1.2 to 0.8
    plain = next(r for r in rows if r[0] == "no memory, 100 steps, seed 0")
    bins = 1.75 * np.linspace(1.2, 0.8, 8)
    assert plain[1:] == ["-", *(f"{x:.4f}" for x in (1.75, 2.1, bins[1:4].mean(), bins[4:].mean()))]
    assert [r[1:3] for r in rows if r[0] == "memory, 100 steps, seed 1"] == [
        ["reset", "1.5750"], ["carried", "1.6800"], ["frozen", "1.9250"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("title", "against", "shares"),
    [
        ("at equal steps", "no memory, 100 steps, seed 0 (0.62 of the time)", (-10.0, -4.0, +10.0)),
        ("at equal time", "no memory, 160 steps, seed 0 (1.00 of the time)", (+12.5, +20.0, +37.5)),
    ],
)
def test_differences_pair_documents_by_name(folder, title, against, shares):
    _, *rows = section(report.report(folder), f"Bits per byte against no memory, {title}")
    own = [r for r in rows if r[0] == "memory, 100 steps, seed 0"]
    assert [r[1] for r in own] == ["reset", "carried", "frozen"]
    assert {r[2] for r in own} == {against}
    for line, share in zip(own, shares):  # a constant factor leaves the interval no width, if paired
        assert set(line[3:]) == {f"{share:+.1f}% ({share:+.1f} to {share:+.1f})"}


def test_interval_of_a_difference():
    rng = np.random.default_rng(3)
    base = rng.uniform(1, 3, 400)
    mean, low, high = results.relative(base * (0.9 + 0.1 * rng.standard_normal(400)), base)
    assert low < mean < high
    assert mean == pytest.approx(0.9 - 1, abs=0.02)
    # 0.1 * sqrt(mean of squares) / mean is the standard deviation of a term of the ratio
    deviation = 0.1 * np.sqrt((base**2).mean()) / base.mean() / np.sqrt(400)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_training(folder):
    _, *rows = section(report.report(folder), "Training")
    assert {r[0]: r[1:] for r in rows} == {
        "memory, 100 steps, seed 0": ["100", "10.0", "10,200", "10", "0.62", "25", "50.0%", "a device"],
        "memory, 100 steps, seed 1": ["100", "10.0", "10,200", "10", "0.62", "25", "50.0%", "a device"],
        "memory, no facts in training, 100 steps, seed 0": ["100", "12.0", "12,300", "8", "0.75", "-", "-", "a device"],
        "no memory, 100 steps, seed 0": ["100", "16.0", "16,400", "6", "1.00", "-", "50.0%", "a device"],
        "no memory, 160 steps, seed 0": ["160", "16.0", "16,400", "10", "1.00", "-", "50.0%", "a device"],
    }


def test_record_of_a_run_that_went_on(folder):
    path = folder / "x0.record.jsonl"
    first, *_ = path.read_text().splitlines()
    again = {"step": 20, "digits_right": 0.25, "first_right": 0.5, "steps_per_second": 5, "device": "a device"}
    path.write_text(f"{first}\n{json.dumps(again)}\n")  # the line of step 25 was of steps taken again
    _, *rows = section(report.report(folder), "Training")
    assert rows[0][1:8] == ["20 of 100", "5.0", "5,120", "4", "0.31", "20", "25.0%"]


def test_pictures(folder, tmp_path):
    out = tmp_path / "a" / "b"
    paths = pictures.draw(folder, out)
    assert sorted(out.iterdir()) == sorted(paths)
    assert {p.name for p in paths} == {"needle.png", "bits.png", "training.png"}
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20]) == (1260,)
        assert 10_000 < len(data) < 200_000


def test_heat_map_pools_seeds(folder):
    figure = pictures.needle(results.load(folder))
    one, three, _ = figure.axes
    assert [one.get_title(), three.get_title()] == ["1 reading", "3 readings"]
    # Two needles of each seed in a band, the deepest wrong: 16 and 17, then 18 and 19 of 20 are right.
    assert one.images[0].get_array()[:, 0].tolist() == [1] * 8 + [0.25, 0]
    assert three.images[0].get_array()[:, 1].tolist() == [1] * 9 + [0.25]


def test_what_is_missing_is_left_out(tmp_path):
    rows = [row("memory", 4096, 1, 20)]
    write(tmp_path, "only", experiment([0]), rows=rows)
    write(tmp_path, "unknown", experiment(), speed=1)
    text = report.report(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### Needles, seen in training (seen-0): memory, 100 steps, seed 0"
    ]
    assert [p.name for p in pictures.draw(tmp_path, tmp_path)] == ["needle.png"]
    (tmp_path / "only.needle.json").unlink()
    with pytest.raises(FileNotFoundError, match="measure first"):
        report.report(tmp_path)


def test_equal_models_are_told_apart_by_name(tmp_path):
    for name in ("p", "q"):
        write(tmp_path, name, experiment([0]), rows=[row("memory", 4096, 1, 20)])
    assert [r.label for r in results.load(tmp_path)] == [
        "memory, 100 steps, seed 0 (p)",
        "memory, 100 steps, seed 0 (q)",
    ]


def without(name):
    return lambda data: data.pop(name)


def changed(data, value, *place):
    *path, last = place
    for part in path:
        data = data[part]
    data[last] = value


DAMAGE = {
    "no corpus": ("x0.needle.json", without("corpus")),
    "no rows": ("x0.needle.json", without("rows")),
    "another experiment": ("x0.bits.json", lambda d: changed(d, 7, "experiment", "training", "steps")),
    "another corpus": ("z.bits.json", lambda d: changed(d, "tea", "corpus")),
    "other bins": ("z.bits.json", lambda d: changed(d, 512, "bin")),
    "unknown settings": ("x0.bits.json", lambda d: changed(d, 1, "experiment", "training", "colour")),
    "a share that its samples do not give": ("x0.needle.json", lambda d: changed(d, 0.1, "rows", 0, "exact")),
    "a word for a share": ("x0.needle.json", lambda d: changed(d, "all", "rows", 0, "digits")),
    "a word for a bound": ("x0.needle.json", lambda d: changed(d, "low", "rows", 0, "exact_interval", 0)),
    "a word for a count": ("x0.needle.json", lambda d: changed(d, "two", "rows", 0, "readings")),
    "a word for a depth": ("x0.needle.json", lambda d: changed(d, "deep", "rows", 0, "depth", 0)),
    "fewer depths": ("x0.needle.json", lambda d: d["rows"][0]["depth"].pop()),
    "fewer documents": ("z.bits.json", lambda d: d["bits"]["no memory"].pop()),
    "a ragged table": ("z.bits.json", lambda d: d["bits"]["no memory"][0].pop()),
    "not a number": ("z.bits.json", lambda d: changed(d, float("nan"), "bits", "no memory", 0, 0)),
    "a memory that the model lacks": ("z.bits.json", lambda d: changed(d, {"reset": text_bits(1)}, "bits")),
    "a document twice": ("z.bits.json", lambda d: changed(d, "b", "documents", 0)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(folder, damage):
    name, change = DAMAGE[damage]
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=name if "another" not in damage and "other" not in damage else r"\.json is of"
    ):
        report.report(folder)


@pytest.mark.parametrize(("field", "value"), [("step", "9"), ("steps_per_second", None), ("digits_right", "all")])
def test_a_line_of_a_record_that_is_no_line(folder, field, value):
    path = folder / "z.record.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, field: value}) for line in lines))
    with pytest.raises(ValueError, match=r"z\.record\.jsonl is damaged, or of another version"):
        report.report(folder)


@pytest.mark.parametrize("name", ["x0.needle.json", "x0.bits.json", "z.record.jsonl"])
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_cut_files_are_named(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(b"\xff" + data if keep < 0 else data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        pictures.draw(folder, folder)


def test_command(folder, tmp_path, capsys):
    commands.main(["report", str(folder), "--pictures", str(tmp_path / "out")])
    assert capsys.readouterr().out == report.report(folder)
    assert len(list((tmp_path / "out").iterdir())) == 3
    (folder / "z.bits.json").write_text("{")
    with pytest.raises(SystemExit):
        commands.main(["report", str(folder)])
    assert "z.bits.json is damaged" in capsys.readouterr().err


def test_baselines_are_named_and_stand_beside_the_headline(folder):
    named = {"attention": "attention", "delta": "gated delta rule", "static": "memory never written"}
    for mixer in named:
        settings = experiment([1])
        settings["model"]["mixer"] = mixer
        write(folder, mixer, settings, rows=[row("memory", 4096, 1, 9)], bits={"reset": text_bits(0.95)}, speed=11)
    runs = {run.label: run for run in results.load(folder)}
    text = report.report(folder)
    for label in (f"{name}, 100 steps, seed 0" for name in named.values()):
        assert not runs[label].headline
        assert results.equal_steps(runs[label], runs.values()).label == "no memory, 100 steps, seed 0"
        assert section(text, f"Needles, seen in training (seen-0): {label}")[1:] == [
            ["4K", "45.0% (25.8 to 65.8), 72.5%"]
        ]
        assert label not in str(section(text, "Controls"))
    assert [run.headline for run in runs.values()] == [True, True] + [False] * 6
