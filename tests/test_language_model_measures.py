"""What the language model's measurements ask, what they compare with, and what they write down."""

import json
import math
import types

import numpy as np
import pytest
import torch
from asserting import assert_close
from safetensors.torch import save_file

from examples.language_model import by_position, checkpoint, facts, inside, needle, training
from examples.language_model.corpus import Corpus, Texts
from examples.language_model.model import LanguageModel, Reading
from examples.language_model.settings import Experiment, ModelSettings
from fwpkm import Memory, State

CPU = torch.device("cpu")
MODEL = {"width": 16, "layers": 2, "heads": 2, "window": 8, "hidden": 16, "memories": [1]}
MEMORY = {"num_subkeys": 8, "top_k": 2, "chunk_size": 96}  # which 1,024 is no multiple of
TRAINING = {"steps": 1, "batch": 1, "length": 96, "facts": 0.0}
EXPERIMENT = Experiment.of({"model": {**MODEL, "memory": MEMORY}, "training": TRAINING}, "test")
SIZES = (5121, 5120, 6000, 5500)


def texts():
    data = np.random.default_rng(0).choice(np.frombuffer(b"etaoin shrdlu", np.uint8), sum(SIZES))
    return Texts(data, np.cumsum([0, *SIZES]), tuple("abcd"))


CORPUS = Corpus(texts(), texts(), "5ha")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """With a memory, and without; weights are large enough that memories show."""
    root = tmp_path_factory.mktemp("models")
    plain = Experiment.of({"model": {**MODEL, "memories": []}, "training": TRAINING}, "test")
    for name, experiment in (("memory", EXPERIMENT), ("plain", plain)):
        path = training.train(experiment, CORPUS, root / name, CPU)
        tensors, about = checkpoint._read(path)
        grown = {key: 8 * x if x.ndim > 1 else x for key, x in tensors.items()}
        save_file(grown, path, {**about, "weights": checkpoint.digest(grown)})
    return root


# Needles


def test_wilson_against_published_intervals():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for successes, samples, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert needle.wilson(successes, samples) == pytest.approx((low, high), abs=5e-5)
    assert needle.wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def small(**memory):
    torch.manual_seed(0)
    model = LanguageModel(ModelSettings(**MODEL, memory=MEMORY), **memory).requires_grad_(False)
    for p in model.parameters():
        p.mul_(10 if p.ndim > 1 else 1)
    return model


def test_answers_are_greedy_and_write_nothing():
    model = small()
    tokens = torch.from_numpy(np.stack([CORPUS.train.document(i)[:300] for i in (0, 2, 3)]))
    reading = needle.read(model, tokens, model.start(3))
    kept = [x.clone() for x in reading.memories[0].memory]
    question = tokens[:, :20]
    said = needle.answer(model, question, reading)
    asked = question.long()
    for i in range(6):
        hidden, _ = model(asked, reading, update=False)
        best = model.logits(hidden[:, -1]).argmax(-1)
        assert torch.equal(said[:, i], best)
        asked = torch.cat([asked, best[:, None]], 1)
    assert said.shape == (3, 6)
    assert all(map(torch.equal, reading.memories[0].memory, kept))


def test_another_document_gives_its_memory_and_nothing_else():
    model = small()
    tokens = torch.from_numpy(np.stack([CORPUS.train.document(i)[:300] for i in (0, 2, 3)]))
    reading = needle.read(model, tokens, model.start(3))
    swapped = needle.another(reading)
    for own, other in zip(reading.memories, swapped.memories):
        for mine, its in zip(own.memory, other.memory):
            assert all(torch.equal(its[row], mine[row - 1]) for row in range(3))
        assert all(map(torch.equal, own[1:], other[1:]))
    assert all(map(torch.equal, reading.windows, swapped.windows))
    assert not torch.equal(reading.memories[0].memory.values[0], swapped.memories[0].memory.values[0])


def test_long_texts_are_read_in_segments(monkeypatch):
    model = small()
    tokens = torch.from_numpy(CORPUS.train.document(0)[None, :500])
    whole, _ = model(tokens.long(), model.start(1))
    monkeypatch.setattr(needle, "SEGMENT", 130)
    seen = []
    needle.read(model, tokens, model.start(1), each=lambda start, hidden: seen.append((start, hidden)))
    assert [start for start, _ in seen] == [0, 130, 260, 390]
    assert_close(torch.cat([hidden for _, hidden in seen], 1), whole, "float32")


@pytest.mark.parametrize("at_once", [2, 3, 4, 8, 64])
def test_parts_hold_everything_and_none_is_alone(at_once):
    for number in range(2, 70):
        parts = needle.parts(number, at_once)
        assert np.concatenate(parts).tolist() == list(range(number))
        assert all(2 <= len(part) <= max(at_once, 3) for part in parts)
    assert [part.tolist() for part in needle.parts(1, at_once)] == [[0]]


