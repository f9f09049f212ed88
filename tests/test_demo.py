"""The demo: what it reads, what it measures, what it prints and draws."""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import fwpkm
from fwpkm import cli
from fwpkm.demo import DemoError, contexts, picture, recall, report, text

FIGURE = r" +(\d\.\d{4})"
ROW = re.compile(rf"^ +(\d+){4 * FIGURE} \| +([\d,]+) +([\d.]+%) +([\d,]+)$", re.MULTILINE)
ASKED = re.compile(rf"^(the text as it was|one token in twenty replaced){3 * FIGURE}$", re.MULTILINE)
HALF = recall.Asked(0.5, 0.5, 0.5)
MEMORIES = ("memory", "frozen", "shuffled")
SMALL = ["--num-subkeys", "64", "--chunk-size", "50", "--passes", "2"]


@pytest.fixture(scope="module")
def story() -> str:
    return resources.files("fwpkm.data").joinpath(text.SHIPPED).read_text("utf-8")


@pytest.fixture(scope="module")
def small(story) -> text.Text:
    return text.tokenize("the beginning", story[:2000])


@pytest.fixture
def small_file(story, tmp_path) -> Path:
    path = tmp_path / "beginning.txt"
    path.write_text(story[:2000], "utf-8")
    return path


def rows(printed: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, row[1:5])) for row in ROW.findall(printed)]


def read(be, source: text.Text, passes: int = 2, **config) -> list[recall.Round]:
    trial = recall.Trial(be, recall.config(**{"num_subkeys": 64, "chunk_size": 50, **config}), source)
    return [trial.read(lambda tokens: None) for _ in range(passes)]


# The shipped text


def test_shipped_text_is_what_its_readme_says(story):
    readme = resources.files("fwpkm.data").joinpath("README.md").read_text("utf-8")
    data = story.encode()
    read = text.load([])
    assert 30_000 <= len(data) <= 100_000
    assert hashlib.sha256(data).hexdigest() in readme
    for claim in (f"{len(data):,} bytes", f"{len(read.ids):,} tokens", f"{len(read.vocabulary):,} of them different"):
        assert claim in readme
    assert "\r" not in story
    assert "\t" not in story
    assert "  " not in story
    assert "gutenberg" not in story.lower()


def test_shipped_text_is_recalled_in_the_second_pass():
    first, second = read(fwpkm.get_backend("torch"), text.load([]), num_subkeys=256, chunk_size=512)
    assert first.memory.recall < 0.15
    assert second.memory.recall >= 0.95
    assert max(second.frozen.recall, second.shuffled.recall) < 0.10


# Tokens


def test_tokens_are_words_and_signs():
    read = text.tokenize("", "Ah, née! don't_x\n12.5 文字")
    tokens = [read.vocabulary[i] for i in read.ids]
    assert tokens == ["Ah", ",", "née", "!", "don", "'", "t_x", "12", ".", "5", "文字"]


def test_next_ids_end_with_an_id_of_their_own():
    read = text.tokenize("", "a b a c")
    assert read.ids.tolist() == [0, 1, 0, 2]
    assert read.next_ids.tolist() == [1, 0, 2, 3]


def test_files_are_read_in_order_as_one(tmp_path):
    (tmp_path / "1").write_bytes(b"\xef\xbb\xbfone two")
    (tmp_path / "2").write_bytes(b"three\r\none")
    read = text.load([str(tmp_path / "1"), str(tmp_path / "2")])
    assert [read.vocabulary[i] for i in read.ids] == ["one", "two", "three", "one"]


# Queries and values


@pytest.fixture
def made(small) -> contexts.Contexts:
    return contexts.Contexts(small.ids, len(small.vocabulary), 6, 10)


