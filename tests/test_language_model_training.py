"""Training the language model: it goes on where it stopped, and keeps what it had when something is wrong."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from asserting import assert_close
from interpreter import DEVICE
from safetensors.torch import load_file, save_file
from tiny_experiments import CORPUS

from examples.language_model import checkpoint, facts, results, training
from examples.language_model.settings import Experiment
from examples.language_model.training import Batch
from fwpkm.backends.torch import engine

CPU = torch.device("cpu")
WEIGHTS, RECORD, SETTINGS = "checkpoint.safetensors", "record.jsonl", "experiment.json"
MODEL = {"width": 16, "layers": 2, "heads": 2, "window": 8, "hidden": 16, "memories": [1]}
MEMORY = {"num_subkeys": 16, "top_k": 2, "chunk_size": 16}
TRAINING = {"steps": 6, "batch": 2, "length": 64, "warmup": 2, "span": 1, "facts": 0.0}


def experiment(model=None, **fields):
    tables = {"model": {**MODEL, "memory": MEMORY, **(model or {})}, "training": {**TRAINING, **fields}}
    return Experiment.of(tables, "test")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def equal(found, expected):
    """Named tensors, to the last bit. The files' metadata have no fixed order."""
    return found.keys() == expected.keys() and all(torch.equal(x, found[name]) for name, x in expected.items())


def stopping(monkeypatch, at, before=lambda trainer: None, times=1):
    """Ctrl-C so many times in step ``at``, counted from 0; ``before`` is told before each step."""
    take = training.Trainer.take

    def stopped(trainer, batch):
        for _ in range(times * (trainer.step == at)):
            signal.raise_signal(signal.SIGINT)
        before(trainer)
        return take(trainer, batch)

    monkeypatch.setattr(training.Trainer, "take", stopped)


# Going on


def test_a_stop_changes_nothing(tmp_path, monkeypatch):
    training.train(experiment(), CORPUS, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:
        stopping(patch, at=2)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
            training.train(experiment(), CORPUS, tmp_path / "parts", CPU)
    about = checkpoint._read(tmp_path / "parts" / WEIGHTS)[1]
    assert about["step"] == "3"
    training.train(experiment(), CORPUS, tmp_path / "parts", CPU)
    for _ in range(6):  # a clock that has run out stops after each step
        training.train(experiment(), CORPUS, tmp_path / "steps", CPU, seconds=0.0)
    whole, parts, steps = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts", "steps"))
    assert equal(parts, whole)
    assert equal(steps, whole)
    taken = results.record((tmp_path / "steps" / RECORD).read_text())
    assert [line["step"] for line in taken] == [1, 2, 3, 4, 5, 6]
    training.train(experiment(), CORPUS, tmp_path / "whole", CPU)
    assert equal(load_file(tmp_path / "whole" / WEIGHTS), whole)


def test_a_second_stop_is_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    training.train(experiment(), CORPUS, tmp_path, CPU, seconds=0.0)
    before = (tmp_path / WEIGHTS).read_bytes()
    stopping(monkeypatch, at=2, times=2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train(experiment(), CORPUS, tmp_path, CPU)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Ctrl-C again" in capsys.readouterr().out


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(training.train, experiment(), CORPUS, tmp_path / "aside", CPU).result()
    training.train(experiment(), CORPUS, tmp_path / "here", CPU)
    assert equal(*(load_file(tmp_path / name / WEIGHTS) for name in ("aside", "here")))


def two_memories():
    """A trainer, and the tables that it keeps for each row."""
    trainer = training.Trainer(experiment(model={"memories": [0, 1]}), CPU)
    return trainer, [table for state in trainer.reading.memories for table in state.memory]


BATCHES = list(training.batches(CORPUS, experiment().training, 0))


def test_how_tables_were_used_goes_on_with_them_and_begins_anew_with_them():
    weighted = experiment(model={"memory": {**MEMORY, "usage_weight": 1.0}})
    trainer = training.Trainer(weighted, CPU)
    (state,) = trainer.reading.memories
    a_step = TRAINING["length"] * MEMORY["top_k"]
    trainer.take(BATCHES[0]._replace(anew=[False, False]))
    assert state.uses.sum(1).tolist() == [a_step, a_step]
    trainer.take(BATCHES[1]._replace(anew=[False, True]))
    assert state.uses.sum(1).tolist() == [2 * a_step, a_step]


def test_a_row_that_begins_anew_starts_from_the_initial_tables():
    (fresh, expected), (spoiled, found) = two_memories(), two_memories()
    for table in found:
        table.normal_()
    fresh.take(BATCHES[0]._replace(anew=[False, False]))
    spoiled.take(BATCHES[0]._replace(anew=[False, True]))
    for table, wanted in zip(found, expected):
        assert table.shape[0] == 2
        assert torch.equal(table[1], wanted[1])
        assert not torch.equal(table[0], wanted[0])


def test_other_rows_go_on_whatever_those_beside_them_do():
    found, initial = {}, two_memories()[1][1]
    for anew in itertools.product((True, False), repeat=2):
        trainer, found[anew] = two_memories()
        trainer.take(BATCHES[0])
        written = (found[anew][1] != initial).any(-1)
        trainer.take(BATCHES[1]._replace(anew=list(anew)))
        kept = (found[anew][1] != initial).any(-1)
        assert [kept[row][written[row]].all().item() for row in range(2)] == [not begins for begins in anew]
    for row, (one, other) in itertools.product(range(2), itertools.combinations(found, 2)):
        for mine, its in zip(found[one], found[other]):
            assert torch.equal(mine[row], its[row]) == (one[row] == other[row])


def test_batches_follow_from_seed_and_step():
    settings = experiment(steps=20, span=3).training
    whole = list(training.batches(CORPUS, settings, 0))
    rest = list(training.batches(CORPUS, settings, 13))
    other = list(training.batches(CORPUS, dataclasses.replace(settings, seed=1), 0))
    assert (len(whole), len(rest)) == (20, 7)
    for field in range(3):
        assert all(np.array_equal(a[field], b[field]) for a, b in zip(whole[13:], rest))
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, other))


