"""The language model's report: its tables hold the numbers of the files, and its pictures are drawn."""

import json
import struct

import numpy as np
import pytest

from examples.language_model import commands, comparing, needle, pictures, report, results

LENGTHS = (4096, 131072)
DOCUMENTS = ["a", "b", "c", "d"]
WRITERS = ["Ann", "Ann", "Bo", "Cy"]
MEMORY, PLAIN, DELTA = {"memories": [1]}, {"memories": []}, {"memories": [1], "mixer": "delta"}


def experiment(model, **training):
    training = {"steps": 100, "batch": 2, "length": 512, "seed": 0, "facts": 0.1, **training}
    return {"model": model, "training": training}


def answers(right, contexts=20, facts=5):
    """``right`` contexts are answered exactly; of the others each answer has three digits right."""
    digits = np.repeat([6, 3], [right, contexts - right])[:, None].repeat(facts, 1)
    depth = (np.arange(contexts * facts) + 0.5).reshape(contexts, facts) / (contexts * facts)
    return {
        "answers": digits.size, "exact": right / contexts, "exact_interval": needle.wilson(right, contexts),
        "digits": digits.mean() / 6, "depth": depth.tolist(), "right": digits.tolist(),
    }  # fmt: skip


def row(control, length, readings, right, kind="near"):
    return {"control": control, "kind": kind, "length": length, "readings": readings, **answers(right)}


