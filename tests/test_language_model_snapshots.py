"""Snapshots: a text reads what the memories held when their keys fitted it best."""

import dataclasses

import pytest
import torch
from test_language_model_measures import MEMORY, MODEL
from test_language_model_retention import command, trained  # noqa: F401

from examples.language_model.model import LanguageModel
from examples.language_model.settings import ModelSettings
from examples.language_model.snapshots import Snapshots, key_match
from fwpkm import Memory


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = ModelSettings(**MODEL, memory={**MEMORY, "usage_weight": 0.5})
    return LanguageModel(settings, memory_scope="sequence", boundary="wait")


def drawn(seed, *shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def after(model, seed):
    return model(drawn(seed, 2, 300), model.start(2))[1]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one.arrays().values(), other.arrays().values(), strict=True))


def test_what_was_kept_comes_back_and_reads_from_the_beginning(model):
    kept, reading = Snapshots(model), after(model, 1)
    kept.keep(reading)
    (found,) = kept.best(drawn(2, 2, 32)).memories
    assert same(found, reading.memories[0])
    assert found.uses.sum() == reading.memories[0].uses.sum() > 0
    assert all(window.shape[2] == 0 for window in kept.best(drawn(2, 2, 32)).windows)


@torch.no_grad()
def test_each_text_reads_the_snapshot_whose_keys_it_meets(model):
    """The keys of row 0 fit in the second snapshot, those of row 1 in the first."""
    (layer,), text = model.memories.values(), drawn(3, 2, 32)
    states = [after(model, seed).memories[0] for seed in (1, 2)]
    inputs = []
    with layer.register_forward_pre_hook(lambda layer, given: inputs.append(given[0])):
        model(text, model.start(2), update=False)
    query = layer.query_proj(layer.query_norm(inputs[0])).view(2, 32, layer.config.num_heads, 2, -1)
    kept = Snapshots(model)
    for i, state in enumerate(states):
        keys = state.memory.keys.clone()
        keys[1 - i] = query[1 - i, : keys.shape[3]].permute(1, 2, 0, 3)
        states[i] = state._replace(memory=Memory(keys, state.memory.values))
        kept.keep(model.start(2)._replace(memories=(states[i],)))
    (found,) = kept.best(text).memories
    for row in (0, 1):
        assert torch.equal(found.memory.values[row], states[1 - row].memory.values[row])
        assert torch.equal(found.memory.keys[row], states[1 - row].memory.keys[row])


@pytest.mark.parametrize("score", ["idw", "dot_product"])
@torch.no_grad()
def test_a_match_is_the_mean_score_of_the_nearest_sub_keys(model, score):
    (layer,), state = model.memories.values(), after(model, 1).memories[0]
    x = torch.randn(2, 5, MODEL["width"], generator=torch.Generator().manual_seed(4))
    query = layer.query_proj(layer.query_norm(x)).view(2, 5, layer.config.num_heads, 2, 1, -1)
    keys = state.memory.keys[:, None]
    scores = -torch.log(layer.config.score_eps + (query - keys).square().sum(-1))
    scores = scores if score == "idw" else (query * keys).sum(-1)
    given = layer.config
    try:
        layer.config = dataclasses.replace(given, score=score)
        found = key_match(layer, state, x)
    finally:
        layer.config = given
    torch.testing.assert_close(found, scores.amax(-1).mean((1, 2, 3)))


def test_the_command_reads_snapshots(trained, tmp_path):  # noqa: F811
    """With one snapshot there is no choice: bits are those of the memory as it stands."""
    plain, shots = (command(trained, tmp_path / f"{n}-0.json", *more) for n, more in enumerate([(), ("--snapshots",)]))
    assert (plain["snapshots"], shots["snapshots"]) == (False, True)
    for one, other in zip(plain["rows"], shots["rows"]):
        for kind in ("episodes", "domain"):
            assert one[kind]["kept"][0] == pytest.approx(other[kind]["kept"][0], abs=1e-4)
            assert one[kind]["others"][0] == pytest.approx(other[kind]["others"][0], abs=1e-4)
            # After others each text of a row reads one that was kept.
            states = one[kind]["kept"]
            assert min(abs(other[kind]["kept"][2] - x) for x in states) < 1e-4
