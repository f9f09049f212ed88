"""The language model's commands, from a folder of text to measured numbers, and what they say to mistakes."""

import hashlib
import json
import re
from pydoc_data import topics

import numpy as np
import pytest
import torch
from processes import python
from sources import ROOT
from tiny_experiments import config

from examples.language_model import corpus
from examples.language_model.checkpoint import build
from examples.language_model.commands import main
from examples.language_model.settings import Experiment

PAGE, TINY = ROOT / "docs/start/language_model.md", ROOT / "examples/language_model/configs/tiny.toml"
CONFIG = config(layers=2, memories=[1], steps=4, length=1024)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of text, its corpus, an experiment, and a model trained on it."""
    root = tmp_path_factory.mktemp("books")
    names = [f"{i}.txt" for i in range(60)]
    heldout = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0]
    rng = np.random.default_rng(0)
    (root / "text").mkdir()
    for name in [*heldout[:2], *[name for name in names if name not in heldout][:3]]:
        words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 8))) for _ in range(600)]
        (root / "text" / name).write_text(" ".join(words))
    (root / "books.toml").write_text(CONFIG)
    main(["prepare", str(root / "text"), str(root / "corpus")])
    main(["train", str(root / "books.toml"), "--corpus", str(root / "corpus"), "--out", str(root / "run"),
          "--device", "cpu"])  # fmt: skip
    return root


def measured(books, tmp_path, *arguments):
    main([*arguments, "--model", str(books / "run"), "--corpus", str(books / "corpus"), "--out", str(tmp_path / "o"),
          "--device", "cpu"])  # fmt: skip
    return json.loads((tmp_path / "o").read_text())


def test_from_text_to_answers(books, tmp_path, capsys):
    results = measured(
        books, tmp_path, "needle", "--kinds", "near", "far", "--lengths", "1300", "--contexts", "3", "--readings", "2"
    )
    assert [(r["control"], r["kind"], r["readings"], r["answers"]) for r in results["rows"]] == [
        (control, "near", count, 15) for count in (1, 2) for control in ("memory", "another document's memory")
    ] + [("memory", "far", count, 15) for count in (1, 2)] + [("learning rate 0", "near", 1, 15)]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("memory, near, 1300 bytes, 1 readings: ")
    assert printed[-1] == str(tmp_path / "o")


def test_from_text_to_capacity(books, tmp_path):
    results = measured(books, tmp_path, "capacity", "--length", "1500", "--facts", "3", "10")
    assert [(r["facts"], r["answers"]) for r in results["rows"]] == [(3, 300), (10, 1000)]


def test_from_text_to_packed_conversations(books, tmp_path, capsys):
    results = measured(books, tmp_path, "conversations", "--number", "2", "--length", "200")
    for row in results["rows"]:
        (written,) = row["rows_written"]
        assert row["tables"] == 4 * 64 * 16
        assert 0 < written <= 1
        assert written * row["tables"] < row["packed"] < 1.1 * written * row["tables"] + 64 * 1024
    assert "2 of 2: packed to" in capsys.readouterr().out


def test_from_text_to_bits(books, tmp_path):
    results = measured(books, tmp_path, "bits", "--length", "2048")
    assert {mode: np.shape(x) for mode, x in results["bits"].items()} == dict.fromkeys(
        ("reset", "carried", "frozen"), (2, 2)
    )
    assert 6 < np.mean(results["bits"]["reset"]) < 9


def test_flags_stand_above_the_file_and_the_record_goes_on(books, tmp_path):
    flags = ["--steps", "3", "--seed", "2", "--facts", "0", "--no-compile", "--device", "cpu", "--seconds", "0"]
    for _ in range(3):
        main(["train", str(books / "books.toml"), "--corpus", str(books / "corpus"), "--out", str(tmp_path), *flags])
    training = json.loads((tmp_path / "experiment.json").read_text())["training"]
    assert (training["steps"], training["seed"], training["facts"], training["batch"]) == (3, 2, 0.0, 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "record.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_the_module_runs(tmp_path):
    module, corpus = ("-m", "examples.language_model"), tmp_path / "corpus"
    done = python(*module, "prepare", "docs", corpus, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    done = python(*module, "bits", "--model", "none", "--corpus", corpus, "--out", tmp_path / "o", cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: none has no experiment.json: train first")


TRAIN = "train {books}/books.toml --corpus {books}/corpus --out {new}/run"
MEASURE = "--model {books}/run --corpus {books}/corpus --out {new}/o"
NEEDLE = f"needle {MEASURE} --kinds near --lengths 1300 --contexts 2 --readings 1"
CAPACITY = f"capacity {MEASURE} --length 1500"
BITS = f"bits {MEASURE} --length 1024"
MISTAKES = {
    "topics into a file": ("topics {books}/books.toml", "books.toml"),
    "prepare nothing": ("prepare {new}/none {new}/corpus", "There is no {new}/none"),
    "prepare an empty folder": ("prepare {new} {new}/corpus", "holds no documents"),
    "prepare over other files": ("prepare {books}/text {books}/run", "holds other files than a corpus"),
    "prepare over a file": ("prepare {books}/text {books}/books.toml", "books.toml is a file"),
    "prepare below a file": ("prepare {books}/text {books}/books.toml/corpus", "books.toml"),
    "no corpus": (TRAIN.replace("{books}/corpus", "{new}/none"), "There is no {new}/none/"),
    "no experiment": (TRAIN.replace("books.toml", "none.toml"), "none.toml"),
    "a folder for an experiment": (TRAIN.replace("books.toml", "run"), "{books}/run"),
    "no TOML": (TRAIN.replace("books.toml", "run/record.jsonl"), "record.jsonl is not TOML"),
    "bytes for TOML": (TRAIN.replace("books.toml", "run/checkpoint.safetensors"), "safetensors is not TOML"),
    "negative steps": (TRAIN + " --steps -3", "training.steps must be an integer of at least 1. Received: -3"),
    "a negative seed": (TRAIN + " --seed -1", "training.seed must be"),
    "facts above 1": (TRAIN + " --facts 2", "training.facts must be"),
    "facts of NaN": (TRAIN + " --facts nan", "training.facts must be"),
    "another experiment": (TRAIN.replace("{new}", "{books}") + " --seed 9", "holds another experiment"),
    "out is a file": (TRAIN.replace("{new}/run", "{books}/books.toml"), "books.toml"),
    "out below a file": (TRAIN.replace("{new}/run", "{books}/books.toml/run"), "books.toml"),
    "no model": (NEEDLE.replace("{books}/run", "{new}/none"), "{new}/none has no experiment.json: train first"),
    "a file for a model": (NEEDLE.replace("{books}/run", "{books}/books.toml"), "train first"),
    "an unknown kind": (NEEDLE + " --kinds near new", "what is asked is one of near, far, "),
    "no contexts": (NEEDLE + " --contexts 0", "contexts=0"),
    "no readings": (NEEDLE + " --readings 0", "readings=0"),
    "a length for no needle": (NEEDLE + " --lengths 100", "length must be at least"),
    "a negative length": (NEEDLE + " --lengths -5", "length=-5"),
    "a length beyond the documents": (NEEDLE + " --lengths 100000", "No document is long enough"),
    "capacity in a folder": (CAPACITY.replace("{new}/o", "{new}"), "is a folder"),
    "capacity for too many facts": (CAPACITY + " --facts 900", "for 900 statements"),
    "capacity for no facts": (CAPACITY + " --facts 0", "facts=0"),
    "conversations of too few documents": (f"conversations {MEASURE} --number 9", "do. Received: number=9"),
    "no conversations": (f"conversations {MEASURE} --number 0", "number=0"),
    "answers in a folder": (NEEDLE.replace("{new}/o", "{new}"), "is a folder"),
    "bits for no model": (BITS.replace("{books}/run", "{new}/none"), "{new}/none has no experiment.json"),
    "bits of nothing": (BITS + " --length 0", "length must be a multiple of 1,024"),
    "bits of an odd length": (BITS + " --length 1500", "length must be a multiple of 1,024"),
    "bits beyond the documents": (BITS + " --length 102400", "no held-out document has more than 102400"),
    "bits in a folder": (BITS.replace("{new}/o", "{new}"), "is a folder"),
}


@pytest.mark.parametrize(("command", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(books, tmp_path, capsys, command, said):
    places = {"books": books, "new": tmp_path}
    before = {path.name: path.stat().st_mtime_ns for path in (books / "run").iterdir()}
    with pytest.raises(SystemExit) as ended:
        main([word.format(**places) for word in command.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert said.format(**places) in error
    assert before == {path.name: path.stat().st_mtime_ns for path in (books / "run").iterdir()}
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("command", [f"{BITS} --device moon", f"{TRAIN} --device cuda:77", "sing", "", f"{TRAIN} --st"])
def test_what_the_parser_refuses(books, tmp_path, capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([word.format(books=books, new=tmp_path) for word in command.split()])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_topics_of_help_are_texts(tmp_path):
    """Every topic is a document of one side, and none that is held out has a sentence that training reads."""
    main(["topics", str(tmp_path / "texts")])
    main(["prepare", str(tmp_path / "texts"), str(tmp_path / "corpus")])
    texts = corpus.load(tmp_path / "corpus")
    assert sorted(texts.train.names + texts.heldout.names) == sorted(topics.topics)
    assert texts.heldout.names == ("debugger", "formatstrings", "string-methods")
    read = texts.train.data.tobytes()
    for i, name in enumerate(texts.heldout.names):
        document = texts.heldout.document(i).tobytes()
        assert document == topics.topics[name].encode()
        assert len(document) > 16384
        assert not [x for x in document.split(b".\n") if len(x) > 80 and x in read]


def test_the_taste_in_two_minutes(tmp_path, monkeypatch, capsys):
    """Of three seeds the worst, 1, took 6.3% fewer bits, this one, 0, 7.1%; never written it takes more."""
    taste = PAGE.read_text(encoding="utf-8").split("```")[1]
    function, configs, *lines = taste.strip().splitlines()
    assert function == 'lm() { .venv/bin/python -m examples.language_model "$@"; }'
    assert configs == "C=examples/language_model/configs"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        program, *arguments = line.replace("$C", "examples/language_model/configs").split()
        assert program == "lm"
        capsys.readouterr()
        main(arguments)
    found = re.search(r"At equal steps: ([0-9.]+)% \(.*\) fewer bits per byte with the memory", capsys.readouterr().out)
    assert float(found[1]) > 4
    bits = {mode: np.mean(x) for mode, x in json.loads((tmp_path / "runs/tiny.bits.json").read_text())["bits"].items()}
    assert bits["reset"] < 3.0
    assert bits["reset"] < bits["frozen"] - 0.2


def test_the_models_of_the_taste_have_as_many_active_parameters():
    written, plain = (Experiment.read(TINY.with_name(f"{name}.toml")) for name in ("tiny", "tiny-plain"))
    assert written.training == plain.training
    sizes = [sum(p.numel() for p in build(x, torch.device("cpu")).parameters()) for x in (written, plain)]
    assert sizes[0] <= sizes[1] < 1.01 * sizes[0]
