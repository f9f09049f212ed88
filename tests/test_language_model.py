"""The language model and its settings: what it sees, how it reads on, and which experiments are refused."""

import json
import re

import numpy as np
import pytest
import torch
from asserting import assert_close
from hypothesis import given
from hypothesis import strategies as st
from sources import ROOT
from tiny_experiments import drawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.language_model import attention
from examples.language_model import model as decoder
from examples.language_model.settings import Experiment, ModelSettings, TrainingSettings

MEMORY = {"num_subkeys": 4, "top_k": 2, "chunk_size": 6}
SMALL = {"width": 16, "layers": 3, "heads": 2, "window": 5, "hidden": 24, "memory": MEMORY}


def built(seed=0, **fields):
    """A model whose weights are large enough that everything it reads shows in its hidden states."""
    torch.manual_seed(seed)
    model = decoder.LanguageModel(ModelSettings(**{**SMALL, "memories": (0, 2), **fields})).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(10)
    return model


def tensors(part):
    """All tensors in a reading or a state, in order."""
    return [part] if isinstance(part, torch.Tensor) else [x for inner in part or () for x in tensors(inner)]


def copied(reading):
    return [x.clone() for x in tensors(reading)]


def same(found, expected):
    return all(map(torch.equal, tensors(found), tensors(expected)))


# Reading


MODEL = built()
TOKENS = drawn(2, 37)
WHOLE = MODEL(TOKENS, MODEL.start(2))


@given(st.sets(st.integers(1, 36)))
def test_any_split_reads_the_same(cuts):
    reading, hidden = MODEL.start(2), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 37]):
        part, reading = MODEL(TOKENS[:, start:end], reading)
        hidden.append(part)
    assert_close(torch.cat(hidden, 1), WHOLE[0], "float32")
    assert [x.shape for x in tensors(reading)] == [x.shape for x in tensors(WHOLE[1])]
    for found, expected in zip(tensors(reading), tensors(WHOLE[1])):
        assert_close(found, expected, "float32")


@pytest.mark.parametrize(
    "fields", [{"memories": ()}, {"window": 1}, {"window": 64}, {"memories": (1,), "layers": 2}, {"heads": 1}]
)
def test_one_token_at_a_time(fields):
    model = built(**fields)
    whole, after = model(TOKENS, model.start(2))
    reading, hidden = model.start(2), []
    for i in range(37):
        part, reading = model(TOKENS[:, i : i + 1], reading)
        hidden.append(part)
    assert_close(torch.cat(hidden, 1), whole, "float32")
    assert all(w.shape == (2, 2, min(37, model.settings.window - 1), 16) for w in after.windows)


def test_nothing_comes_from_the_future():
    for place in (0, 5, 6, 17, 36):
        changed = TOKENS.clone()
        changed[:, place] ^= 1
        hidden = MODEL(changed, MODEL.start(2))[0]
        assert torch.equal(hidden[:, :place], WHOLE[0][:, :place])
        assert not torch.equal(hidden[:, place], WHOLE[0][:, place])


def test_rows_share_nothing_but_a_batch_memory():
    for row in range(2):
        alone = MODEL(TOKENS[row : row + 1], MODEL.start(1))[0]
        assert_close(alone[0], WHOLE[0][row], "float32")
    torch.manual_seed(0)
    shared = decoder.LanguageModel(MODEL.settings, memory_scope="batch").requires_grad_(False)
    shared.load_state_dict(MODEL.state_dict())
    hidden = shared(TOKENS, shared.start(2))[0]
    assert_close(hidden[:, :6], WHOLE[0][:, :6], "float32")  # the first chunk reads what was there before
    assert (hidden[:, 6:] - WHOLE[0][:, 6:]).abs().max() > 1e-3


def test_update_false_only_reads():
    _, reading = MODEL(TOKENS[:, :20], MODEL.start(2))
    before = copied(reading)
    hidden, after = MODEL(TOKENS[:, 20:], reading, update=False)
    assert same(reading, before)
    assert same(after.memories, reading.memories)
    first, halfway = MODEL(TOKENS[:, 20:27], reading, update=False)
    second, _ = MODEL(TOKENS[:, 27:], halfway, update=False)
    assert_close(torch.cat([first, second], 1), hidden, "float32")
    written = MODEL(TOKENS[:, 20:], reading)[0]
    assert_close(hidden[:, :4], written[:, :4], "float32")  # until the chunk that began at 18 ends
    assert (hidden[:, 4:] - written[:, 4:]).abs().max() > 1e-3


def test_inplace_saves_a_copy_and_changes_no_number():
    first = MODEL(TOKENS[:, :20], MODEL.start(2))[1]
    kept = copied(first)
    hidden, after = MODEL(TOKENS[:, 20:], first)
    assert same(first, kept)
    again, owned = MODEL(TOKENS[:, 20:], first, inplace=True)
    assert torch.equal(again, hidden)
    assert same(owned, after)
    for old, new in zip(first.memories, owned.memories):
        assert old.memory.values.data_ptr() == new.memory.values.data_ptr()


