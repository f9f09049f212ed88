"""The language model's command ``run``: it trains and measures each seed once, and one that fails spoils no other."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sources import ROOT
from tiny_experiments import config

from examples.language_model import checkpoint, needle, results, run, side_by_side, training
from examples.language_model.commands import main
from examples.language_model.corpus import Corpus, Texts
from examples.language_model.settings import Experiment

CPU = torch.device("cpu")
CONFIG = config(layers=1, memories=[0], steps=3, length=896)
FILES = ("bits.json", "capacity.json", "needle.json", "record.jsonl", "run.json")


def text(seed):
    words = np.random.default_rng(seed).choice(["fish", "over", "the", "hill", "a", "green", "stone"], 900)
    return " ".join(words)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A corpus, an experiment, and what ``run`` made of two seeds, of which one could only fail."""
    root = tmp_path_factory.mktemp("run")
    (root / "text").mkdir()
    for i in range(4):
        (root / "text" / f"{i}{'-heldout' * (i == 3)}.jsonl").write_text(
            "".join(json.dumps({"id": f"{i}-{j}", "text": text(10 * i + j)}) + "\n" for j in range(2))
        )
    main(["prepare", str(root / "text"), str(root / "corpus")])
    (root / "small.toml").write_text(CONFIG)
    other = Experiment.read(root / "small.toml", seed=8)
    checkpoint.claim(root / "out" / "small-1", other)
    with pytest.raises(SystemExit) as ended:
        main(arguments(root, seeds=(0, 1)))
    assert ended.value.code == 2
    return root


def arguments(root, *more, seeds=(0,), out="out", contexts=2):
    told = ["--corpus", str(root / "corpus"), "--out", str(root / out), "--seeds", *map(str, seeds)]
    asked = ["--kinds", "near", "--lengths", "1024", "--contexts", str(contexts), "--readings", "1"]
    measures = ["--measures", "bits", "needle", "capacity", "--length", "2048", "--facts", "2"]
    return ["run", str(root / "small.toml"), *told, *asked, *measures, *more]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_seed_that_fails_says_why_and_the_others_finish(books):
    made = {path.name for path in (books / "out").iterdir()}
    assert made == {"small-0", "small-1", *(f"small-0.{kind}" for kind in FILES)}
    assert "holds another experiment" in (books / "out/small-1/log.txt").read_text()
    said = json.loads((books / "out/small-0.run.json").read_text())
    assert said["training"].keys() == {"steps", "seconds", "steps_per_second", "device", "side_by_side"}
    assert said["training"]["steps"] == 3
    assert said["training"]["seconds"] == pytest.approx(3 / said["training"]["steps_per_second"], rel=0.02, abs=0.06)
    assert said["versions"]["torch"] == torch.__version__
    assert said["measured"].keys() == {"bits", "capacity", "needle"}
    own = Experiment.read(books / "small.toml", seed=0)
    for kind in ("bits", "capacity", "needle"):
        measured = json.loads((books / f"out/small-0.{kind}.json").read_text())
        assert Experiment.of(measured["experiment"], kind) == own
    assert np.shape(json.loads((books / "out/small-0.bits.json").read_text())["bits"]["reset"]) == (2, 2)
    assert results.record((books / "out/small-0.record.jsonl").read_text())[-1]["step"] == 3


def test_what_is_done_is_kept_and_what_is_missing_is_measured(books, monkeypatch):
    before = contents(books / "out")
    monkeypatch.setattr(training, "train", None)
    main(arguments(books))
    assert contents(books / "out") == before
    (books / "out/small-0.bits.json").unlink()
    monkeypatch.setitem(run.MEASURES, "needle", None)
    main(arguments(books))
    after = contents(books / "out")
    assert {name for name in before if after[name] != before[name]} <= {"small-0.run.json"}


