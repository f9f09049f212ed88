"""The language model on the engine of examples/serve.py: every user as alone, windows of attention included."""

import numpy as np
import pytest
import torch
from asserting import assert_close
from safetensors.torch import save_file
from serving_clients import Clients

from benchmarks.serving import main
from examples.language_model import checkpoint, training
from examples.language_model.corpus import Corpus, Texts
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Experiment, ModelSettings
from examples.serving.engine import Engine
from examples.serving.language_model import Served
from examples.serving.model import choices

MEMORY = {"num_subkeys": 8, "top_k": 4, "chunk_size": 6, "key_dim": 16, "value_dim": 16}
SMALL = {"width": 16, "layers": 3, "heads": 2, "window": 5, "hidden": 24, "memories": (0, 2), "memory": MEMORY}


def built(**fields):
    """A model whose weights are so large that whatever it reads shows in its answers."""
    torch.manual_seed(0)
    model = LanguageModel(ModelSettings(**{**SMALL, **fields})).requires_grad_(False).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(10)
    return model


MODEL = Served(built())
TEXTS = [bytes(range(40)), b"", b"abcdefghij", bytes(range(100, 123))]


@pytest.mark.parametrize("piece", [1, 3, 4, 5, 7, 40])
def test_rows_of_any_lengths_read_what_each_reads_alone(piece):
    rows, found = MODEL.start(len(TEXTS)), [[] for _ in TEXTS]
    for begin in range(0, 40, piece):
        pieces = [text[begin : begin + piece] for text in TEXTS]
        ends = torch.tensor([0, *map(len, pieces)]).cumsum(0).int()
        logits, rows = MODEL.read(torch.tensor([list(b"".join(pieces))]), rows, ends)
        for row, (text, out) in enumerate(zip(pieces, found)):
            if text:
                out.append((begin + len(text) - 1, logits[row]))
    for text, out in zip(TEXTS, found):
        alone = MODEL.logits_of(text) if text else []
        for at, logits in out:
            assert_close([logits], [alone[at]], "float32")  # angles of rotary positions are float32
    assert all(len(x) == 4 and x[1].count_nonzero() == 0 for x in rows.beside.values())


def test_users_who_come_and_go_get_what_each_gets_alone(tmp_path):
    def engine():
        return Engine(MODEL, tmp_path, rows=2, in_memory=1, piece=5)

    clients = Clients(engine(), seed=3)
    for round_ in range(60):
        clients.act()
        for _ in range(clients.rng.randint(0, 4)):
            clients.step()
        if round_ == 40:  # a process that begins anew
            clients.engine = engine()
    while clients.engine.busy:
        clients.step()
    assert min(clients.counts.values()) > 0, clients.counts
    assert sum(map(len, clients.answers.values())) > 30
    for user, written in clients.answers.items():
        text = clients.engine.text(user)
        chosen = choices(MODEL, text)
        assert [text[i] for i in written] == [chosen[i - 1] for i in written]
        clients.engine.leave(user)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".text", ".state", ".beside"}
    assert len(list(tmp_path.glob("*.beside"))) == len(list(tmp_path.glob("*.state")))
    for user in clients.engine.users:
        clients.engine.delete(user)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert all(x.count_nonzero() == 0 for x in clients.engine.tables.rows.beside.values())


def test_answers_hang_on_memories_and_windows(tmp_path):
    """Or the tests above would show nothing."""
    text = bytes(range(120))
    frozen = Served(built(memory={**MEMORY, "learning_rate": 0.0}))
    narrow = Served(built(window=4))
    for other in (frozen, narrow):
        assert sum(x != y for x, y in zip(choices(MODEL, text), choices(other, text))) > 5


@pytest.mark.parametrize("spoil", ["flipped", "cut off", "another's", "missing"])
def test_a_damaged_file_of_windows_refuses_its_user_alone(tmp_path, spoil):
    engine = Engine(MODEL, tmp_path)
    for user in "ab":
        engine.join(user, b"The text that was given by " + user.encode())
        engine.run()
        engine.leave(user)
    a, b = (tmp_path / f"{user.encode().hex()}.27.beside" for user in "ab")
    whole = a.read_bytes()
    match spoil:
        case "flipped":
            a.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        case "cut off":
            a.write_bytes(whole[:100])
        case "another's":
            a.write_bytes(b.read_bytes())
        case "missing":
            a.unlink()
    for user in "ab":
        engine.write(user, 6)
    failed = engine.run()
    assert failed.keys() == {"a"}
    assert isinstance(failed["a"], ValueError)
    assert ("beside" if spoil == "missing" else str(a)) in str(failed["a"])
    engine.reread("a")
    engine.write("a", 6)
    assert engine.run() == {}
    for user in "ab":
        text = engine.text(user)
        assert text[-6:] == choices(MODEL, text)[-7:-1]


def test_models_that_have_nothing_to_remember_are_refused():
    with pytest.raises(ValueError, match=r"the engine serves models with memories\. Received: "):
        Served(built(memories=()))


def test_the_load_test_serves_a_trained_model(tmp_path, capsys):
    data = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint8)
    corpus = Corpus(Texts(data, np.array([0, 2000]), ("a",)), Texts(data, np.array([0, 2000]), ("b",)), "5ha")
    model = SMALL | {"memories": [0, 2], "memory": {**MEMORY, "usage_weight": 0.25}}
    tables = {"model": model, "training": {"steps": 1, "batch": 1, "length": 96, "facts": 0.0}}
    path = training.train(Experiment.of(tables, "test"), corpus, tmp_path / "run", torch.device("cpu"))
    tensors, about = checkpoint._read(path)
    grown = {key: 8 * x if x.ndim > 1 else x for key, x in tensors.items()}  # so that memories show
    save_file(grown, path, {**about, "weights": checkpoint.digest(grown)})
    users = "--users 3 --tokens 60 --text 30 --answer 4 --rows 1 --in-memory 1 --checked 3 --dtype float64 --markdown"
    assert main(["--language-model", str(tmp_path / "run"), *users.split()]) == 0
    printed = capsys.readouterr().out
    assert "the language model of" in printed
    assert "num-subkeys" not in printed
    assert "| bytes checked alone, of them others | 24, 0 |" in printed