# Attention


@pytest.mark.parametrize(("layers", "window"), [(1, 5), (1, 1), (3, 4), (2, 7)])
def test_without_memories_a_layer_sees_a_window(layers, window):
    model = built(layers=layers, window=window, memories=())
    reach = layers * (window - 1)
    changed = TOKENS.clone()
    changed[:, 7] ^= 1
    found, expected = (model(x, model.start(2))[0] for x in (changed, TOKENS))
    differs = (found != expected).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == list(range(7, 7 + reach + 1))


@given(st.integers(1, 9), st.integers(1, 99), st.integers(2, 999))
def test_what_lies_beyond_is_out_of_reach_and_written(layers, window, chunk):
    settings = ModelSettings(layers=layers, window=window, memory={"chunk_size": chunk})
    assert settings.beyond == max(layers * (window - 1), chunk) + 64


def test_memories_see_beyond_windows():
    model = built(window=3, memories=(1,))
    changed = TOKENS.clone()
    changed[:, 1] ^= 1
    found, expected = (model(x, model.start(2))[0] for x in (changed, TOKENS))
    assert not torch.equal(found[:, -1], expected[:, -1])


def dense(query, key, value, window):
    """Softmax over all keys, with a mask; [B, T, heads, d] of NumPy in float64."""
    query, key, value = (x.double().numpy() for x in (query, key, value))
    places = np.arange(key.shape[1])
    distance = places[key.shape[1] - query.shape[1] :, None] - places
    scores = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    weights = np.where((distance >= 0) & (distance < window), np.exp(scores), 0)
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), value)


@given(st.data(), st.integers(1, 3), st.integers(1, 30), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_banded_is_dense_attention_with_a_mask(data, batch, length, heads, window, plain):
    past = data.draw(st.integers(0, window - 1))
    rng = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(batch, n, heads, 6, generator=rng) for n in (length, past + length, past + length))
    # The plain kernel lays its result out in another order than the fused one.
    with sdpa_kernel([SDPBackend.MATH] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        found = attention.banded(query, key, value, window)
    assert_close(found, dense(query, key, value, window), "float32")


def test_positions_turn_pairs_and_only_distances_count():
    turn = attention.rotation(50, 8, torch.device("cpu"))
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attention.rotate(x, turn, 0), x)
    angles = 3.0 * 10_000.0 ** (-np.arange(4) / 4)
    a, b = x.flatten().double().numpy().reshape(2, 4)
    turned = [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)]
    assert_close(attention.rotate(x, turn, 3).flatten(), np.concatenate(turned), "float32")
    products = [(attention.rotate(x, turn, i + 9) * attention.rotate(y, turn, i)).sum() for i in (0, 1, 30)]
    assert_close(torch.stack(products), np.full(3, products[0]), "float32")
    assert abs((attention.rotate(x, turn, 8) * y).sum() - products[0]) > 1e-3


def test_where_a_text_stands_does_not_matter_but_its_order_does():
    model = built(memories=(), layers=1)
    hidden = model(TOKENS, model.start(2))[0]
    later = model(torch.cat([drawn(2, 23, seed=5), TOKENS], 1), model.start(2))[0][:, 23:]
    assert_close(later[:, 4:], hidden[:, 4:], "float32")
    swapped = TOKENS[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(swapped, model.start(2))[0][:, 3], hidden[:, 3], atol=1e-3)