def test_a_run_that_was_stopped_goes_on(books, monkeypatch):
    take = training.Trainer.take

    def stopped(trainer, batch):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        return take(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "take", stopped)
        with pytest.raises(SystemExit) as ended:
            main(arguments(books, out="stopped"))
    assert ended.value.code == 130
    assert not list((books / "stopped").glob("*.json"))
    main(arguments(books, out="stopped"))
    weights = [load_file(books / out / "small-0/weights-0.safetensors") for out in ("out", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    for kind in ("bits", "needle"):
        found, expected = (json.loads((books / out / f"small-0.{kind}.json").read_text()) for out in ("stopped", "out"))
        assert found["experiment"] == expected["experiment"]


def mistakes(books):
    yield arguments(books, contexts=3), "small-0.bits.json was measured otherwise"
    yield [*arguments(books), "--side-by-side", "0"], "--side-by-side must be at least 1. Received: 0"
    yield arguments(books, seeds=(2, 2)), "experiments and seeds must differ"
    yield arguments(books, seeds=(-1,)), "training.seed must be"
    yield arguments(books, "--steps", "0"), "training.steps must be"


def test_mistakes_are_said_before_anything_runs(books, capsys):
    for line, said in mistakes(books):
        before = contents(books / "out")
        with pytest.raises(SystemExit) as ended:
            main(line)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
        assert contents(books / "out") == before


def test_results_of_another_experiment_or_corpus_are_refused(books):
    (job,) = run.plan([books / "small.toml"], [0], None)
    asked = run.Asked(2048, needle.chosen(["near"], [1024], 2, 1), [2])
    corpus = Corpus(None, None, json.loads((books / "out/small-0.run.json").read_text())["corpus"])
    assert run.check(job, corpus, books / "out", ["bits", "needle"], asked) == []
    other = job._replace(experiment=Experiment.read(books / "small.toml", facts=0.1))
    for wrong, read in ((other, corpus), (job, corpus._replace(sha256="other"))):
        with pytest.raises(ValueError, match=r"small-0\.run\.json is of another experiment or corpus"):
            run.check(wrong, read, books / "out", ["bits"], asked)


@pytest.mark.parametrize("text", ["", "[]", '{"digest": 3}'])
def test_a_damaged_file_of_a_run_is_named(tmp_path, text):
    (job,) = run.plan([ROOT / "examples/language_model/configs/tiny.toml"], [0], None)
    (tmp_path / "tiny-0.run.json").write_text(text)
    with pytest.raises(ValueError, match=r"tiny-0\.run\.json is damaged"):
        run.about(job, tmp_path)


def test_steps_stand_in_the_name():
    configs = [ROOT / f"examples/language_model/configs/{name}.toml" for name in ("memory", "plain")]
    jobs = run.plan(configs, [0, 7], None)
    assert [job.name for job in jobs] == ["memory-0", "memory-7", "plain-0", "plain-7"]
    (job,) = run.plan(configs[1:], [3], 11_500)
    assert (job.name, job.experiment.training.steps, job.seed) == ("plain-11500-3", 11_500, 3)


# Processes


def jobs(number):
    return run.plan([ROOT / "examples/language_model/configs/tiny.toml"], list(range(number)), None)


def started(script, began, out):
    """Processes that run a script instead of the command; ``began`` learns their cards."""

    def start(job, folder, arguments, card):
        (out / job.name).mkdir()
        with (out / job.name / side_by_side.LOG).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(job.seed)], stdout=log, stderr=log, start_new_session=True
            )
        began.append((job.seed, card, time.monotonic()))
        return side_by_side._Running(job, process, card, time.monotonic())

    return start


