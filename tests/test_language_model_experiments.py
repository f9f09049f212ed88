"""Lists of experiments: what stands in one is what a file with its changes would be."""

import pytest
import torch

from examples.language_model import experiments, inside
from examples.language_model.commands import main
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Experiment, ModelSettings

BASE = """
[model]
memories = [1]
memory = { num_subkeys = 64, chunk_size = 256 }
[training]
steps = 900
reread = 8
"""
LIST = """
[short]
base = "base.toml"
every = { training.steps = 20 }
[short.experiments]
same = {}
chunk-128 = { model.memory.chunk_size = 128, model.memories = [2], training.gap = 300 }
[wrong]
base = "base.toml"
"""


@pytest.fixture
def listing(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "list.toml").write_text(LIST)
    return tmp_path / "list.toml"


def test_an_experiment_is_its_base_with_changes(listing):
    same, changed = (Experiment.read(listing / "short" / name) for name in ("same", "chunk-128"))
    assert same == Experiment.of(
        {"model": {"memories": [1], "memory": {"num_subkeys": 64, "chunk_size": 256}},
         "training": {"steps": 20, "reread": 8}}, "test",
    )  # fmt: skip
    assert changed.model.memory == {"num_subkeys": 64, "chunk_size": 128}
    assert (changed.model.memories, changed.training.gap, changed.training.reread) == ((2,), 300, 8)
    assert Experiment.read(listing / "short/same", seed=3, steps=7).training.steps == 7


def test_a_file_is_read_as_ever(listing):
    assert Experiment.read(listing.parent / "base.toml").training.steps == 900
    with pytest.raises(FileNotFoundError):
        Experiment.read(listing.parent / "none.toml")


def test_the_command_prints_what_train_takes(listing, capsys):
    main(["experiments", "short", "--list", str(listing)])
    assert capsys.readouterr().out.split() == [str(listing / "short" / name) for name in ("same", "chunk-128")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short/none", "has no 'none' in 'short'; it has same, chunk-128"),
        ("none/same", "has no group 'none'; it has short, wrong"),
        ("wrong/same", r"\[wrong\] must have base, experiments, and may have every. Received: \['base'\]"),
        ("short", "has no '' in 'short'"),
    ],
)
def test_what_a_list_lacks_is_said(listing, name, said):
    with pytest.raises(ValueError, match=said):
        Experiment.read(listing / name)


@pytest.mark.parametrize("group", ["settings", "remedies"])
def test_every_experiment_of_the_list_is_one_and_differs(group):
    found = {path.name: Experiment.read(path) for path in experiments.of_group(experiments.LIST, group)}
    assert len({str(experiment.tables()) for experiment in found.values()}) == len(found) > 4
    assert {experiment.training.steps for experiment in found.values()} == {2000 if group == "settings" else 9000}


def test_memories_without_a_gate(monkeypatch, tmp_path):
    given = {"width": 16, "layers": 2, "heads": 2, "memories": [1], "memory": {"num_subkeys": 8}}
    with pytest.raises(ValueError, match=r"model\.gated must be true or false\. Received: 1"):
        ModelSettings(**given, gated=1)
    tokens, plain, gated = (
        torch.zeros(1, 9, dtype=torch.long),
        *(LanguageModel(ModelSettings(**given, gated=x)) for x in (False, True)),
    )
    assert {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        f"memories.1.gate_{part}" for part in ("norm.weight", "proj.weight", "proj.bias")
    }
    assert plain(tokens, plain.start(1))[0].isfinite().all()
    for wrong in ({"gated": False, "mixer": "delta"}, {"gated": False, "mixer": "static"}):
        with pytest.raises(ValueError, match=r"model\.gated must be true with mixer"):
            ModelSettings(**{**given, "memory": {}}, **wrong)
    its = Experiment(ModelSettings(**given, gated=False))
    monkeypatch.setattr(inside, "load", lambda *a, **k: (plain, its))
    with pytest.raises(ValueError, match="has no memory with a gate to look into"):
        inside.draw(tmp_path, None, tmp_path, torch.device("cpu"))
