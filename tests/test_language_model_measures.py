"""What the language model's measurements ask, what they compare with, and what they write down."""

import json
import math
import types

import numpy as np
import pytest
import torch
from asserting import assert_close
from safetensors.torch import save_file

from examples.language_model import by_position, capacity, checkpoint, inside, needle, phrasings, training
from examples.language_model.corpus import Corpus, Texts
from examples.language_model.haystacks import haystacks
from examples.language_model.model import LanguageModel, Reading
from examples.language_model.settings import Experiment, ModelSettings
from fwpkm import Memory, State, get_backend

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


def greedy(model, question, reading):
    """Six bytes, the likeliest each, one call after the other."""
    said, ask = [], question.long()
    for _ in range(6):
        hidden, reading = model(ask, reading, update=False)
        said.append(ask := model.logits(hidden[:, -1:]).argmax(-1))
    return torch.cat(said, 1)


def test_an_answer_is_right_where_greedy_decoding_writes_it_and_nothing_is_written():
    model = small()
    tokens = torch.from_numpy(np.stack([CORPUS.train.document(i)[:300] for i in (0, 2, 3)]))
    reading = needle.read(model, tokens, model.start(3))
    kept = [x.clone() for x in reading.memories[0].memory]
    asked, value = torch.zeros(3, 2, 40, dtype=torch.uint8), torch.tensor([[20, 9], [33, 20], [20, 34]])
    for row, (first, second) in enumerate(value.tolist()):
        for i, size in enumerate((first, second)):
            asked[row, i, :size] = tokens[(row + i) % 3, 40 : 40 + size]
    for i, row in np.ndindex(2, 3):
        alone = Reading(
            tuple(get_backend("torch").select(model.memories["1"].config, s, [row]) for s in reading.memories),
            tuple(past[:, row : row + 1] for past in reading.windows),
        )
        size = value[row, i]
        asked[row, i, size : size + 6] = greedy(model, asked[row, i, None, :size], alone)[0]
    assert needle.answers(model, asked, value, reading).all()
    wrong = asked.clone()
    wrong[1, 0, value[1, 0] + 2] ^= 1
    right = needle.answers(model, wrong, value, reading)
    assert right.all(2).tolist() == [[True, True], [False, True], [True, True]]
    assert right[1, 0, :2].all()
    assert not right[1, 0, 2]
    assert all(map(torch.equal, reading.memories[0].memory, kept))


def test_continuations_of_a_sequence_share_its_memory_and_are_never_written():
    model = small()
    tokens = torch.from_numpy(np.stack([CORPUS.train.document(i)[:300] for i in (0, 2)]))
    reading = needle.read(model, tokens, model.start(2))
    with pytest.raises(ValueError, match="a row for each"):
        model(tokens[[0, 0, 1, 1], :20].long(), reading.fork(2))
    with pytest.raises((ValueError, RuntimeError)):
        model(tokens[[0, 0, 1], :19].long(), reading.fork(2), update=False)