def test_each_card_takes_the_next_job_when_it_is_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "cards", lambda: ["4", "5"])
    began = []
    slow = "import sys, time; time.sleep(3 * (sys.argv[1] == '0')); sys.exit('no luck' if sys.argv[1] == '2' else 0)"
    monkeypatch.setattr(side_by_side, "_start", started(slow, began, tmp_path))
    with pytest.raises(ValueError, match=re.escape("1 of 5 failed: tiny-2.")):
        side_by_side.run_all(jobs(5), tmp_path, [], 1)
    assert [seed for seed, _, _ in began] == [0, 1, 2, 3, 4]
    assert [card for _, card, _ in began] == ["4", "5", "5", "5", "5"]  # the first keeps its card
    said = capsys.readouterr().out
    assert "tiny-2: failed: no luck" in said
    assert "tiny-3: done in" in said


def test_ctrl_c_reaches_every_process_once_and_starts_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "cards", lambda: [""])
    waits = """
import signal, time
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(print("told", flush=True)))
print("ready", flush=True)
while not told:
    time.sleep(0.05)
time.sleep(0.5)
"""
    began = []
    monkeypatch.setattr(side_by_side, "_start", started(waits, began, tmp_path))
    logs = [tmp_path / f"tiny-{seed}" / side_by_side.LOG for seed in (0, 1)]
    pause, sent = time.sleep, []

    def interrupting(seconds):
        pause(seconds)
        if not sent and len(began) == 2 and all("ready" in log.read_text() for log in logs):
            sent.append(signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(side_by_side.time, "sleep", interrupting)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        side_by_side.run_all(jobs(3), tmp_path, [], 2)
    assert [log.read_text().split() for log in logs] == [["ready", "told"]] * 2
    assert len(began) == 2


def test_nothing_runs_on_when_the_command_ends_badly(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "cards", lambda: [""])
    began, processes = [], []
    start = started("import time; time.sleep(60)", began, tmp_path)

    def first(job, *rest):
        if job.seed:
            raise OSError("no room")
        processes.append((one := start(job, *rest)).process)
        return one

    monkeypatch.setattr(side_by_side, "_start", first)
    with pytest.raises(OSError, match="no room"):
        side_by_side.run_all(jobs(2), tmp_path, [], 2)
    assert processes[0].poll() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "visible", "names"),
    [(0, None, [""]), (3, None, ["0", "1", "2"]), (2, "4,GPU-a", ["4", "GPU-a"]), (0, "", [""])],
)
def test_cards_are_those_that_may_be_used(monkeypatch, number, visible, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    assert side_by_side.cards() == names


# Weights in pieces


def trained(folder):
    tables = {"width": 16, "layers": 1, "heads": 2, "window": 8, "hidden": 600, "memories": []}
    whole = Experiment.of({"model": tables, "training": {"steps": 1, "batch": 1, "length": 64, "facts": 0.0}}, "test")
    data = np.random.default_rng(0).integers(97, 123, 5000).astype(np.uint8)
    texts = Texts(data, np.array([0, 5000]), ("a",))
    training.train(whole, Corpus(texts, texts, "5ha"), folder, CPU)
    return checkpoint.load(folder, CPU)[0]


def test_pieces_are_small_and_give_the_model_back(tmp_path):
    model, largest = trained(tmp_path), checkpoint.HEADER + 30_000  # which the widest matrix alone is more than
    paths = checkpoint.split(tmp_path, largest)
    assert len(paths) > 3
    assert max(path.stat().st_size for path in paths) <= largest
    assert sum(path.stat().st_size for path in paths) < 4 * sum(p.numel() for p in model.parameters()) + 20_000
    (tmp_path / checkpoint.WEIGHTS).unlink()
    again, _ = checkpoint.load(tmp_path, CPU)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    changed = load_file(paths[1])
    kept = paths[1].read_bytes()
    next(iter(changed.values())).add_(1)
    about = checkpoint._read(paths[0], whole=False)[1]
    checkpoint.save_file(changed, paths[1], about)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: the files weights-*.safetensors do not belong")):
        checkpoint.load(tmp_path, CPU)
    paths[1].write_bytes(kept)
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(paths[2]))):
        checkpoint.load(tmp_path, CPU)