class Finder:
    """A hand-made model that remembers every byte it read, and says what followed the same bytes there."""

    def __init__(self, writes=True, memory=True):
        self.settings = ModelSettings(**{**MODEL, "memories": [1] if memory else []})
        self.memories = {"1": types.SimpleNamespace(config=self.settings.memory_config())} if memory else {}
        self.writes = writes and memory

    def start(self, batch):
        empty = torch.zeros(batch, 0, dtype=torch.long)
        state = State(Memory(empty, empty), empty, empty, empty, empty, torch.zeros(batch))
        return Reading((state,) if self.memories else (), (empty,))

    def __call__(self, tokens, reading, update=True, inplace=False):
        memories = reading.memories
        if update and self.writes:
            state = memories[0]
            memories = (state._replace(memory=Memory(state.memory.keys, torch.cat([state.memory.values, tokens], 1))),)
        window = tokens if update else torch.cat([reading.windows[0], tokens], 1)
        hidden = torch.zeros(*tokens.shape, 256)
        for row in range(len(tokens)) if not update and self.memories else ():
            remembered, asked = (bytes(x[row].tolist()) for x in (memories[0].memory.values, window))
            place = remembered.find(asked)
            hidden[row, -1, 0 if place < 0 else remembered[place + len(asked)]] = 1
        return hidden, Reading(memories, (window[:, :0] if update else window,))

    def logits(self, hidden):
        return hidden


def loading(monkeypatch, memory=True):
    def load(folder, device, memory_scope, learning_rate=1.0):
        assert memory_scope == "sequence"
        model = Finder(learning_rate > 0, memory)
        return model, Experiment.of({"model": {**MODEL, "memories": [1] if memory else []}}, "test")

    monkeypatch.setattr(needle, "load", load)


ASKED = {"lengths": [1400, 2000], "samples": 5, "readings": 2, "phrasings": ["seen-0", "unseen-1"]}