def test_query_is_a_projection_of_eight_tokens_with_geometric_weights(small, made):
    projection = made._projection.reshape(8, 10, 6)
    np.testing.assert_allclose(projection[5] / 0.9**5, made_without_weights(small)[5], rtol=1e-5)
    for t in (0, 3, 7, 8, 100):
        expected = sum(made.codes[small.ids[t - lag]] @ projection[lag] for lag in range(min(8, t + 1)))
        query = made.queries(t, t + 1)[0]
        np.testing.assert_allclose(query, expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(made.queries(90, 110)[10], made.queries(100, 101)[0], atol=1e-6)
    assert made.queries(0, 5).dtype == np.float32


def made_without_weights(source: text.Text) -> np.ndarray:
    rng = np.random.default_rng(contexts.SEED)
    rng.standard_normal((len(source.vocabulary), 10))
    return rng.standard_normal((8, 10, 6))


def test_values_are_zscored_codes(small, made):
    np.testing.assert_allclose(made.codes.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(made.codes.std(1, ddof=1), 1, atol=1e-5)
    np.testing.assert_array_equal(made.values(3, 6), made.codes[small.ids[3:6]])


def test_shuffled_values_are_the_same_tokens_in_another_order(small, made):
    true, shuffled = (made.values(0, len(small.ids), s) for s in (False, True))
    assert (true != shuffled).any(axis=1).mean() > 0.9
    np.testing.assert_array_equal(np.sort(true, axis=0), np.sort(shuffled, axis=0))
    np.testing.assert_array_equal(made.values(0, len(small.ids), True), shuffled)


def test_nearest_code_is_the_euclidean_one(made):
    output = np.random.default_rng(1).standard_normal((50, 10), np.float32)
    distance = np.linalg.norm(output[:, None] - made.codes, axis=-1)
    np.testing.assert_array_equal(made.nearest(output), distance.argmin(1))


# Passes


def test_memory_recalls_and_controls_do_not(be, small):
    first, second, third = read(be, small, passes=3)
    assert first.memory.recall < 0.15
    assert second.memory.recall > 0.9
    assert third.memory.recall > 0.98
    for round_ in (first, second, third):
        assert max(round_.frozen.recall, round_.shuffled.recall) < 0.10


def test_reads_come_before_the_write_of_their_chunk(be, small):
    for chunk_size in (len(small.ids), 10**9):
        first, second = read(be, small, chunk_size=chunk_size)
        assert first.memory.recall == first.frozen.recall
        assert second.memory.recall > 0.9


def test_recall_agrees_across_backends(small):
    numpy, torch = (read(fwpkm.get_backend(name), small) for name in ("numpy", "torch"))
    for name in MEMORIES:
        for a, b in zip(numpy, torch):
            assert abs(getattr(a, name).recall - getattr(b, name).recall) <= 0.002


def test_a_run_repeats_itself(be, small):
    one, other = (read(be, small) for _ in range(2))
    for a, b in zip(one, other):
        for name in MEMORIES:
            np.testing.assert_array_equal(getattr(a, name).hits, getattr(b, name).hits)
            np.testing.assert_array_equal(getattr(a, name).reads, getattr(b, name).reads)


def test_size_of_the_calls_does_not_matter(be, small, monkeypatch):
    whole = read(be, small)
    monkeypatch.setattr(recall, "TOKENS_PER_CALL", 37)
    for a, b in zip(whole, read(be, small)):
        assert abs(a.memory.recall - b.memory.recall) <= 0.002


def test_progress_counts_every_token_of_the_three_runs(small):
    trial, told = recall.Trial(fwpkm.reference, recall.config(16, 50), small), []
    trial.read(told.append)
    assert sum(told) == 3 * len(small.ids)


def test_reads_and_collisions_count_slots():
    use = recall._SlotUse(fwpkm.FwPKMConfig(key_dim=2, value_dim=2, num_subkeys=2, top_k=2, chunk_size=2))
    use.add(np.array([[0, 1], [1, 2]]), np.array([7, 8]))
    use.add(np.array([[0, 2]]), np.array([7]))
    assert use.reads_by_sub_keys().tolist() == [[2, 2], [2, 0]]
    assert use.collisions() == 4 / 6  # slots 1 and 2 met both 7 and 8, slot 0 met 7 twice


def test_every_read_of_a_pass_is_counted(be, small):
    found = read(be, small)[1].memory
    assert found.reads.shape == (64, 64)
    assert found.reads.sum() == 16 * len(small.ids)
    assert found.slots_used == (found.reads > 0).sum()
    assert found.hits.shape == (len(small.ids) - 1,)
    assert found.recall == found.hits.mean()


# The command


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_demo_prints_its_passes_and_saves_a_picture(backend, small_file, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert cli.main(["demo", str(small_file), "--backend", backend, *SMALL, "--out", str(out)]) == 0
    printed, errors = capsys.readouterr()
    _, (second, *controls, exact) = rows(printed)
    assert min(second, exact) > 0.9
    assert max(controls) < 0.10
    asked = {label: list(map(float, found)) for label, *found in ASKED.findall(printed)}
    assert min(asked["the text as it was"]) > 0.9
    assert asked["one token in twenty replaced"][1] < 0.8
    assert "Beside the baseline: of the text as it was the memory gives" in printed
    assert max(map(len, printed.splitlines())) <= 80 or str(tmp_path) in printed
    assert f"{backend} on cpu" in printed
    for part in (str(small_file), "64 x 64 = 4,096 slots", "every 50 tokens", str(out / picture.NAME)):
        assert part in printed
    assert errors == ""
    assert "\x1b" not in printed
    assert "reading" not in printed  # no bar in a pipe
    assert [path.name for path in out.iterdir()] == [picture.NAME]
    assert_drawn(out / picture.NAME)


def test_demo_prints_the_same_in_both_backends(small_file, tmp_path, capsys):
    printed = []
    for backend in ("numpy", "torch"):
        cli.main(["demo", str(small_file), "--backend", backend, *SMALL, "--out", str(tmp_path / backend)])
        printed.append(rows(capsys.readouterr().out))
    np.testing.assert_allclose(*printed, atol=0.002)
    assert len(printed[0]) == 2


def test_demo_as_json(small_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", str(small_file), "--backend", "numpy", *SMALL, "--json", "--out", str(out)]) == 0
    printed, errors = capsys.readouterr()
    found = json.loads(printed)
    assert errors == ""
    assert list(found) == [
        *("fwpkm", "text", "backend", "device", "num_subkeys", "chunk_size", "passes", "asked_once_more", "picture"),
    ]
    assert (found["backend"], found["num_subkeys"], found["chunk_size"]) == ("numpy", 64, 50)
    assert [one["memory"] > 0.9 for one in found["passes"]] == [False, True]
    assert list(found["passes"][0]) == [
        *("memory", "frozen", "shuffled", "dictionary", "slots_used", "collisions", "tokens_per_second", "seconds"),
    ]
    assert list(found["asked_once_more"]) == ["as_it_was", "one_in_twenty_replaced"]
    assert list(found["asked_once_more"]["as_it_was"]) == ["memory", "dictionary", "falling_back"]
    assert_drawn(Path(found["picture"]))


def assert_drawn(path: Path) -> None:
    colours = np.rint(255 * imread(path)[..., :3]) @ [65536, 256, 1]
    assert colours.shape[0] > 500
    assert colours.shape[1] > 1000
    assert len(np.unique(colours)) > 100


@pytest.mark.parametrize("content", ["yes no", "one two three " * 3, "文 字 и ещё $ _ ^{ \\ "])
def test_demo_takes_the_smallest_texts(content, tmp_path, capsys):
    path = tmp_path / "$a_文.txt"
    path.write_text(content, "utf-8")
    assert cli.main(["demo", str(path), "--backend", "numpy", "--passes", "9", *SMALL[:4], "--out", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)[-1][0] == 1
    assert_drawn(tmp_path / picture.NAME)


def test_old_picture_stays_until_the_new_one_is_complete(small, tmp_path, monkeypatch):
    rounds = read(fwpkm.reference, small, passes=1, num_subkeys=16)
    old = tmp_path / picture.NAME
    old.write_bytes(b"old")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError, match="No space"):
            picture.save(tmp_path, "title", rounds, HALF, HALF)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]
    picture.save(tmp_path, "title", rounds, HALF, HALF)
    assert_drawn(old)


def test_title_of_the_picture_is_short_and_plain():
    assert picture.shorten("a" * 200) == "a" * 33 + "..." + "a" * 33
    assert picture.shorten("$x$ \n文") == r"\$x\$ ??"


def test_conclusion_names_the_figures_and_a_larger_table(small):
    cfg = recall.config(16, 50)
    rounds = read(fwpkm.reference, small, passes=2, num_subkeys=16)
    assert f"{rounds[1].memory.recall:.2%} of its contexts" in report.meaning(rounds)
    assert "once" in report.meaning(rounds)
    assert "--passes 2" in report.meaning(rounds[:1])
    as_good = rounds[1]._replace(frozen=rounds[1].memory)
    said = report.meaning([rounds[0], as_good])
    assert "this text does not show what writes store" in said
    assert said.count(f"{as_good.memory.recall:.2%}") == 2
    assert rounds[1].memory.recall < 0.9
    assert "--num-subkeys 64" in report.larger_table(small, cfg, rounds)
    assert report.larger_table(small, recall.config(64, 50), rounds) == ""


def test_chance_is_the_commonest_successor():
    assert report.commonest_share(text.tokenize("", "a b a b a a")) == 3 / 5


# What cannot be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"PNG\0\1", "binary file or UTF-16 .*NUL"),
        (b"caf\xe9 au lait", r"not UTF-8 \(byte 3 is 0xe9\)"),
        (b"one", "2 different tokens .*1 token, 1 different"),
        (b"same same", "2 different tokens .*2 tokens, 1 different"),
    ],
)
def test_unreadable_text_is_named(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DemoError, match=f"{path}: .*{message}"):
        text.load([str(path)])


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(DemoError, match="gone: no such file"):
        text.load([str(tmp_path / "gone")])
    with pytest.raises(DemoError, match="is a directory"):
        text.load([str(tmp_path)])
    with pytest.raises(DemoError, match="cannot be read"):
        text.load(["a\0b"])