def write(
    folder,
    name,
    settings,
    *,
    rows=None,
    more=None,
    facts=None,
    names=None,
    bits=None,
    speed=None,
    first=0.1,
    turned=False,
):
    about = {"corpus": "c0ffee", "device": "a device", "experiment": settings}
    for kind, found in (("needle", rows), ("needle-more", more)):
        if found is not None:
            (folder / f"{name}.{kind}.json").write_text(json.dumps({**about, "rows": found}))
    if facts is not None:
        found = [{"facts": n, "length": 131072, **answers(right, facts=n)} for n, right in facts.items()]
        data = {**about, "state_bytes": 537_000_000, "rows": found}
        (folder / f"{name}.capacity.json").write_text(json.dumps(data))
    if names is not None:
        (folder / f"{name}.names.json").write_text(json.dumps({**about, **names}))
    if bits is not None:
        order = slice(None, None, -1 if turned else 1)
        data = {**about, "documents": DOCUMENTS[order], "writers": WRITERS[order], "bin": 1024}
        data["bits"] = {mode: found[order] for mode, found in bits.items()}
        (folder / f"{name}.bits.json").write_text(json.dumps(data))
    if speed is not None:
        steps = settings["training"]["steps"]
        lines = [
            {"step": s, "digits_right": s / steps / 2, "first_right": first * s / steps, "steps_per_second": speed * f}
            | {"device": "a device", "side_by_side": 1}
            for s, f in ((steps // 4, 0.1), (steps // 2, 1), (steps, 1))
        ]
        (folder / f"{name}.record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


NAMES = ["Wickham", "Étretat", "31,415"]


def names_of(**right):
    """Of documents a, b and d, one question each; how many bytes at the end are right."""
    questions = [[i, 9000, name, 5000] for i, name in zip((0, 1, 3), NAMES)]
    return {"length": 8192, "documents": DOCUMENTS, "writers": WRITERS, "questions": questions, "right": right}


def text_bits(factor, bins=8):
    """Of documents that differ more than models do."""
    return (factor * np.outer([1.0, 1.5, 2.0, 2.5], np.linspace(1.2, 0.8, bins))).tolist()


@pytest.fixture
def folder(tmp_path):
    """A memory of two seeds; no memory at equal steps, of two seeds, and at equal time; a delta rule."""
    for seed in (0, 4):
        rows = [row("memory", length, n, 15 + n - seed * (n - 1)) for length in LENGTHS for n in (1, 2)]
        rows += [row("another document's memory", length, n, n - 1) for length in LENGTHS for n in (1, 2)]
        rows += [row("learning rate 0", length, 1, 0) for length in LENGTHS]
        more = [row("memory", 4096, 1, 10 - seed, "far"), row("memory", 4096, 1, 5, "held out: noun")]
        more += [row("memory", 4096, 1, 9 + seed, "held out: link")]
        bits = {"reset": text_bits(0.9 + seed / 100), "carried": text_bits(0.96), "frozen": text_bits(1.1)}
        write(
            tmp_path, f"x{seed}", experiment(MEMORY, seed=seed), rows=rows, more=more, bits=bits, speed=10,
            first=0.9, facts={5: 20 - seed, 50: 10},
            names=names_of(carried=[7, 8, 6 - seed], reset=[5, 0, 0], frozen=[0, 0, 0]),
        )  # fmt: skip
    for seed, factor in ((0, 1.0), (1, 1.1)):
        rows = [row("no memory", 4096, 1, seed)]
        bits = {"no memory": text_bits(factor)}
        write(
            tmp_path,
            f"z{seed}",
            experiment(PLAIN, seed=seed),
            rows=rows,
            bits=bits,
            speed=16,
            facts={5: 0},
            names=names_of(**{"no memory": [0, 0, 4]}),
        )
    longer = {"no memory": text_bits(0.8)}
    write(tmp_path, "long", experiment(PLAIN, steps=160), bits=longer, speed=16, turned=True)
    write(tmp_path, "far", experiment(PLAIN, steps=300), bits={"no memory": text_bits(0.5)}, speed=16)
    rows, bits = [row("memory", 4096, 1, 6)], {"reset": text_bits(0.95), "carried": text_bits(0.95)}
    write(tmp_path, "d", experiment(DELTA), rows=rows, bits=bits, speed=5)
    return tmp_path


def section(text, title):
    """The rows of the table below this heading, as lists of cells; of the head too."""
    parts = [part for part in text.split("### ") if part.startswith(f"{title}\n")]
    assert len(parts) == 1, [part.splitlines()[0] for part in text.split("### ")[1:]]
    lines = [line for line in parts[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def test_needles_begin_with_the_worst_of_every_cell(folder):
    text = report.report(folder)
    head, *rows = section(text, "Needles near")
    assert head == ["seed", "context (bytes)", "1 reading", "2 readings"]
    # All facts of a context are right, or none: 20 contexts are worth 19 answers (variances are of n - 1),
    # and not 100.
    # (0.8 + 0.1011) / 1.2022 ± 1.6304 * sqrt(0.16 / 19 + 0.9604 / 19²)
    assert rows[0] == ["**worst of 2**", "4K", "80.0% (57.8 to 92.1), seed 0", "65.0% (42.8 to 82.2), seed 4"]
    assert [r[:2] for r in rows[1:]] == [
        ["**worst of 2**", "128K"],
        ["0", "4K"],
        ["0", "128K"],
        ["4", "4K"],
        ["4", "128K"],
    ]
    assert [r[3].split()[0] for r in rows[2:]] == ["85.0%", "85.0%", "65.0%", "65.0%"]
    assert "answers at least 65.0% (42.8 to 82.2) exactly; the fewest seed 4 in 4K after reading 2." in text


def test_changes_are_paired_over_contexts(folder):
    head, *rows = section(text := report.report(folder), "Needles near: what reading on changes")
    assert head[2:] == ["2 readings less the first"]
    # Seed 4: 3 of 20 contexts lose all; t of 19 is 2.093, the deviation sqrt(0.15 * 0.85 * 20 / 19).
    half = 100 * 2.093 * np.sqrt(0.15 * 0.85 / 19)
    assert rows[-1][2] == f"-15.0 ({-15 - half:+.1f} to {-15 + half:+.1f})"
    assert rows[2][2].startswith("+5.0 (-5.5 to +15.5)")
    assert rows[0][2] == f"{rows[-1][2]}, seed 4"
    assert "Wholly below -3 points: 0 of 4." in text
    path = folder / "x4.needle.json"
    data = json.loads(path.read_text())
    data["rows"][1] |= answers(2)
    path.write_text(json.dumps(data))
    assert "Wholly below -3 points: 1 of 4." in report.report(folder)


def test_independent_answers_have_wilsons_interval():
    exact = np.array([[True, False], [False, True]] * 50)
    assert comparing.share(exact)[:3] == pytest.approx((0.5, *needle.wilson(100, 200)))
    assert comparing.share(np.ones((40, 5), bool))[:3] == pytest.approx((1, *needle.wilson(200, 200)))


def test_other_sentences_and_held_out_words(folder):
    text = report.report(folder)
    head, worst, *rows = section(text, "Needles in other sentences")
    assert head == ["seed", "context (bytes)", "far"]
    assert worst[2].startswith("30.0% (")
    assert worst[2].endswith("), seed 4")
    assert [r[2].split()[0] for r in rows] == ["50.0%", "30.0%"]
    head, worst, *rows = section(text, "Needles in held-out words")
    assert head == ["seed", "context (bytes)", "all together", "noun", "link"]
    assert [[cell.split()[0] for cell in r] for r in rows] == [
        ["0", "4K", "35.0%", "25.0%", "45.0%"], ["4", "4K", "45.0%", "25.0%", "65.0%"],
    ]  # fmt: skip
    assert worst[2] == "35.0% (22.0 to 50.7), seed 0"  # 40 contexts, worth 39


def test_controls_are_at_their_highest(folder):
    head, *rows = section(report.report(folder), "Controls")
    assert head == ["control", "model", "seeds", "4K", "128K"]
    assert [[*r[:3], *(cell.split(" ")[0] for cell in r[3:])] for r in rows] == [
        ["another document's memory", "memory", "0, 4", "5.0%", "5.0%"],
        ["learning rate 0", "memory", "0, 4", "0.0%", "0.0%"],
        ["no memory", "no memory", "0, 1", "5.0%", "-"],
    ]  # fmt: skip
    assert rows[2][3].endswith("seed 1")


def test_capacity(folder):
    text = report.report(folder)
    head, worst, *rows = section(text, "Capacity")
    assert head == ["seed", "context (bytes)", "5 facts", "50 facts"]
    assert "State of one sequence: 537 MB." in text
    assert worst[2].startswith("80.0%")
    assert [r[3].split()[0] for r in rows] == ["50.0%", "50.0%"]
    _, *rows = section(text, "Capacity of other models")
    assert [r[:3] for r in rows] == [[f"no memory, 100 steps, seed {i}", "537 MB", "128K"] for i in (0, 1)]


def test_names(folder):
    text = report.report(folder)
    head, *rows = section(text, "Names of books")
    assert head == ["seed", "given", "carried", "reset", "frozen"]
    # Ann's two are right, and of seed 0 Cy's; after two bytes Wickham needs five. t of one degree is 12.706.
    assert rows[0][2] == "50.0% (-585.3 to 685.3), seed 4"
    assert [[cell.split()[0] for cell in r] for r in rows[2:]] == [
        ["0", "the", "100.0%", "0.0%", "0.0%"], ["0", "2", "100.0%", "25.0%", "0.0%"],
        ["4", "the", "50.0%", "0.0%", "0.0%"], ["4", "2", "50.0%", "25.0%", "0.0%"],
    ]  # fmt: skip
    head, worst, *rows = section(text, "Names of books: what reading adds")
    assert head[2:] == ["carried less reset", "carried less frozen"]
    assert [[cell.split()[0] for cell in r[2:]] for r in rows[1:]] == [
        ["+100.0", "+100.0"], ["+75.0", "+100.0"], ["+50.0", "+50.0"], ["+25.0", "+50.0"],
    ]  # fmt: skip
    assert worst[2].endswith("seed 4")
    _, *rows = section(text, "Names of books, other models")
    assert [[*r[:2], *(cell.split()[0] for cell in r[2:])] for r in rows] == [
        [f"no memory, 100 steps, seed {i}", "no memory", "0.0%", "50.0%"] for i in (0, 1)
    ]


def test_bits_are_means_over_writers(folder):
    head, *rows = section(report.report(folder), "Bits per byte by position")
    assert head[2:] == ["whole", "0 to 1K", "1K to 4K", "4K to 8K"]
    # Of Ann, Bo and Cy 1.25, 2 and 2.5; positions fall in a line from 1.2 to 0.8.
    mean = (1.25 + 2 + 2.5) / 3
    bins = np.linspace(1.2, 0.8, 8)
    plain = next(r for r in rows if r[0] == "no memory, 100 steps, seed 0")
    assert plain[1:] == ["-", *(f"{mean * x:.4f}" for x in (1, 1.2, bins[1:4].mean(), bins[4:].mean()))]
    own = [r[1:3] for r in rows if r[0] == "memory, 100 steps, seed 4"]
    assert own == [[mode, f"{mean * x:.4f}"] for mode, x in (("reset", 0.94), ("carried", 0.96), ("frozen", 1.1))]


@pytest.mark.parametrize(
    ("how", "against", "time", "shares", "short"),
    [
        ("equal steps", "no memory, 100 steps, seed 0", 0.62, (-6.0, -4.0, 10.0, -8.0), "6.0% (6.0 to 6.0) fewer"),
        ("equal time", "no memory, 160 steps, seed 0", 1.0, (17.5, 20.0, 37.5, 15.0), "17.5% (17.5 to 17.5) more"),
    ],
)
def test_differences_pair_documents_by_name(folder, how, against, time, shares, short):
    """The base is the best seed of the steps; a factor is alike for all writers, so the interval has no width."""
    text = report.report(folder)
    _, *rows = section(text, f"Bits per byte against no memory, {how}")
    cells = {(r[0], r[1]): r[2:] for r in rows}
    worst = zip(("reset", "carried", "frozen"), shares[:3], (4, 0, 0))
    for mode, share, seed in worst:
        assert set(cells["**worst of 2**", mode]) == {f"{share:+.1f} ({share:+.1f} to {share:+.1f}), seed {seed}"}
    assert {cell.split(" ")[0] for cell in cells["mean of 2", "reset"]} == {f"{shares[3]:+.1f}"}
    part = next(part for part in text.split("### ") if part.startswith(f"Bits per byte against no memory, {how}"))
    assert f"more or less than {against}, " in part
    assert f"took {time:.2f} of the memory's time. Means over 3 writers of 4 documents" in part
    assert f"- At {how}: {short} bits per byte with the memory than without; of seeds 0, 4 the worst, 4," in text


def test_a_document_of_no_known_writer_is_its_own(folder):
    for path in folder.glob("*.bits.json"):
        data = json.loads(path.read_text())
        del data["writers"]
        path.write_text(json.dumps(data))
    text = report.report(folder)
    assert "Means over 4 writers of 4 documents" in text
    assert section(text, "Bits per byte by position")[1][2] == f"{0.9 * 1.75:.4f}"


def test_other_models(folder):
    text = report.report(folder)
    head, *rows = section(text, "Other models, equal steps")
    assert head == [
        "model", "seed", "time", "steps/s", "near, 4K", "near, 128K", "facts", "state", "bits per byte",
        "memory against it",
    ]  # fmt: skip
    assert [r[:4] for r in rows] == [
        ["memory, 100 steps", "0", "1.00", "10.0"], ["memory, 100 steps", "4", "1.00", "10.0"],
        ["Gated DeltaNet, 100 steps", "0", "2.00", "5.0"],
        ["no memory, 100 steps", "0", "0.62", "16.0"], ["no memory, 100 steps", "1", "0.62", "16.0"],
    ]  # fmt: skip
    assert [r[6] for r in rows] == ["25 of 50", "25 of 50", "-", "0 of 5", "0 of 5"]
    assert rows[2][4].startswith("30.0%")
    assert [r[9] for r in rows[2:4]] == ["-1.1 (-1.1 to -1.1), seed 4", "-6.0 (-6.0 to -6.0), seed 4"]
    _, *rows = section(text, "Other models, equal time")
    assert [r[0] for r in rows[2:]] == ["no memory, 160 steps"]  # the delta rule took twice the time


def test_training(folder):
    _, *rows = section(report.report(folder), "Training")
    assert [r[:8] for r in rows] == [
        ["memory", "0", "100", "10.0", "10,200", "10", "0.62", "25"],
        ["memory", "4", "100", "10.0", "10,200", "10", "0.62", "25"],
        ["Gated DeltaNet", "0", "100", "5.0", "5,120", "20", "0.31", "-"],
        ["no memory", "0", "100", "16.0", "16,400", "6", "1.00", "-"],
        ["no memory", "1", "100", "16.0", "16,400", "6", "1.00", "-"],
        ["no memory", "0", "160", "16.0", "16,400", "10", "1.00", "-"],
        ["no memory", "0", "300", "16.0", "16,400", "19", "1.00", "-"],
    ]  # fmt: skip


def test_times_of_trainings_that_shared_a_device_are_not_compared(folder):
    path = folder / "x0.record.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x | {"side_by_side": 2, "steps_per_second": 4.0}) + "\n" for x in lines))
    text = report.report(folder)
    _, *rows = section(text, "Other models, equal steps")
    assert [r[:4] for r in rows[:3]] == [
        ["memory, 100 steps", "0", "-", "-"], ["memory, 100 steps", "4", "1.00", "10.0"],
        ["Gated DeltaNet, 100 steps", "0", "2.00", "5.0"],
    ]  # fmt: skip
    _, *rows = section(text, "Training")
    assert [r[6] for r in rows[:2]] == ["-", "0.62"]
    assert [r[-1] for r in rows[:2]] == ["a device, 2 side by side", "a device"]


def test_record_of_a_run_that_went_on(folder):
    path = folder / "x0.record.jsonl"
    first, *_ = path.read_text().splitlines()
    again = {"step": 20, "digits_right": 0.25, "first_right": 0.5, "steps_per_second": 5, "device": "a device"}
    again["side_by_side"] = 1
    path.write_text(f"{first}\n{json.dumps(again)}\n")  # the line of step 25 was of steps taken again
    _, *rows = section(report.report(folder), "Training")
    assert rows[0][2:8] == ["20 of 100", "5.0", "5,120", "4", "0.31", "20"]


def test_pictures(folder, tmp_path):
    out = tmp_path / "a" / "b"
    paths = pictures.draw(folder, out)
    assert sorted(out.iterdir()) == sorted(paths)
    assert {p.name for p in paths} == {"needle.png", "capacity.png", "bits.png", "training.png"}
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20]) == (1260,)
        assert 10_000 < len(data) < 200_000


def test_a_map_of_every_seed_and_reading(folder):
    figure = pictures.needle(results.load(folder))
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps[:2]] == ["seed 0", "seed 4"]
    # Twenty contexts in five bands of depth: of seed 4 the first 13 are right after the second reading.
    assert [axes.images[0].get_array()[:, 0].tolist() for axes in maps] == [
        [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0.25], [1, 1, 1, 0.25, 0],
    ]  # fmt: skip


def test_lines_of_every_seed(folder):
    runs = results.load(folder)
    for figure, lines in ((pictures.capacity(runs), 4), (pictures.bits(runs), 6), (pictures.training(runs), 0)):
        if lines:
            assert len(figure.axes[0].lines) == lines
    right = pictures.bits(runs).axes[1]
    assert [line.get_ydata()[0].round(1) for line in right.lines] == [-10, -6, 10, 10, 0, -20]


def test_what_is_missing_is_left_out(tmp_path):
    write(tmp_path, "only", experiment(MEMORY), rows=[row("memory", 4096, 1, 20)])
    write(tmp_path, "unknown", experiment(PLAIN), speed=1)
    text = report.report(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("###")] == ["### In short", "### Needles near"]
    assert [p.name for p in pictures.draw(tmp_path, tmp_path)] == ["needle.png"]
    (tmp_path / "only.needle.json").unlink()
    with pytest.raises(FileNotFoundError, match="measure first"):
        report.report(tmp_path)


def test_equal_models_are_told_apart_by_name(tmp_path):
    for name in ("p", "q"):
        write(tmp_path, name, experiment(MEMORY), rows=[row("memory", 4096, 1, 20)])
    assert [r.seed for r in results.load(tmp_path)] == ["0 (p)", "0 (q)"]


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
    "another memory": ("x4.needle.json", lambda d: changed(d, 64, "experiment", "model", "width")),
    "another corpus": ("z0.bits.json", lambda d: changed(d, "tea", "corpus")),
    "other bins": ("z0.bits.json", lambda d: changed(d, 512, "bin")),
    "unknown settings": ("x0.bits.json", lambda d: changed(d, 1, "experiment", "training", "colour")),
    "a share that its answers do not give": ("x0.needle.json", lambda d: changed(d, 0.1, "rows", 0, "exact")),
    "digits that its answers do not give": ("x0.needle.json", lambda d: changed(d, 0.1, "rows", 0, "digits")),
    "a word for a share": ("x0.needle.json", lambda d: changed(d, "all", "rows", 0, "digits")),
    "a word for a count": ("x0.needle.json", lambda d: changed(d, "two", "rows", 0, "readings")),
    "a word for a depth": ("x0.needle.json", lambda d: changed(d, "deep", "rows", 0, "depth", 0, 0)),
    "seven digits of six": ("x0.needle.json", lambda d: changed(d, 7, "rows", 0, "right", 0, 0)),
    "fewer depths": ("x0.needle.json", lambda d: d["rows"][0]["depth"].pop()),
    "fewer answers": ("x0.needle.json", lambda d: d["rows"][0]["right"][0].pop()),
    "the same twice": ("x0.needle-more.json", lambda d: d["rows"].append(d["rows"][0])),
    "other facts": ("x0.capacity.json", lambda d: changed(d, 6, "rows", 0, "facts")),
    "a name of no document": ("x0.names.json", lambda d: changed(d, 4, "questions", 0, 0)),
    "fewer answers to names": ("x0.names.json", lambda d: d["right"]["carried"].pop()),
    "more bytes than a name has": ("x0.names.json", lambda d: changed(d, 8, "right", "carried", 0)),
    "fewer writers of names": ("x0.names.json", lambda d: d["writers"].pop()),
    "no state": ("x0.capacity.json", without("state_bytes")),
    "fewer documents": ("z0.bits.json", lambda d: d["bits"]["no memory"].pop()),
    "fewer writers": ("z0.bits.json", lambda d: d["writers"].pop()),
    "a ragged table": ("z0.bits.json", lambda d: d["bits"]["no memory"][0].pop()),
    "not a number": ("z0.bits.json", lambda d: changed(d, float("nan"), "bits", "no memory", 0, 0)),
    "a memory that the model lacks": ("z0.bits.json", lambda d: changed(d, {"reset": text_bits(1)}, "bits")),
    "a document twice": ("z0.bits.json", lambda d: changed(d, "b", "documents", 0)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(folder, damage):
    name, change = DAMAGE[damage]
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    settled = damage in ("another experiment", "another memory", "another corpus", "other bins")
    with pytest.raises(ValueError, match=r"\.json is of another" if settled else f"{name} is damaged"):
        report.report(folder)


@pytest.mark.parametrize(("field", "value"), [("step", "9"), ("steps_per_second", None), ("digits_right", "all")])
def test_a_line_of_a_record_that_is_no_line(folder, field, value):
    path = folder / "z0.record.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, field: value}) for line in lines))
    with pytest.raises(ValueError, match=r"z0\.record\.jsonl is damaged, or of another version"):
        report.report(folder)


@pytest.mark.parametrize("name", ["x0.needle.json", "x0.capacity.json", "x0.bits.json", "z0.record.jsonl"])
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_cut_files_are_named(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(b"\xff" + data if keep < 0 else data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        pictures.draw(folder, folder)


def test_models_of_no_common_document_are_named(folder):
    path = folder / "x0.bits.json"
    path.write_text(path.read_text().replace(json.dumps(DOCUMENTS), json.dumps(["e", "f", "g", "h"])))
    with pytest.raises(ValueError, match="no document was measured with both memory, 100 steps, seed 0 and no memory"):
        report.report(folder)


def test_command(folder, tmp_path, capsys):
    commands.main(["report", str(folder), "--pictures", str(tmp_path / "out")])
    assert capsys.readouterr().out == report.report(folder)
    assert len(list((tmp_path / "out").iterdir())) == 4
    path = folder / "z0.bits.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    commands.main(["report", str(folder)])
    assert capsys.readouterr().out == report.report(folder)
    for text in ("{", 100_000 * "["):
        path.write_text(text)
        with pytest.raises(SystemExit):
            commands.main(["report", str(folder)])
        assert "z0.bits.json is damaged" in capsys.readouterr().err