def test_a_step_that_reads_again_reads_the_same_and_asks_for_more():
    settings = experiment(steps=13, length=1024, facts=0.3, gap=100, reread=4, batch=8).training
    whole = list(training.batches(CORPUS, settings, 0))
    plain = list(training.batches(CORPUS, dataclasses.replace(settings, reread=0), 0))
    assert [settings.content(step) for step in range(9)] == [
        (0, False), (1, False), (2, False), (2, True), (3, False), (4, False), (5, False), (5, True), (6, False)
    ]  # fmt: skip
    for step, batch in enumerate(whole):
        content, again = settings.content(step)
        assert np.array_equal(batch.tokens, plain[content].tokens)
        if not again:
            assert np.array_equal(batch.asked, plain[content].asked)
            assert batch.anew == plain[content].anew
            continue
        assert not any(batch.anew)
        before = whole[step - 1]
        assert np.array_equal(batch.tokens, before.tokens)
        assert batch.asked[before.asked].all()
        assert batch.asked.sum() > 1.5 * before.asked.sum()
    assert all(map(np.array_equal, next(training.batches(CORPUS, settings, 7))[:2], whole[7][:2]))


def test_rows_that_go_on_begin_with_the_last_byte_of_the_step_before():
    batches = list(training.batches(CORPUS, experiment(steps=40, batch=3, span=5).training, 0))
    assert [batch.anew for batch in batches] == [
        [row.anew for row in facts.rows(CORPUS.train, 0, step, 3, 64, 5)] for step in range(40)
    ]
    for before, now in itertools.pairwise(batches):
        for anew, last, byte in zip(now.anew, before.tokens[:, -1], now.tokens[:, 0]):
            assert anew or last == byte


def test_facts_of_batches_are_as_the_settings_say():
    for fields, asks in (({"facts": 0.3, "gap": 100}, True), ({"facts": 0.3, "gap": 1000}, False), ({"gap": 0}, False)):
        settings = experiment(length=1024, **fields).training
        assert [batch.asked.any() for batch in training.batches(CORPUS, settings, 0)] == [asks] * 6


