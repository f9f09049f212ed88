"""What a trained memory reads with: keys that are held, and fields that are others than in training."""

import re

import pytest
import torch
from safetensors.torch import load_file
from test_language_model_training import CPU, MEMORY, RECORD, WEIGHTS, equal, experiment, stopping
from tiny_experiments import CORPUS

from examples.language_model import checkpoint, results, training


def keys_of(trainer):
    """Of the one memory: initial keys, and those of each row."""
    (layer,), (state,) = trainer.model.memories.values(), trainer.reading.memories
    return layer.memory.keys, state.memory.keys


def test_rows_begin_with_the_mean_of_all_keys_until_these_stand_still():
    trainer = training.Trainer(experiment(hold_after=3, span=2), CPU)
    batches = list(training.batches(CORPUS, trainer.settings, 0))
    drawn = keys_of(trainer)[0].clone()
    for batch in batches[:2]:
        trainer.take(batch)
        first, rows = keys_of(trainer)
        assert not torch.equal(rows[0], rows[1])
        torch.testing.assert_close(first, (rows[0] + rows[1]) / 2, rtol=0, atol=1e-7)
    moved = first.clone()
    assert (moved - drawn).abs().max() > 1e-4
    begun = []
    trainer._backward, backward = lambda: (begun.append(keys_of(trainer)[1].clone()), backward()), trainer._backward
    trainer.take(batches[2])
    assert batches[2].anew == [True, False]
    assert [torch.equal(keys, moved) for keys in begun[0]] == [True, False]
    held, rows = (keys.clone() for keys in keys_of(trainer))
    assert not torch.equal(held, moved)
    for batch in batches[3:5]:
        values = trainer.reading.memories[0].memory.values.clone()
        trainer.take(batch)
        first, rows = keys_of(trainer)
        assert torch.equal(first, held)
        assert torch.equal(rows, held.expand_as(rows))
        assert not torch.equal(values, trainer.reading.memories[0].memory.values)


def test_without_it_rows_begin_with_the_drawn_keys():
    trainer = training.Trainer(experiment(), CPU)
    drawn = keys_of(trainer)[0].clone()
    for batch in training.batches(CORPUS, trainer.settings, 0):
        trainer.take(batch)
    assert torch.equal(keys_of(trainer)[0], drawn)
    assert not torch.equal(keys_of(trainer)[1][:1], drawn)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_stop_changes_nothing(tmp_path, monkeypatch, at):
    training.train(experiment(hold_after=3), CORPUS, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:
        stopping(patch, at=at)
        with pytest.raises(KeyboardInterrupt):
            training.train(experiment(hold_after=3), CORPUS, tmp_path / "parts", CPU)
    training.train(experiment(hold_after=3), CORPUS, tmp_path / "parts", CPU)
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert equal(parts, whole)
    assert "model.memories.1.memory.keys" in whole
    assert results.record((tmp_path / "parts" / RECORD).read_text())[-1]["step"] == 6


@pytest.mark.parametrize("pieces", [False, True])
def test_a_model_is_loaded_with_the_keys_that_are_held(tmp_path, pieces):
    training.train(experiment(hold_after=3), CORPUS, tmp_path, CPU)
    kept = load_file(tmp_path / WEIGHTS)["model.memories.1.memory.keys"]
    if pieces:
        checkpoint.split(tmp_path)
        (tmp_path / WEIGHTS).unlink()
    model, read = checkpoint.load(tmp_path, CPU, memory_scope="sequence")
    layer = model.memories["1"]
    assert torch.equal(layer.memory.keys, kept)
    assert (layer.config.addressing_weight, read.model.memory_config().addressing_weight) == (0.0, 1.0)
    assert not torch.equal(kept, checkpoint.build(read, CPU).memories["1"].memory.keys)
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    state = model(tokens, model.start(2))[1].memories[0]
    assert torch.equal(state.memory.keys, kept.expand_as(state.memory.keys))
    moved = checkpoint.load(tmp_path, CPU, memory_scope="sequence", addressing_weight=1.0)[0]
    assert not torch.equal(moved(tokens, moved.start(2))[1].memories[0].memory.keys[:1], kept)
    checkpoint.load(tmp_path, CPU, num_subkeys=16)
    with pytest.raises(ValueError, match=r"num_subkeys must be 16: the keys of .* are held. Received: 8"):
        checkpoint.load(tmp_path, CPU, num_subkeys=8)


def test_a_trained_model_reads_as_it_is_told(tmp_path):
    told = {"reading": {"learning_rate": 0.5, "top_k": 3}}
    training.train(experiment(told), CORPUS, tmp_path / "told", CPU)
    training.train(experiment(), CORPUS, tmp_path / "plain", CPU)
    assert equal(*(load_file(tmp_path / name / WEIGHTS) for name in ("told", "plain")))
    model, read = checkpoint.load(tmp_path / "told", CPU)
    assert read == experiment(told)
    config = model.memories["1"].config
    assert (config.learning_rate, config.top_k, config.num_subkeys) == (0.5, 3, 16)
    assert checkpoint.load(tmp_path / "told", CPU, learning_rate=0.25)[0].memories["1"].config.learning_rate == 0.25


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({"num_subkeys": 32, "boundary": "wait"}, "model.reading cannot change ['boundary', 'num_subkeys']"),
        ({"rate": 1}, "model.reading has fields that FwPKMConfig lacks: ['rate']"),
        ({"learning_rate": -1.0}, "model.reading.learning_rate must be"),
        (3, "model.reading must be a table of FwPKMConfig's fields. Received: 3"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(reading, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        experiment({"reading": reading})


@pytest.mark.parametrize(
    ("model", "hold_after", "said"),
    [
        ({}, -1, "training.hold_after must be an integer of at least 0"),
        ({}, 7, "training.hold_after must be at most training.steps, 6"),
        ({"memories": [], "memory": {}}, 2, "training.hold_after must be 0 where no memory is written. Received: 2"),
        ({"memories": [], "memory": {}, "reading": {"top_k": 3}}, 0, "model.reading must be empty where no memory"),
        ({"memory": MEMORY | {"weight_decay": 0.1}}, 2, "training.hold_after wants model.memory.weight_decay = 0"),
        ({"reading": {"weight_decay": 0.1}}, 2, "training.hold_after wants model.memory.weight_decay = 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, hold_after, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        experiment(model, hold_after=hold_after)
