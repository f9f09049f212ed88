"""Experimental rules of the memory in the language model: trained, kept, loaded, frozen, forked and packed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sources import ROOT
from test_language_model_retention import DOMAINS, OTHER, SIZE, TEXTS
from test_language_model_training import CPU, experiment
from tiny_experiments import CORPUS, config, drawn

from examples.language_model import checkpoint, retention, training
from examples.language_model.commands import main
from examples.language_model.model import LanguageModel
from examples.language_model.needle import MEMORIES
from examples.language_model.settings import Experiment, ModelSettings
from examples.language_model.snapshots import Snapshots

RULES = {"forget-gate": {"forget": True}, "decay-to-initial": {"memory": {"initial_decay": 0.01}}}
RULES["not-lately"] = {"memory": {"recent_penalty": 0.5}}


def settings(rule, **fields):
    memory = {"num_subkeys": 8, "top_k": 2, "chunk_size": 64}
    given = {"width": 16, "layers": 2, "heads": 2, "window": 8, "hidden": 16, "memories": (1,), **fields}
    given |= {name: x for name, x in RULES[rule].items() if name != "memory"}
    return ModelSettings(**given, memory=memory | RULES[rule].get("memory", {}))


@pytest.mark.parametrize("rule", RULES)
def test_the_headline_model_with_the_rule_is_listed(rule):
    listed = Experiment.read(ROOT / "examples/language_model/experiments.toml/remedies" / rule).model
    for name, x in RULES[rule].items():
        if name == "memory":
            assert listed.memory.items() >= x.items()
        else:
            assert getattr(listed, name) == x


def test_f_begins_at_one_hundredth_and_is_trained():
    tried = Experiment(settings("forget-gate"), experiment(steps=3, length=192).training)
    trainer = training.Trainer(tried, CPU)
    (layer,) = trainer.model.memories.values()
    tokens, _ = layer._project(torch.randn(2, 5, 16), None, None, None)
    torch.testing.assert_close(tokens.forget, torch.full((2, 5), 0.01), rtol=0.01, atol=0)
    names = ("forget_weight", "forget_bias", "forget_norm.weight")
    before = [layer.get_parameter(name).clone() for name in names]
    for batch in training.batches(CORPUS, trainer.settings, 0):
        trainer.take(batch)
    for name, x in zip(names, before):
        assert not torch.equal(layer.get_parameter(name), x), name


def test_the_gate_draws_nothing():
    models = []
    for rule in ({}, {"forget": True}):
        torch.manual_seed(0)
        models.append(LanguageModel(dataclasses.replace(settings("forget-gate"), **{"forget": False} | rule)))
    plain, gated = (model.state_dict() for model in models)
    assert {name.rpartition(".1.")[2] for name in gated.keys() - plain.keys()} == {
        "forget_norm.weight", "forget_weight", "forget_bias",
    }  # fmt: skip
    for name, x in plain.items():
        assert torch.equal(gated[name], x)


@pytest.mark.parametrize("rule", RULES)
def test_reading_on_in_parts_freezing_forking_and_packing(rule, tmp_path):
    tried = Experiment(settings(rule), experiment(steps=3, length=192).training)
    training.train(tried, CORPUS, tmp_path, CPU)
    model, _ = checkpoint.load(tmp_path, CPU, **MEMORIES)
    with torch.no_grad():
        check_reading(model)


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_what_it_keeps_is_measured(rule, snapshots, tmp_path):
    training.train(Experiment(settings(rule), experiment(steps=3, length=192).training), CORPUS, tmp_path, CPU)
    path, told = tmp_path / "small-0.retention.json", []
    options = {"size": SIZE, "other": OTHER, "texts": TEXTS, "snapshots": snapshots, "tell": told.append}
    retention.measure(tmp_path, DOMAINS, path, CPU, **options)
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        for kind in ("episodes", "domain"):
            assert row[kind].keys() == {"unread", "filler", "others", "kept", "last"}
            assert all(np.isfinite(x).all() for x in row[kind].values())


def check_reading(model):
    tokens = drawn(2, 200)
    whole, after = model(tokens, model.start(2))
    first, reading = model(tokens[:, :90], model.start(2))
    second, parts = model(tokens[:, 90:], reading)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
    for x, y in zip(after.memories[0].arrays().values(), parts.memories[0].arrays().values()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    ahead = drawn(2, 20, seed=3)
    frozen, still = model(ahead, parts, update=False)
    assert all(x is y for x, y in zip(still.memories[0].arrays().values(), parts.memories[0].arrays().values()))
    forked, _ = model(ahead.repeat_interleave(3, 0), parts.fork(3), update=False)
    torch.testing.assert_close(forked, frozen.repeat_interleave(3, 0), rtol=1e-4, atol=1e-5)
    kept = Snapshots(model)
    kept.keep(parts)
    kept.keep(parts)
    again = kept.best(ahead)
    frozen, _ = model(ahead, parts._replace(windows=again.windows), update=False)
    torch.testing.assert_close(model(ahead, again, update=False)[0], frozen, rtol=1e-4, atol=1e-5)


def text(seed):
    words = np.random.default_rng(seed).choice(["fish", "over", "the", "hill", "a", "green", "stone"], 900)
    return " ".join(words)


@pytest.mark.parametrize("rule", RULES)
def test_run_trains_and_measures_it(rule, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}{'-heldout' * (i == 3)}.jsonl").write_text(
            "".join(json.dumps({"id": f"{i}-{j}", "text": text(10 * i + j)}) + "\n" for j in range(2))
        )
    main(["prepare", str(tmp_path / "text"), str(tmp_path / "corpus")])
    table = config(layers=1, memories=[0], steps=3, length=896)
    memory = ", ".join(f"{name} = {x}" for name, x in RULES[rule].get("memory", {}).items())
    table = table.replace("chunk_size = 64 }", f"chunk_size = 64, {memory} }}" if memory else "chunk_size = 64 }")
    others = [f"{name} = {json.dumps(x)}" for name, x in RULES[rule].items() if name != "memory"]
    (tmp_path / "small.toml").write_text(table.replace("[model]\n", "\n".join(["[model]", *others, ""])))
    told = ["--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--seeds", "0"]
    asked = ["--kinds", "near", "--lengths", "1024", "--contexts", "2", "--readings", "1"]
    main(["run", str(tmp_path / "small.toml"), *told, *asked, "--measures", "bits", "needle", "--length", "2048"])
    own = Experiment.read(tmp_path / "small.toml", seed=0)
    for kind in ("bits", "needle"):
        measured = json.loads((tmp_path / f"out/small-0.{kind}.json").read_text())
        assert Experiment.of(measured["experiment"], kind) == own