def test_each_control_takes_from_the_model_what_it_says(monkeypatch, tmp_path):
    loading(monkeypatch)
    said = []
    out = needle.measure(tmp_path / "run", CORPUS, tmp_path / "new/folder/out.json", CPU, **ASKED, controls=True,
                         tell=said.append)  # fmt: skip
    results = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    rows = results.pop("rows")
    assert results["corpus"] == "5ha"
    assert results["device"] == "CPU"
    keys = [(r["control"], r["phrasing"], r["length"], r["readings"]) for r in rows]
    expected = {(c, p, n, r) for c in ("memory", "another document's memory") for p in ASKED["phrasings"]
                for n in ASKED["lengths"] for r in (1, 2)}  # fmt: skip
    expected |= {("learning rate 0", p, n, 1) for p in ASKED["phrasings"] for n in ASKED["lengths"]}
    assert len(keys) == len(set(keys)) == len(said) == 20
    assert set(keys) == expected
    for row in rows:
        right = 6 if row["control"] == "memory" else 0
        assert row["right"] == [right] * 5
        assert (row["exact"], row["digits"], row["samples"], row["trained"]) == (right / 6, right / 6, 5, "run")
        assert row["exact_interval"] == list(needle.wilson(5 * right // 6, 5))
        assert len(row["depth"]) == 5


def test_a_model_without_memory_is_asked_once_and_without_controls(monkeypatch, tmp_path):
    loading(monkeypatch, memory=False)
    out = needle.measure(tmp_path, CORPUS, tmp_path / "out.json", CPU, **ASKED, controls=True, tell=lambda line: None)
    rows = json.loads(out.read_text())["rows"]
    assert [(r["control"], r["readings"], r["exact"]) for r in rows] == [("no memory", 1, 0)] * 4


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_batches_of_any_size_ask_the_same(monkeypatch, at_once):
    model, rng = small(), np.random.default_rng(0)
    haystack = facts.haystacks(CORPUS.heldout, rng, 7, 1400, facts.SEEN[0])
    said = {}
    answer = needle.answer

    def told(*arguments):
        found = answer(*arguments)
        said[size].append(found)
        return found

    monkeypatch.setattr(needle, "answer", told)
    for size in (7, at_once):
        said[size] = []
        monkeypatch.setattr(needle, "together", lambda *a, **k: size)  # noqa: B023  (called in this round)
        found = list(needle.try_out(model, haystack, CPU, 2, swap=True))
        assert [(count, swapped) for count, swapped, _ in found] == [(1, False), (1, True), (2, False), (2, True)]
        assert all(right.shape == (7, 6) for *_, right in found)
    for turn in (0, 2):  # own memories; another's differ with the parts
        parts = [torch.cat(said[size][turn::4]) for size in (7, at_once)]
        assert torch.equal(*parts)


WRONG = {
    "an unknown phrasing": ({"phrasings": ["seen-0", "seen-120"]}, "a phrasing is seen-0 to .*Received: seen-120"),
    "a short length": ({"lengths": [1400, 700]}, f"in front of {ModelSettings(**MODEL).beyond} clear .*Received: 700"),
    "a long length": ({"lengths": [1400, 9000]}, "No document is long enough"),
    "no samples": ({"samples": 0}, "samples=0"),
    "no readings": ({"readings": 0}, "readings=0"),
    "one sample": ({"samples": 1}, "samples=1"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said_before_anything_is_read(monkeypatch, tmp_path, changed, said):
    loading(monkeypatch)
    monkeypatch.setattr(needle, "try_out", lambda *a, **k: pytest.fail("has begun"))
    with pytest.raises(ValueError, match=said):
        needle.measure(tmp_path, CORPUS, tmp_path / "out.json", CPU, **{**ASKED, **changed}, controls=True)
    with pytest.raises(ValueError, match="is a folder"):
        needle.measure(tmp_path, CORPUS, tmp_path, CPU, **ASKED, controls=False)
    assert not (tmp_path / "out.json").exists()


def test_what_is_looked_into_lies_beyond_attention_too(monkeypatch, folders, tmp_path):
    monkeypatch.setattr(inside, "LENGTH", 300)
    with pytest.raises(ValueError, match=f"in front of {EXPERIMENT.model.beyond} clear bytes. Received: 300"):
        inside.draw(folders / "memory", CORPUS, tmp_path, CPU)


# Bits


def direct(model, tokens, reading, update=True):
    """Bits of each byte after the first, by one call and NumPy: [B, T / 1024]."""
    hidden, after = model(tokens[:, :-1].long(), reading, update=update)
    logits = model.logits(hidden).double().numpy()
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits = -np.take_along_axis(logs, tokens[:, 1:, None].long().numpy(), -1)[..., 0] / math.log(2)
    return bits.reshape(len(bits), -1, 1024).mean(-1), after


def test_bits_are_cross_entropies_and_modes_differ_in_the_tables_alone(folders, tmp_path):
    out = by_position.measure(folders / "memory", CORPUS, tmp_path / "new/out.json", CPU, length=5120)
    results = json.loads(out.read_text())
    assert (results["documents"], results["bin"], results["trained"]) == (["a", "c", "d"], 1024, "memory")
    assert results["corpus"] == "5ha"
    model = checkpoint.load(folders / "memory", CPU, memory_scope="sequence")[0]
    tokens = torch.from_numpy(np.stack([CORPUS.heldout.document(i)[:5121] for i in (0, 2, 3)]))
    start = model.start(3)
    reset, after = direct(model, tokens, start)
    turned = Memory(*(torch.stack([table[2], table[0], table[1]]) for table in after.memories[0].memory))
    begun = start._replace(memories=(start.memories[0]._replace(memory=turned),))
    expected = {"reset": reset, "carried": direct(model, tokens, begun)[0],
                "frozen": direct(model, tokens, start, update=False)[0]}  # fmt: skip
    assert results["bits"].keys() == expected.keys()
    for mode, bits in expected.items():
        np.testing.assert_allclose(results["bits"][mode], bits, atol=6e-5, rtol=0, err_msg=mode)  # written to 1e-4
    assert np.abs(expected["reset"] - expected["frozen"]).max() > 1e-3
    assert np.abs(expected["reset"] - expected["carried"]).max() > 1e-3
    found, _ = by_position.bits(model, tokens, model.start(3), update=True)
    assert_close(found, reset, "float32")


def test_documents_are_those_that_are_long_enough(folders, tmp_path):
    out = by_position.measure(folders / "plain", CORPUS, tmp_path / "out.json", CPU, length=5120)
    results = json.loads(out.read_text())
    assert np.shape(results["bits"]["no memory"]) == (3, 5)
    assert results["bits"].keys() == {"no memory"}
    tokens, names = by_position.documents(CORPUS, 5120)
    assert (tokens.shape, names) == ((3, 5121), ["a", "c", "d"])  # b lacks the byte after
    assert all(np.array_equal(row, CORPUS.heldout.document(i)[:5121]) for row, i in zip(tokens, (0, 2, 3)))


def test_lengths_that_no_document_has(folders, tmp_path):
    nothing = Texts(np.zeros(0, np.uint8), np.array([0]), ())
    for length, said in ((6144, "more than 6144 bytes; the longest has 6000"), (1000, "multiple of 1,024"),
                         (0, "multiple of 1,024"), (-1024, "multiple of 1,024")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            by_position.measure(folders / "plain", CORPUS, tmp_path / "out.json", CPU, length=length)
    with pytest.raises(ValueError, match="the longest has 0"):
        by_position.measure(folders / "plain", CORPUS._replace(heldout=nothing), tmp_path / "o", CPU, length=1024)
    with pytest.raises(ValueError, match="is a folder"):
        by_position.measure(folders / "plain", CORPUS, tmp_path, CPU, length=1024)
    with pytest.raises(FileNotFoundError, match="train first"):
        by_position.measure(tmp_path / "none", CORPUS, tmp_path / "out.json", CPU, length=1024)
