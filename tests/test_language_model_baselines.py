"""What the language model's memories are compared with: it reads on, it learns, and it is as large."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from asserting import assert_close
from sources import ROOT
from tiny_experiments import CORPUS, drawn

from examples.language_model import baselines, by_position, checkpoint, needle, training
from examples.language_model.model import LanguageModel, Reading, mapped
from examples.language_model.settings import Experiment, ModelSettings

CPU = torch.device("cpu")
CONFIGS = ROOT / "examples/language_model/configs"
MIXERS = ("attention", "delta", "static")
TABLES = {"num_subkeys": 8, "top_k": 2}
TRAINING = {"steps": 4, "batch": 2, "length": 64, "warmup": 2, "span": 2, "facts": 0.0}


def settings(mixer, **fields):
    memory = TABLES if mixer == "static" else {}
    given = {"width": 16, "layers": 2, "heads": 2, "window": 5, "hidden": 16, "memories": (0, 1), "context": 40}
    return ModelSettings(**{**given, "mixer": mixer, "memory": memory, **fields})


def built(mixer, **fields):
    torch.manual_seed(0)
    model = LanguageModel(settings(mixer, **fields), memory_scope="sequence").requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(8)
    return model


TOKENS = drawn(2, 150)


# Reading


@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_read_what_one_call_reads(mixer):
    model = built(mixer)
    whole, _ = model(TOKENS, model.start(2))
    for cuts in ([0, 1, 2, 39, 90, 150], [0, 128, 129, 150]):
        reading, hidden = model.start(2), []
        for start, end in itertools.pairwise(cuts):
            part, reading = model(TOKENS[:, start:end], reading, update=start != 39)
            hidden.append(part)
        assert_close(torch.cat(hidden, 1), whole, "float32")
    for row in range(2):
        assert_close(model(TOKENS[row : row + 1], model.start(1))[0][0], whole[row], "float32")


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_comes_from_the_future(mixer):
    model = built(mixer)
    whole, _ = model(TOKENS, model.start(2))
    for place in (0, 40, 149):
        changed = TOKENS.clone()
        changed[:, place] ^= 1
        hidden, _ = model(changed, model.start(2))
        assert_close(hidden[:, :place], whole[:, :place], "float32")
        assert (hidden[:, place] - whole[:, place]).abs().amax(-1).min() > 1e-3


REACH = {"attention": 2 * 4 + 2 * 39, "delta": 149, "static": 2 * 4}


@pytest.mark.parametrize("mixer", MIXERS)
def test_how_far_back_a_token_is_seen(mixer):
    model = built(mixer)
    changed = TOKENS.clone()
    changed[:, 0] ^= 1
    found, expected = (model(x, model.start(2))[0] for x in (changed, TOKENS))
    differs = (found != expected).any(-1).any(0).nonzero().flatten()
    assert differs.max() == REACH[mixer]


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_goes_on_from_text_to_text(mixer):
    model = built(mixer)
    reading = model(TOKENS, model.start(2))[1]
    swapped = needle.another(reading)
    for state, other, layer in zip(reading.memories, swapped.memories, model.memories.values()):
        assert [x.shape[1:] for x in state.memory] == [x.shape[1:] for x in layer.memory()]
        assert all(torch.equal(x[[1, 0]], y) for x, y in zip(state.memory, other.memory))
        assert all(map(torch.equal, state.window, other.window))
    assert model.settings.carries == any(state.memory for state in reading.memories)
    assert not model.settings.writes


# Measuring


@pytest.mark.parametrize("mixer", MIXERS)
def test_forked_readings_answer_each_question_as_if_it_were_the_only_one(mixer):
    model = built(mixer)
    reading = model(TOKENS, model.start(2))[1]
    kept = mapped(torch.clone, reading)
    asked, value = drawn(6, 12, seed=4).view(2, 3, 12), torch.full((2, 3), 4)
    hidden, _ = model(asked.flatten(0, 1), reading.fork(3), update=False)
    for row, question in itertools.product(range(2), range(3)):
        part = mapped(lambda x, row=row: x[row : row + 1], reading.memories)
        windows = tuple(past[:, row : row + 1] for past in reading.windows)
        alone, _ = model(asked[row, question][None], Reading(part, windows), update=False)
        assert_close(hidden[3 * row + question], alone[0], "float32")
    assert needle.answers(model, asked, value, reading).shape == (2, 3, 6)
    held = [x for state in kept.memories for x in (*state.memory, *state.window)]
    assert all(map(torch.equal, held, (x for state in reading.memories for x in (*state.memory, *state.window))))
    assert reading.nbytes == sum(x.nbytes for x in (*held, *reading.windows))


MEASURED = {
    "attention": ({"reset"}, {("memory", 1)}),
    "delta": (
        {"reset", "carried"},
        {("memory", 1), ("memory", 2), *(("another document's memory", n) for n in (1, 2))},
    ),
    "static": ({"reset"}, {("memory", 1)}),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_what_goes_on_is_read_again_carried_and_swapped(mixer, tmp_path):
    whole = experiment(mixer)
    training.train(whole, CORPUS, tmp_path / "model", CPU)
    modes, answered = MEASURED[mixer]
    by_position.measure(tmp_path / "model", CORPUS, tmp_path / "bits", CPU, length=1024)
    assert json.loads((tmp_path / "bits").read_text())["bits"].keys() == modes
    cells = [needle.Cell("near", 1024, contexts=2, readings=2, controls=True)]
    needle.measure(tmp_path / "model", CORPUS, tmp_path / "needle", CPU, cells, tell=lambda _: None)
    rows = json.loads((tmp_path / "needle").read_text())["rows"]
    assert {(row["control"], row["readings"]) for row in rows} == answered


# The gated delta rule


def stepwise(query, key, value, decay, rate, state):
    """One token after the other, in float64."""
    query, key, value, decay, rate, state = (x.double().numpy() for x in (query, key, value, decay, rate, state))
    out = np.empty_like(value)
    for t in range(query.shape[1]):
        state = np.exp(decay[:, t])[..., None, None] * state
        seen = np.einsum("bhkv,bhk->bhv", state, key[:, t])
        new = rate[:, t, :, None] * (value[:, t] - seen)
        state = state + key[:, t, :, :, None] * new[:, :, None, :]
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, query[:, t])
    return out, state


@pytest.mark.parametrize("length", [1, 7, 8, 27])
@pytest.mark.parametrize("alike", [False, True], ids=["drawn keys", "keys all alike"])
def test_chunks_equal_one_token_after_the_other(length, alike):
    rng = torch.Generator().manual_seed(length)
    query, key, value = torch.randn(3, 2, length, 3, 5, generator=rng)
    key = F.normalize(key[:, :1].expand_as(key) if alike else key, dim=-1)
    decay, rate = F.logsigmoid(3 * torch.randn(2, length, 3, generator=rng)), torch.rand(2, length, 3, generator=rng)
    inputs = query, key, value, decay, rate, torch.randn(2, 3, 5, 5, generator=rng)
    for found, expected in zip(baselines.gated_delta(*inputs, chunk=8), stepwise(*inputs)):
        assert_close(found, expected, "float32")


def test_the_gradient_of_the_chunks():
    rng = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 5, 2, 2, generator=rng, dtype=torch.float64)
    decay, rate = -torch.rand(1, 5, 2, generator=rng).double(), torch.rand(1, 5, 2, generator=rng).double()
    inputs = query, key, value, decay, rate, torch.randn(1, 2, 2, 2, generator=rng).double()
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: baselines.gated_delta(*x, chunk=2), inputs)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_the_inverse_of_a_triangular_matrix(size):
    rng = torch.Generator().manual_seed(size)
    lower = torch.randn(2, 3, size, size, generator=rng, dtype=torch.float64).tril(-1)
    whole = torch.eye(size) + lower
    assert_close(baselines.inverse(lower), torch.linalg.inv(whole), "float64")


# Training


def experiment(mixer):
    model = dataclasses.asdict(settings(mixer))
    return Experiment.of({"model": model, "training": TRAINING}, "test")


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_weight_learns_and_the_model_comes_back(mixer, tmp_path):
    trained = experiment(mixer)
    initial = {name: p.clone() for name, p in checkpoint.build(trained, CPU).named_parameters()}
    training.train(trained, CORPUS, tmp_path, CPU)
    model, _ = checkpoint.load(tmp_path, CPU, memory_scope="sequence")
    same = [name for name, p in model.named_parameters() if torch.equal(p, initial[name])]
    assert not same
    tables = [p for name, p in model.named_parameters() if ".memory." in name]
    assert [len(p) for p in tables if p.ndim == 2] == [64, 64] * (mixer == "static")
    kept = [p for group in training.Trainer(trained, CPU).optimizer.param_groups[1:] for p in group["params"]]
    assert {p.shape for p in tables} <= {p.shape for p in kept}  # which weights do not decay
    training.train(trained, CORPUS, tmp_path, CPU)  # its tables are found to be its own
    assert torch.isfinite(model(TOKENS, model.start(2))[0]).all()


def test_a_delta_rule_goes_on_from_step_to_step_and_begins_anew():
    trainer = training.Trainer(experiment("delta"), CPU)
    batches = list(training.batches(CORPUS, trainer.settings, 0))
    state = trainer.reading.memories[0].memory[0]
    trainer.take(batches[0])
    first = state.clone()
    trainer.take(batches[1]._replace(anew=[False, True]))
    fresh = training.Trainer(experiment("delta"), CPU)
    fresh.take(batches[0])
    fresh.reading.memories[0].memory[0].zero_()
    fresh.take(batches[1]._replace(anew=[False, False]))
    assert first.abs().amax((1, 2, 3)).min() > 0
    assert torch.equal(state[1], fresh.reading.memories[0].memory[0][1])
    assert not torch.equal(state[0], fresh.reading.memories[0].memory[0][0])


# The experiments


def test_baselines_are_as_large_as_the_model_with_memories_and_trained_alike():
    paths = [path for path in CONFIGS.glob("*.toml") if not path.stem.startswith("tiny")]
    kinds = {path.stem: Experiment.read(path) for path in paths}
    assert kinds.keys() == {"memory", "plain", "attention", "delta", "static"}
    sizes = {}
    for name, whole in kinds.items():
        small = {**whole.model.memory, "num_subkeys": 16} if whole.model.memory else {}
        sizes[name] = baselines.active(LanguageModel(dataclasses.replace(whole.model, memory=small)))
        assert whole.training == kinds["memory"].training
        assert abs(sizes[name] / sizes["memory"] - 1) < 0.02
    assert kinds["static"].model.memory_config().num_slots == kinds["memory"].model.memory_config().num_slots
