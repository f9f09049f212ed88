"""What a memory keeps while it reads other domains: models made by hand, whose retention is known."""

import json
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_language_model_measures import EXPERIMENT, MEMORY, MODEL

from examples.language_model import checkpoint, corpus, domains, needle, retained, retention, run, training
from examples.language_model.commands import main
from examples.language_model.corpus import Texts
from examples.language_model.domains import Domain, Domains
from examples.language_model.model import Reading
from examples.language_model.settings import Experiment, ModelSettings
from fwpkm import Memory, State

CPU = torch.device("cpu")
SIZE, OTHER, TEXTS = 2048, 1024, 2
NAMES = ("novels", "poetry", "plays")


LETTERS = 16  # of a domain, that others do not have


def texts(domain, size, seed=0):
    data = np.random.default_rng([domain, seed]).integers(LETTERS, size=size) + 128 + LETTERS * domain
    return Texts(data.astype(np.uint8), np.array([0, size]), ("x",))


DOMAINS = Domains(
    tuple(Domain(name, texts(i, TEXTS * SIZE), texts(i, TEXTS * (OTHER + 1), 1)) for i, name in enumerate(NAMES)),
    Domain("history", texts(3, TEXTS * SIZE), texts(3, 0)), "5ha", "d0ma1n5",
)  # fmt: skip