def test_the_record_has_a_line_for_every_few_steps(tmp_path):
    training.train(experiment(steps=7), CORPUS, tmp_path, CPU, every=3)
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    fields = {
        "step",
        "bits_per_byte",
        "digits_right",
        "first_right",
        "norm",
        "steps_per_second",
        "device",
        "side_by_side",
    }
    assert all(line.keys() == fields for line in lines)
    assert 7 < lines[0]["bits_per_byte"] < 9  # 8 bits before anything is learned
    assert lines[2]["bits_per_byte"] < lines[0]["bits_per_byte"]
    line = {"steps_per_second": 2.0, "digits_right": 0.0, "first_right": 0.0, "device": "CPU", "side_by_side": 1}
    retaken = [{"step": step, "run": run, **line} for run, step in ((0, 3), (0, 6), (1, 4), (1, 7))]
    (tmp_path / RECORD).write_text("".join(json.dumps(line) + "\n" for line in retaken))
    kept = results.record((tmp_path / RECORD).read_text())
    assert [(line["step"], line["run"]) for line in kept] == [(3, 0), (4, 1), (7, 1)]


@pytest.mark.parametrize("rest", ["", '{"step": 3, "bits_per_b'])
def test_a_line_that_a_crash_left_unfinished_is_cut_off(tmp_path, rest):
    training.train(experiment(), CORPUS, tmp_path, CPU, seconds=0.0)
    with (tmp_path / RECORD).open("a") as record:
        record.write(rest)
    training.train(experiment(), CORPUS, tmp_path, CPU)
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6]


# One step


def runs(batch, length):
    """A mask like that of two asked values in each row."""
    asked = np.zeros((batch, length), bool)
    asked[:, 20:26] = asked[0, 40:46] = asked[1, 58:] = True
    return asked


@pytest.mark.parametrize("weight", [1.0, 7.0])
def test_what_a_step_measures_and_minimises(weight):
    trainer = training.Trainer(experiment(asked_weight=weight), CPU)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    tokens, asked = CORPUS.train.data[:130].reshape(2, 65).copy(), runs(2, 64)
    inputs, targets = (torch.from_numpy(x).long() for x in (tokens[:, :-1], tokens[:, 1:]))
    logits = trainer.model.logits(trainer.model(inputs, trainer.model.start(2))[0])
    tokens[0, 21] = targets[0, 20] = logits[0, 20].argmax()  # one first digit and one other right, of 4 and 24
    tokens[1, 60] = targets[1, 59] = logits[1, 59].argmax()
    inputs = torch.from_numpy(tokens[:, :-1]).long()
    logits = trainer.model.logits(trainer.model(inputs, trainer.model.start(2))[0])
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    objective = torch.where(torch.from_numpy(asked), weight * losses, losses).mean()
    gradients = torch.autograd.grad(objective, list(trainer.model.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    right = (logits.argmax(-1) == targets).numpy()
    firsts = [(0, 20), (0, 40), (1, 20), (1, 58)]
    shares = right[asked].mean(), np.mean([right[place] for place in firsts])
    batch = Batch(tokens, asked, [True, True])
    assert_close(trainer.take(batch), [losses.mean().item(), *shares, norm.item()], "float32", "gradient")


def test_weight_1_is_the_plain_mean():
    weights = []
    for asked in (runs(2, 64), np.zeros((2, 64), bool)):
        trainer = training.Trainer(experiment(), CPU)
        trainer.take(Batch(CORPUS.train.data[:130].reshape(2, 65), asked, [True, True]))
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *weights))


def stepped(settings, inplace):
    """Two steps: the table of values, what was measured, and the parameters."""
    trainer = training.Trainer(settings, torch.device(DEVICE))
    forward, table = trainer.model.forward, trainer.reading.memories[0].memory.values

    def read(tokens, reading, **_):
        hidden, after = forward(tokens, reading, inplace=inplace)
        assert (after.memories[0].memory.values.data_ptr() == table.data_ptr()) == inplace
        return hidden, after

    trainer.model.forward = read
    measured = [trainer.take(batch).clone() for batch in list(training.batches(CORPUS, settings.training, 0))[:2]]
    return [table, *measured, *trainer.model.parameters()]