def test_another_document_gives_its_memory_and_nothing_else():
    model = small(usage_weight=1.0)
    tokens = torch.from_numpy(np.stack([CORPUS.train.document(i)[:300] for i in (0, 2, 3)]))
    reading = needle.read(model, tokens, model.start(3))
    swapped = needle.another(reading)
    for own, other in zip(reading.memories, swapped.memories):
        for mine, its in zip((*own.memory, own.uses), (*other.memory, other.uses)):
            assert all(torch.equal(its[row], mine[row - 1]) for row in range(3))
        assert all(map(torch.equal, (*own.pending, own.position), (*other.pending, other.position)))
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
        return Reading((state,) if self.memories else (), (empty[None],))

    def __call__(self, tokens, reading, update=True, inplace=False):
        memories = reading.memories
        if update and self.writes:
            state = memories[0]
            memories = (state._replace(memory=Memory(state.memory.keys, torch.cat([state.memory.values, tokens], 1))),)
        hidden = torch.zeros(*tokens.shape, 256)
        for row, asked in enumerate(tokens.tolist()) if not update and self.memories else ():
            values = memories[0].memory.values
            remembered = bytes(values[row * len(values) // len(tokens)].tolist())
            for end in range(8, len(asked)):
                begin = remembered.find(bytes(asked[:end]))
                hidden[row, end - 1, 0 if begin < 0 else remembered[begin + end]] = 1
        return hidden, Reading(memories, reading.windows)

    def logits(self, hidden):
        return hidden


def loading(monkeypatch, memory=True):
    def load(folder, device, memory_scope, boundary, learning_rate=1.0):
        assert (memory_scope, boundary) == ("sequence", "wait")
        model = Finder(learning_rate > 0, memory)
        return model, Experiment.of({"model": {**MODEL, "memories": [1] if memory else []}}, "test")

    monkeypatch.setattr(needle, "load", load)


CELLS = (
    needle.Cell("near", 1600, 5, 2, True), needle.Cell("near", 2000, 4, 2, True), needle.Cell("held out: link", 1700, 3)
)  # fmt: skip


def test_each_control_takes_from_the_model_what_it_says(monkeypatch, tmp_path):
    loading(monkeypatch)
    said = []
    out = needle.measure(tmp_path / "run", CORPUS, tmp_path / "new/folder/out.json", CPU, CELLS, tell=said.append)
    results = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    rows = results.pop("rows")
    assert (results["corpus"], results["device"], results["trained"]) == ("5ha", "CPU", "run")
    keys = [(r["control"], r["kind"], r["length"], r["readings"]) for r in rows]
    expected = {
        (c, "near", n, r) for c in ("memory", "another document's memory") for n in (1600, 2000) for r in (1, 2)
    }
    expected |= {("learning rate 0", "near", n, 1) for n in (1600, 2000)} | {("memory", "held out: link", 1700, 1)}
    assert len(keys) == len(set(keys)) == len(said) == 11
    assert set(keys) == expected
    contexts = {cell.length: cell.contexts for cell in CELLS}
    for row in rows:
        right, number = 6 if row["control"] == "memory" else 0, contexts[row["length"]]
        assert row["right"] == [[right] * 5] * number
        assert (row["exact"], row["digits"], row["answers"]) == (right / 6, right / 6, 5 * number)
        assert row["exact_interval"] == list(needle.wilson(5 * number * right // 6, 5 * number))
        assert np.shape(row["depth"]) == (number, 5)


def test_a_model_without_memory_is_asked_once_and_without_controls(monkeypatch, tmp_path):
    loading(monkeypatch, memory=False)
    out = needle.measure(tmp_path, CORPUS, tmp_path / "out.json", CPU, CELLS, tell=lambda line: None)
    rows = json.loads(out.read_text())["rows"]
    assert [(r["control"], r["readings"], r["exact"]) for r in rows] == [("no memory", 1, 0)] * 3


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_batches_of_any_size_ask_the_same(monkeypatch, at_once):
    model, rng = small(), np.random.default_rng(0)
    haystack = haystacks(CORPUS.heldout, rng, 7, 1600, phrasings.near)
    logits = []
    kept = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits.append(kept(hidden)) or logits[-1])
    said = {}
    for size in (7, at_once):
        monkeypatch.setattr(needle, "together", lambda *a, **k: size)  # noqa: B023  (called in this round)
        logits.clear()
        found = list(needle.try_out(model, haystack, CPU, 2, swap=True))
        assert [(count, swapped) for count, swapped, _ in found] == [(1, False), (1, True), (2, False), (2, True)]
        assert all(right.shape == (7, 5, 6) for *_, right in found)
        said[size] = [torch.cat(logits[turn::4]) for turn in (0, 2)]  # own memories; another's differ with the parts
    for whole, parted in zip(said[7], said[at_once]):
        assert_close(parted, whole, "float32")


def test_questions_of_a_context_are_asked_in_parts(monkeypatch):
    model = small()
    haystack = haystacks(CORPUS.heldout, np.random.default_rng(0), 2, 2000, phrasings.short, facts=7, nearby=4)
    reading = needle.read(model, torch.from_numpy(haystack.tokens), model.start(2))
    asked, value = torch.from_numpy(haystack.asked), torch.from_numpy(haystack.value)
    whole = needle.answers(model, asked, value, reading)
    assert whole.any()
    monkeypatch.setattr(needle, "AT_ONCE", 3)
    assert torch.equal(needle.answers(model, asked, value, reading), whole)


def test_the_protocol_asks_a_thousand_needles_a_cell():
    answers = {(c.kind, c.length): (5 * c.contexts, c.readings, c.controls) for c in needle.PROTOCOL}
    assert {key: answers[key] for key in answers if key[0] == "near"} == {
        ("near", n): (1000, 4, True) for n in (4096, 32768, 131072)
    }
    held = [key for key in answers if key[0].startswith("held out")]
    assert len(held) == 10
    assert sum(answers[key][0] for key in held) == 2000
    assert set(needle.KINDS) == {kind for kind, _ in answers}


def test_cells_of_ones_own():
    assert needle.chosen(None, None, None, None) == sorted(
        needle.PROTOCOL, key=lambda cell: list(needle.KINDS).index(cell.kind)
    )
    assert needle.chosen(["near"], [2000, 2000], 3, 1) == [needle.Cell("near", 2000, 3, 1, True)]
    assert [cell.contexts for cell in needle.chosen(["far"], None, 7, None)] == [7, 7]


WRONG = {
    "an unknown kind": (needle.Cell("seen-0", 1400), "what is asked is one of near, far, .*Received: 'seen-0'"),
    "a short length": (needle.Cell("near", 700), "in front of .* clear bytes. Received: 700"),
    "a long length": (needle.Cell("near", 9000), "No document is long enough"),
    "no contexts": (needle.Cell("near", 1600, 0), "contexts=0"),
    "no readings": (needle.Cell("near", 1600, 2, 0), "readings=0"),
    "one context": (needle.Cell("near", 1600, 1, controls=True), "contexts=1"),
}


@pytest.mark.parametrize(("cell", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said_before_anything_is_read(monkeypatch, tmp_path, cell, said):
    loading(monkeypatch)
    monkeypatch.setattr(needle, "try_out", lambda *a, **k: pytest.fail("has begun"))
    with pytest.raises(ValueError, match=said):
        needle.measure(tmp_path, CORPUS, tmp_path / "out.json", CPU, (*CELLS, cell))
    with pytest.raises(ValueError, match="is a folder"):
        needle.measure(tmp_path, CORPUS, tmp_path, CPU, CELLS)
    assert not (tmp_path / "out.json").exists()


# Capacity


def test_capacity_asks_for_every_fact_of_ever_more(monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "load", lambda *a, **k: (Finder(), EXPERIMENT))
    monkeypatch.setattr(capacity, "CONTEXTS", (2, 2))
    monkeypatch.setattr(Reading, "nbytes", 77)
    said = []
    out = capacity.measure(tmp_path, CORPUS, tmp_path / "o.json", CPU, length=3000, numbers=(2, 30), tell=said.append)
    results = json.loads(out.read_text())
    assert (results["state_bytes"], results["corpus"], len(said)) == (77, "5ha", 2)
    assert [(r["facts"], r["answers"], r["exact"]) for r in results["rows"]] == [(2, 4, 1.0), (30, 60, 1.0)]
    assert np.shape(results["rows"][1]["right"]) == (2, 30)
    with pytest.raises(ValueError, match=r"length must be at least .* for 3,000 statements"):
        capacity.measure(tmp_path, CORPUS, tmp_path / "o.json", CPU, length=3000, numbers=(3000,))


def test_capacity_asks_about_as_many_questions_whatever_the_number():
    assert [capacity.contexts(n) for n in (5, 50, 500, 3000)] == [100, 20, 8, 8]


def test_what_is_looked_into_lies_beyond_attention_too(monkeypatch, folders, tmp_path):
    monkeypatch.setattr(inside, "LENGTH", 300)
    with pytest.raises(ValueError, match=r"clear bytes\. Received: 300"):
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
    model = checkpoint.load(folders / "memory", CPU, **needle.MEMORIES)[0]
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