class Recaller:
    """A hand-made model, whose memory holds the last bytes that it read, ``holds`` of them.

    It knows what followed the last 16 bytes there; else the letters of a domain, of which it has one there.
    """

    def __init__(self, holds):
        self.settings, self.holds = ModelSettings(**MODEL), holds
        self.memories = {"1": types.SimpleNamespace(config=self.settings.memory_config())}
        self.read, self.frozen = [], []

    def start(self, batch):
        empty = torch.zeros(batch, 0, dtype=torch.long)
        state = State(Memory(empty, empty), empty, empty, empty, empty, torch.zeros(batch))
        return Reading((state,), (torch.zeros(2, batch, 0, 16),))

    def __call__(self, tokens, reading, update=True, inplace=False):
        (state,), windows = reading
        if update:
            self.read.append(tokens.clone())
            values = torch.cat([state.memory.values, tokens], 1)
            values = values[:, max(0, values.shape[1] - self.holds) :]
            state = state._replace(memory=Memory(state.memory.keys, values))
        else:
            self.frozen.append(tokens.clone())
        hidden = np.zeros((*tokens.shape, 256), np.float32)
        for row, asked in enumerate(tokens.numpy().astype(np.uint8)) if not update else ():
            values = state.memory.values
            known, text = bytes(values[row * len(values) // len(tokens)].tolist()), bytes(asked)
            for domain in {x // LETTERS for x in known}:
                hidden[row, asked // LETTERS == domain, LETTERS * domain : LETTERS * (domain + 1)] = 10
            for end in range(16, len(text)):
                if (at := known.find(text[end - 16 : end])) >= 0 and at + 16 < len(known):
                    hidden[row, end - 1, known[at + 16]] = 20
        hidden = torch.from_numpy(hidden)
        return hidden, Reading((state,), tuple(torch.ones(2, len(tokens), 3, 16) for _ in windows))

    def logits(self, hidden):
        return hidden


def measured(monkeypatch, path, holds, seed=0, **options):
    model = Recaller(holds)
    experiment = Experiment.of({"model": MODEL, "training": {"seed": seed}}, "test")
    monkeypatch.setattr(retention, "load", lambda *a, **k: (model, experiment))
    monkeypatch.setattr(retention, "corpus_of", lambda folder: "5ha")
    monkeypatch.setattr(Reading, "nbytes", 77)
    given = {"size": SIZE, "other": OTHER, "texts": TEXTS, "tell": lambda line: None, **options}
    retention.measure(path.parent / "run", DOMAINS, path, CPU, **given)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of models that remember everything, the last text alone, and the last two."""
    root = tmp_path_factory.mktemp("retention")
    with pytest.MonkeyPatch.context() as patch:
        for name, holds in (("all", 10**6), ("one", SIZE), ("two", 2 * SIZE)):
            measured(patch, root / f"{name}-0.retention.json", holds)
        measured(patch, root / "two-5.retention.json", 2 * SIZE, seed=5)
    return root


@pytest.fixture(scope="module")
def models(folder):
    return {model.label: model for model in retained.load(folder)}


def test_who_remembers_everything_keeps_all(models):
    for others in (1, 2):
        for kind in retained.KINDS:
            assert retained.retention(models["all"], kind, others)[:3] == pytest.approx((1, 1, 1), abs=1e-3)
        assert retained.needles(models["all"], others).mean == 1


def test_who_holds_one_text_keeps_nothing(models):
    for others in (1, 2):
        for kind in retained.KINDS:
            assert retained.retention(models["one"], kind, others)[:3] == pytest.approx((0, 0, 0), abs=1e-3)
        assert retained.needles(models["one"], others).mean == 0
    assert retained.needles(models["one"], 0).mean == 1


def test_who_holds_two_texts_keeps_all_after_one_and_nothing_after_two(models):
    for kind in retained.KINDS:
        assert retained.retention(models["two"], kind, 1).mean == pytest.approx(1, abs=1e-3)
        assert retained.retention(models["two"], kind, 2).mean == pytest.approx(0, abs=1e-3)
    assert [retained.needles(models["two"], n).mean for n in (0, 1, 2)] == [1, 1, 0]


def test_the_last_domain_shows_who_no_longer_learns(models, folder, tmp_path):
    """By hand for the formula: of (2.5 - 1.5) that a domain brings to a fresh memory the last brings 2.5 - 2.1."""
    for label in ("all", "one", "two"):
        assert retained.learned(models[label], "domain")[:3] == pytest.approx((1, 1, 1), abs=1e-3)
        # A little more: sentences interrupt the text that is read first.
        assert 1 < retained.learned(models[label], "episodes").mean < 1.05
    # Domains whose bits differ, so that a row must be held against the one that begins with its last domain.
    level = np.repeat([0.0, 1.0, 5.0], 2)[None, :, None]
    its = {"unread": level + 3, "filler": level + 2.5, "others": np.repeat(level + 2, 2, 2)}
    its |= {"kept": level + np.array([1.5, 1.6, 1.8]), "last": np.roll(level, 2, 1) + 2.1}
    model = models["all"]._replace(bits={"episodes": its})
    assert retained.learned(model, "episodes")[:3] == pytest.approx((0.4,) * 3)
    data = json.loads((folder / "two-0.retention.json").read_text())
    for row in data["rows"]:  # as files of before
        for kind in ("episodes", "domain", "right"):
            del row[kind]["last"]
    (tmp_path / "two-0.retention.json").write_text(json.dumps(data))
    (old,) = retained.load(tmp_path)
    assert retained.learned(old, "episodes") is None
    assert retained.retention(old, "episodes", 1).mean == pytest.approx(1, abs=1e-3)


def test_nothing_is_said_where_the_first_domain_brings_nothing(models, monkeypatch, tmp_path):
    measured(monkeypatch, tmp_path / "none.retention.json", 0)
    (model,) = retained.load(tmp_path)
    assert [retained.retention(model, kind, n) for kind in retained.KINDS for n in (1, 2)] == [None] * 4
    less = models["all"].bits["episodes"]
    for brings, said in ((0.02, True), (0.005, False)):
        less = {
            "filler": np.full((1, 6, 1), 2.0),
            "kept": np.full((1, 6, 3), 2 * (1 - brings)),
            "others": np.full((1, 6, 2), 2),
        }
        its = models["all"]._replace(bits={"episodes": {"unread": less["filler"], **less}})
        assert (retained.retention(its, "episodes", 1) is not None) == said


def test_every_domain_is_once_the_first_and_the_others_follow(monkeypatch, tmp_path):
    model = measured(monkeypatch, tmp_path / "x.json", 0)
    each = np.stack([domain.read.data.reshape(TEXTS, SIZE) for domain in DOMAINS.domains])
    rows = [(first, text) for first in range(3) for text in range(TEXTS)]
    filler, first, second, stated, *again = (x.numpy() for x in model.read)
    assert (filler == DOMAINS.filler.read.data.reshape(TEXTS, SIZE)[[text for _, text in rows]]).all()
    for x, others in ((first, 1), (second, 2)):
        assert (x == np.stack([each[(d + others) % 3, text] for d, text in rows])).all()
    assert all(map(np.array_equal, again, (first, second)))
    for row, (d, text) in zip(stated, rows):
        assert (row != each[d, text]).any()
        own = row[row >= 128]  # sentences are ASCII
        assert SIZE - 1024 < len(own) < SIZE - 5 * 20
        assert (own == each[d, text, : len(own)]).all()
    measured_on = [x for x in model.frozen if x.shape == (6, SIZE - 1024)]
    assert len(measured_on) == 2 * 8
    assert (measured_on[0].numpy() == np.stack([each[d, text, : SIZE - 1024] for d, text in rows])).all()


def test_rows_that_are_read_apart_give_the_same(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(retention, "AT_ONCE", 4)
    measured(monkeypatch, tmp_path / "two-0.retention.json", 2 * SIZE)
    apart, together = (json.loads((x / "two-0.retention.json").read_text()) for x in (tmp_path, folder))
    assert apart["rows"] == together["rows"]
    assert [(row["first"], row["text"]) for row in apart["rows"]] == [(name, i) for name in NAMES for i in range(TEXTS)]
    assert (apart["domains"], apart["corpus"], apart["names"]) == ("d0ma1n5", "5ha", [*NAMES, "history"])


# Models that were trained, and the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, and domains that it was not trained on."""
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    lines = [{"id": f"{i}", "text": "".join(rng.choice(list("etaoin shrdlu"), 3000))} for i in range(8)]
    for name, some in (("train", lines[:1]), ("heldout", lines[1:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    parts = [f'name = "{name}"\nsource = "books"\nread = ["{i}"]\n' for i, name in enumerate("abcd", 1)]
    parts = [f'[[domains]]\n{x}other = ["{i}"]\n' for i, x in enumerate(parts[:3], 5)] + [f"[filler]\n{parts[3]}"]
    (root / "list.toml").write_text("[sources.books]\n" + "".join(parts))
    main(["prepare", str(root), str(root / "corpus")])
    main(["domains", str(root / "domains"), "--list", str(root / "list.toml"), "--source", f"books={root}",
          "--corpus", str(root / "corpus")])  # fmt: skip
    training.train(EXPERIMENT, corpus.load(root / "corpus"), root / "run", CPU)
    tensors, about = checkpoint._read(root / "run" / checkpoint.WEIGHTS)
    grown = {key: 8 * x if x.ndim > 1 else x for key, x in tensors.items()}  # so that the memory shows
    save_file(grown, root / "run" / checkpoint.WEIGHTS, {**about, "weights": checkpoint.digest(grown)})
    return root


def command(trained, out, *more):
    main(["retention", "--model", str(trained / "run"), "--domains", str(trained / "domains"), "--out", str(out),
          "--size", "2048", "--other", "1024", "--texts", "1", "--device", "cpu", *more])  # fmt: skip
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def tiny(trained):
    """What the command saves of that model."""
    return command(trained, trained / "results/tiny-0.retention.json")


def test_from_domains_to_tables(trained, tiny, tmp_path, capsys):
    assert tiny["memory"] == {}
    assert tiny["state_bytes"] > 8**2 * 16 * 4
    bits = [row["episodes"][name] for row in tiny["rows"] for name in retained.MEMORIES]
    assert len({x for numbers in bits for x in numbers}) == 3 * (1 + 1 + 2 + 3)  # each memory has read something else
    main(["retained", str(trained / "results"), "--pictures", str(tmp_path / "pictures")])
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("#")] == [
        "### R on the texts that were read",
        "### R on other documents of their domain",
        "### Needles of the first text",
        "### R by what was read first",
        "### The last domain",
        "### Bits per byte",
    ]
    assert "| tiny | 0 |" in said
    assert (tmp_path / "pictures/retention.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_is_what_the_model_alone_gives(trained, tiny):
    """By calls of our own: read all, then, frozen, the first text without what came before it."""
    model = checkpoint.load(trained / "run", CPU, **needle.MEMORIES)[0]
    read = [domain.read.data[:2048] for domain in domains.load(trained / "domains").domains]
    for row, others in ((1, 1), (2, 2)):
        text = torch.from_numpy(np.concatenate([read[(row + n) % 3] for n in range(1, others + 1)])[None].astype(int))
        _, after = model(text, model.start(1))
        asked = torch.from_numpy(read[row][None, :1025].astype(int))
        hidden, _ = model(asked[:, :-1], Reading(after.memories, model.start(1).windows), update=False)
        bits = torch.nn.functional.cross_entropy(model.logits(hidden)[0], asked[0, 1:]) / np.log(2)
        assert tiny["rows"][row]["episodes"]["others"][others - 1] == pytest.approx(float(bits), abs=1e-4)


def test_fields_of_the_memory_are_overridden(trained, tmp_path):
    data = command(trained, tmp_path / "still-0.retention.json", "--memory", "learning_rate=0")
    assert data["memory"] == {"learning_rate": 0}
    for row in data["rows"]:
        of_the_first = [row["episodes"][name] for name in retained.MEMORIES]
        assert len({x for numbers in of_the_first for x in numbers}) == 1
    assert command(trained, tmp_path / "o.json", "--memory", "num_subkeys=16")["state_bytes"] > 16**2 * 16 * 4


MISTAKES = {
    "a size between bins": (("--size", "2000"), "sizes must be multiples of 1,024 bytes"),
    "too many texts": (("--texts", "2"), "domain 'a' has 3,000 bytes, and 2 texts of 2,048 are asked for"),
    "a field that is unknown": (("--memory", "speed=2"), "fields that FwPKMConfig lacks: ['speed']"),
    "a field of no value": (("--memory", "speed"), "must be NAME=VALUE. Received: speed"),
    "no domains": (("--domains", "none"), "there is no none/domains.json: build the domains first"),
}


@pytest.mark.parametrize(("more", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(trained, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit):
        command(trained, tmp_path / "o.json", *more)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


def test_domains_of_another_corpus_are_refused(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(retention, "corpus_of", lambda folder: "another")
    with pytest.raises(ValueError, match="the model learns from the corpus another"):
        retention.measure(trained / "run", domains.load(trained / "domains"), tmp_path / "o", CPU)


def test_a_model_without_memory_is_refused(monkeypatch, tmp_path):
    for fields in ({"memories": []}, {"memories": [1], "mixer": "delta"}):
        experiment = Experiment.of({"model": {**MODEL, **fields}}, "test")
        monkeypatch.setattr(retention, "load", lambda *a, its=experiment, **k: (None, its))
        with pytest.raises(ValueError, match="has no memory that is written, to keep anything"):
            retention.measure(tmp_path, DOMAINS, tmp_path / "o", CPU)


def test_r_is_of_the_moments_that_it_names():
    """By hand: after one other domain (2.0 - 1.6) / (2.5 - 1.5), after two (1.9 - 1.8) / (2.5 - 1.5)."""
    numbers = {"unread": [3.0], "filler": [2.5], "others": [2.0, 1.9], "kept": [1.5, 1.6, 1.8]}
    bits = {name: np.tile(np.array(x), (1, 4, 1)) for name, x in numbers.items()}
    right = {name: np.zeros((1, 4, len(x), 5)) for name, x in numbers.items()}
    right["kept"][:, :, 1, :2] = 6
    model = retained.Model("x", (0,), (*NAMES, "history"), 99, np.array(["novels"] * 4), {"episodes": bits}, right, 1)
    assert retained.retention(model, "episodes", 1)[:3] == pytest.approx((0.4,) * 3)
    assert retained.retention(model, "episodes", 2)[:3] == pytest.approx((0.1,) * 3)
    assert [retained.needles(model, n).mean for n in (0, 1, 2)] == [0, 0.4, 0]


def test_run_measures_retention_where_there_are_domains(trained, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(retention, "measure", lambda folder, its, out, device: asked.append(out.write_text("{}")))
    memory = ", ".join(f"{name} = {value}" for name, value in MEMORY.items())
    fields = "".join(f"{name} = {value}\n" for name, value in MODEL.items())
    (tmp_path / "small.toml").write_text(
        f"[model]\n{fields}memory = {{ {memory} }}\n[training]\nsteps = 1\nbatch = 1\nlength = 96\nfacts = 0.0\n"
    )
    line = ["run", str(tmp_path / "small.toml"), "--seeds", "0", "--corpus", str(trained / "corpus"), "--out",
            str(tmp_path / "out"), "--measures", "retention"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(line)
    assert "to measure retention, name the folder of the domains" in capsys.readouterr().err
    for _ in range(2):  # what is done is kept
        main([*line, "--domains", str(trained / "domains")])
    assert len(asked) == 1
    assert (tmp_path / "out/small-0.retention.json").exists()
    plain = Experiment.of({"model": {**MODEL, "memories": []}}, "test")
    job, its = run.Job("plain-0", tmp_path, plain), corpus.load(trained / "corpus")
    assert run.check(job, its, tmp_path, ["retention"], run.Asked(domains=trained / "domains")) == []


# Files


def test_seeds_of_a_name_belong_together(models, folder):
    assert {label: model.seeds for label, model in models.items()} == {"all": (0,), "one": (0,), "two": (0, 5)}
    lines = retained.report(list(models.values())).splitlines()
    assert [line.split(" | ")[:2] for line in lines[6:11]] == [
        ["| all", "0"], ["| one", "0"], ["| two", "0, 5"], ["| two", "0"], ["| two", "5"]
    ]  # fmt: skip
    assert lines[8] == "| two | 0, 5 | 1.00 (1.00 to 1.00) | 0.00 (0.00 to 0.00) |"


def changed(data, how):
    if how == "a row short":
        del data["rows"][0]["episodes"]["kept"][-1]
    elif how == "not a number":
        data["rows"][2]["domain"]["filler"][0] = float("nan")
    elif how == "no rows":
        data["rows"] = []
    elif how == "a field short":
        del data["experiment"]
    else:
        data["size"] += 1
    return json.dumps(data)


@pytest.mark.parametrize("how", ["a row short", "not a number", "no rows", "a field short"])
def test_a_damaged_file_is_named(folder, tmp_path, how):
    text = (folder / "two-0.retention.json").read_text()
    (tmp_path / "two-0.retention.json").write_text(changed(json.loads(text), how))
    with pytest.raises(ValueError, match=r"two-0\.retention\.json is damaged"):
        retained.load(tmp_path)


def test_files_of_one_name_must_be_alike(folder, tmp_path):
    for seed in (0, 5):
        text = (folder / f"two-{seed}.retention.json").read_text()
        (tmp_path / f"two-{seed}.retention.json").write_text(changed(json.loads(text), "other size") if seed else text)
    with pytest.raises(ValueError, match=r"differs from .* in more than the seed"):
        retained.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="measure first"):
        retained.load(tmp_path / "none")