def test_steps_in_place_equal_those_that_copy(monkeypatch):
    """With the kernels, which keep what the backward needs of the rows that they overwrite."""
    monkeypatch.setattr(engine, "choose_engine", lambda *_: "triton")
    memory = {"num_subkeys": 5, "top_k": 2, "chunk_size": 4}
    settings = experiment(model={"layers": 1, "memories": [0], "memory": memory}, batch=1, length=8, span=2)
    assert all(map(torch.equal, stepped(settings, inplace=False), stepped(settings, inplace=True)))


# Folders


def test_a_seed_makes_one_model_and_the_tables_stay_out_of_the_file(tmp_path):
    whole = experiment(model={"memory": {**MEMORY, "num_subkeys": 128}})
    path = training.train(whole, CORPUS, tmp_path / "one", CPU)
    model, read = checkpoint.load(tmp_path / "one", CPU, memory_scope="sequence", learning_rate=0.0)
    assert path == tmp_path / "one" / WEIGHTS
    assert read == whole
    assert model.memories["1"].config.learning_rate == 0
    assert not any(p.requires_grad for p in model.parameters())
    saved = load_file(path)
    parameters = dict(model.named_parameters())
    kinds = ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq")
    assert saved.keys() == {kind.format(name) for name in parameters for kind in kinds}
    assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in parameters.items())
    assert path.stat().st_size < 3 * 4 * sum(p.numel() for p in parameters.values()) + 20_000
    tables = checkpoint.build(whole, CPU).memories["1"].memory
    assert torch.equal(model.memories["1"].memory.values, tables.values)
    again = training.train(whole, CORPUS, tmp_path / "again", CPU)
    assert equal(load_file(again), saved)
    other = training.train(experiment(seed=1), CORPUS, tmp_path / "other", CPU)
    assert not torch.equal(load_file(other)["model.embedding.weight"], saved["model.embedding.weight"])


OTHERS = {
    "another seed": (experiment(seed=1), CORPUS, "another experiment"),
    "another width": (experiment(model={"width": 32}), CORPUS, "another experiment"),
    "fewer steps": (experiment(steps=5), CORPUS, "another experiment"),
    "another corpus": (experiment(), CORPUS._replace(sha256="other"), "trained with another corpus"),
    "short documents": (experiment(length=3200), CORPUS, "No document is long enough"),
}


@pytest.mark.parametrize(("other", "corpus", "said"), OTHERS.values(), ids=OTHERS)
def test_a_folder_that_holds_something_else_is_left_as_it_was(tmp_path, other, corpus, said):
    folder = tmp_path / "run"
    training.train(experiment(), CORPUS, folder, CPU)
    before = contents(folder)
    with pytest.raises(ValueError, match=said):
        training.train(other, corpus, folder, CPU)
    assert contents(folder) == before


def test_a_corpus_that_does_not_fit_claims_no_folder(tmp_path):
    with pytest.raises(ValueError, match="No document is long enough"):
        training.train(experiment(length=3200), CORPUS, tmp_path / "run", CPU)
    assert contents(tmp_path / "run") is None


def test_tables_that_do_not_fit_are_refused_before_the_folder_is_claimed(tmp_path):
    vast = experiment(model={"memory": {**MEMORY, "num_subkeys": 2048}}, batch=20_000)
    with pytest.raises(ValueError, match=r"the 20000 tables of this experiment .* need 10000.0 GiB"):
        training.train(vast, CORPUS, tmp_path / "run", CPU)
    assert contents(tmp_path / "run") is None


def without(name):
    return lambda tensors, about: (tensors.pop(name), about)