def test_logits_are_of_256_bytes_and_a_seed_fixes_the_model():
    assert MODEL.logits(WHOLE[0]).shape == (2, 37, 256)
    assert MODEL.logits(WHOLE[0].bfloat16().to(MODEL.embedding.weight)).dtype == torch.float32
    first, second, other = (built(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(x, other[name]) for name, x in first.items() if x.ndim > 1)
    assert set(built(memories=(2, 0)).memories) == {"0", "2"}


# Settings


MODEL_RULES = [
    ("width", 0), ("width", 6.0), ("width", True), ("layers", -1), ("layers", "two"), ("heads", 0), ("hidden", None),
    ("window", 0), ("width", 18), ("memories", [3]), ("memories", [-1]), ("memories", [1, 1]), ("memories", 1),
    ("memories", "01"), ("memories", [0.5]), ("memories", [True]), ("memory", 3), ("memory", {"slots": 4}),
    ("mixer", "mamba"), ("mixer", None), ("mixer", ["delta"]), ("context", 0), ("memory", {"top_k": 0}),
    ("memory", {"top_k": 9, "num_subkeys": 8}), ("memory", {"boundary": "wait"}),
]  # fmt: skip
TRAINING_RULES = [
    ("steps", 0), ("steps", -5), ("steps", 1.5), ("steps", True), ("batch", 0), ("length", 0), ("length", "64"),
    ("warmup", -1), ("warmup", 0.5), ("seed", -1), ("seed", "one"), ("facts", -0.1), ("facts", 1.1), ("facts", "all"),
    ("facts", float("nan")), ("span", 0), ("span", 1.5), ("gap", -1), ("gap", 0.5), ("decay", -1), ("decay", None),
    ("learning_rate", 0), ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("clip", 0), ("clip", [1]),
    ("asked_weight", 0), ("asked_weight", -1), ("weight_decay", -0.1), ("weight_decay", "0"),
]  # fmt: skip
RULES = [("model", *rule) for rule in MODEL_RULES] + [("training", *rule) for rule in TRAINING_RULES]


@pytest.mark.parametrize(("table", "field", "value"), RULES, ids=[f"{f} {v}" for _, f, v in RULES])
def test_a_broken_rule_names_file_field_and_value(table, field, value):
    tables = {"model": {"width": 16, "heads": 2, "layers": 3}, "training": {"length": 4096}}
    Experiment.of(tables, "right.toml")
    tables[table][field] = value
    with pytest.raises(ValueError, match=rf"^some\.toml: .*{field}") as error:
        Experiment.of(tables, "some.toml")
    wrong = next(iter(value)) if isinstance(value, dict) else None
    assert wrong in str(error.value) if wrong else repr(value).strip("[]") in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixer": "delta"}, "model.mixer must be \"fwpkm\" where model.memories is empty. Received: 'delta'"),
        ({"mixer": "delta", "memories": [1], "memory": {"top_k": 4}}, "model.memory must be empty with mixer"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Experiment.of({"model": fields}, "some.toml")


def test_a_sequence_ends_where_a_chunk_does():
    tables = {"model": {"memories": [1]}, "training": {"length": 4000}}
    with pytest.raises(ValueError, match=re.escape("some.toml: training.length must be a multiple of model.memory")):
        Experiment.of(tables, "some.toml")
    Experiment.of({**tables, "model": {}}, "without memories")


@pytest.mark.parametrize(("gap", "chunk"), [(512, 512), (520, 1024)])
def test_a_fact_is_written_before_it_is_stated_again(gap, chunk):
    tables = {"model": {"memories": [1], "memory": {"chunk_size": chunk}}, "training": {"gap": gap}}
    with pytest.raises(ValueError, match=f"training.gap must be more than model.memory.chunk_size, .*gap={gap}"):
        Experiment.of(tables, "some.toml")
    Experiment.of({**tables, "model": {}}, "without memories")
    Experiment.of({**tables, "training": {"gap": gap, "facts": 0.0}}, "without facts")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = ", "is not TOML"),
        (b"# \xff\n[model]\n", "is not TOML"),
        ("a = " + 100_000 * "[", "is not TOML"),
        (b"\xef\xbb\xbf[models]\n", "unknown tables ['models']"),
        ("[training]\nstep = 3\n", "unknown fields ['step'] of [training]"),
        ("[model]\ndepth = 3\n", "unknown fields ['depth'] of [model]"),
        ("[models]\n", "unknown tables ['models']"),
        ("model = 3\n", "[model] must be a table. Received: 3"),
        ("training = [1]\n", "[training] must be a table. Received: [1]"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, said):
    path = tmp_path / "some.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Experiment.read(path, steps=3)
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        Experiment.read(tmp_path / "none.toml")


def test_experiments_survive_json_and_take_overrides(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("[model]\nmemories = [4, 1]\nmemory = { top_k = 4 }\n[training]\nsteps = 7\nseed = 1\n")
    read = Experiment.read(path, seed=5)
    assert (read.model.memories, read.training.steps, read.training.seed) == ((4, 1), 7, 5)
    assert read.model.memory_config(learning_rate=0.0).learning_rate == 0
    assert (read.model.memory_config().top_k, read.model.memory_config().value_dim) == (4, 256)
    assert Experiment.of(json.loads(json.dumps(read.tables())), "again") == read != Experiment.read(path)
    for config in (ROOT / "examples/language_model/configs").glob("*.toml"):
        experiment = Experiment.read(config)
        assert Experiment.of(json.loads(json.dumps(experiment.tables())), "again") == experiment


@given(st.integers(1, 400), st.integers(0, 500), st.floats(0, 1))
def test_the_rate_rises_stays_and_falls_to_0(steps, warmup, decay):
    settings = TrainingSettings(steps=steps, warmup=warmup, decay=decay, learning_rate=0.5)
    rates = np.array([settings.rate(step) for step in range(steps)])
    assert (rates > 0).all()
    assert (rates <= 0.5).all()
    assert settings.rate(steps) == 0
    assert (np.diff(np.sign(np.diff(rates.round(12)))) <= 0).all()  # up, level, down
    level = np.arange(steps)[warmup : int(steps * (1 - decay))]
    assert (rates[level] == 0.5).all()


def test_rates_of_a_schedule():
    settings = TrainingSettings(steps=10, warmup=4, decay=0.4, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