DAMAGE = {
    "no step": lambda tensors, about: about.pop("step"),
    "a word for a step": lambda tensors, about: about.update(step="last"),
    "a weight less": without("model.norm.weight"),
    "another shape": lambda tensors, about: tensors.update({"model.norm.weight": torch.ones(3)}),
    "half the moments": without("optimizer.norm.weight.exp_avg_sq"),
    "moments of another shape": lambda tensors, about: tensors.update({"optimizer.norm.weight.exp_avg": torch.ones(2)}),
    "other tables": lambda tensors, about: about.update(tables="0"),
    "a weight that is no number": lambda tensors, about: tensors["model.norm.weight"].fill_(math.nan),
    "moments that are no numbers": lambda tensors, about: tensors["optimizer.norm.weight.exp_avg"].fill_(math.inf),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    training.train(experiment(), CORPUS, folder, CPU)
    return contents(folder)


@pytest.fixture
def run(trained, tmp_path):
    """A folder of a trained model, to be damaged."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name, data in trained.items():
        (folder / name).write_bytes(data)
    return folder


def refused(folder, path, load=True):
    """Training on and loading name the file, and leave the folder as it is."""
    before = contents(folder)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        training.train(experiment(), CORPUS, folder, CPU)
    if load:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load(folder, CPU)
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "change"), DAMAGE.items(), ids=DAMAGE)
def test_a_changed_checkpoint_is_refused(run, name, change):
    tensors, about = checkpoint._read(run / WEIGHTS)
    change(tensors, about)
    save_file(tensors, run / WEIGHTS, {**about, "weights": checkpoint.digest(tensors)})
    refused(run, run / WEIGHTS, load="moments" not in name)  # which only training needs


def test_a_changed_weight_is_told_by_its_checksum(run):
    tensors, about = checkpoint._read(run / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, run / WEIGHTS, about)
    refused(run, run / WEIGHTS)
    del about["weights"]  # as checkpoints of before had none
    save_file(tensors, run / WEIGHTS, about)
    checkpoint.load(run, CPU)


def test_a_file_for_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'file'} is a file: name a folder")):
            training.train(experiment(), CORPUS, out, CPU)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_checkpoint_cut_short_is_refused(run, kept):
    size = (run / WEIGHTS).stat().st_size
    os.truncate(run / WEIGHTS, int(kept * size) if 0 < kept < 1 else kept % size)
    refused(run, run / WEIGHTS)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"model": 3}', '{"model": {"depth": 3}}', '{"runs": {}}', "\xff"]
)
def test_damaged_settings_are_refused(run, text):
    (run / SETTINGS).write_bytes(text.encode("latin-1"))
    refused(run, run / SETTINGS)


def test_folders_without_a_model_say_so(run):
    for name in (WEIGHTS, SETTINGS):
        (run / name).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(str(run))):
            checkpoint.load(run, CPU)


# When something goes wrong


def spoil(at):
    def before(trainer):
        if trainer.step == at:
            trainer.model.norm.weight.data.fill_(math.nan)

    return before


@pytest.mark.parametrize("stopped", [False, True], ids=["at a line", "at Ctrl-C before the line"])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path, monkeypatch, stopped):
    training.train(experiment(), CORPUS, tmp_path, CPU, seconds=0.0)
    before = (tmp_path / WEIGHTS).read_bytes()
    stopping(monkeypatch, at=4 if stopped else 99, before=spoil(at=3))
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step"):
        training.train(experiment(), CORPUS, tmp_path, CPU)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert "NaN" not in (tmp_path / RECORD).read_text()


def test_a_gradient_that_is_not_finite_is_no_better(tmp_path, monkeypatch):
    take = training.Trainer.take

    def infinite(trainer, batch):
        return take(trainer, batch) * torch.tensor([1, 1, 1, math.inf])

    monkeypatch.setattr(training.Trainer, "take", infinite)
    with pytest.raises(FloatingPointError, match="norm inf"):
        training.train(experiment(), CORPUS, tmp_path, CPU)
    assert not (tmp_path / WEIGHTS).exists()


def test_there_is_never_half_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(beside):
        beside.write_text("ne")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        checkpoint.replace(path, fails)
    assert path.read_text() == "old"
    checkpoint.replace(path, lambda beside: beside.write_text("new"))
    assert contents(tmp_path) == {"file": b"new"}


def test_processes_of_torchrun_do_not_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"several would write the same folder.* Received: WORLD_SIZE=2"):
        training.train(experiment(), CORPUS, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
