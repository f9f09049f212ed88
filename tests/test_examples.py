"""Every example runs, and so does every block of code in the README, the guide and the pages on batches and models."""

import re

import pytest
from processes import python
from sources import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(*arguments, cwd, **variables):
    # Waiting threads that spin would slow each other down where tests share two cores.
    done = python(*arguments, cwd=cwd, OMP_WAIT_POLICY="PASSIVE", TF_CPP_MIN_LOG_LEVEL="3", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_forgotten():
    assert EXAMPLES == [
        "jax_generate.py",
        "jax_modules.py",
        "jax_recall.py",
        "keras_generate.py",
        "keras_text.py",
        "numpy_facts.py",
        "portable.py",
        "serve.py",
        "torch_copy.py",
        "torch_generate.py",
    ]


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_facts_are_recalled(tmp_path, backend):
    assert "6 of 6 right" in run(ROOT / "examples/numpy_facts.py", "--backend", backend, cwd=tmp_path)


def test_the_second_reading_is_remembered(tmp_path):
    last = run(ROOT / "examples/torch_copy.py", "--steps", "40", cwd=tmp_path).splitlines()[-1]
    first, second = map(float, re.fullmatch(r"step 40: first reading (\S+), second (\S+)", last).groups())
    assert second < 2 < 3.4 < first


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_a_passage_that_returns_costs_fewer_bits(tmp_path, backend):
    printed = run(ROOT / "examples/keras_text.py", "--small", cwd=tmp_path, KERAS_BACKEND=backend)
    assert f"Keras on {backend}" in printed
    first, second = numbers(printed, "the memory writes")
    frozen_first, frozen_second = numbers(printed, "the same at learning rate 0")
    assert second < first - 0.8
    assert abs(frozen_second - frozen_first) < 0.2
    assert second < frozen_second - 0.8


def test_recall_reaches_farther_than_it_was_trained(tmp_path):
    printed = run(ROOT / "examples/jax_recall.py", "--small", "--out", "recall.png", cwd=tmp_path)
    assert "trained on 128 tokens, tested on 512" in printed
    for distance in ("16 to 31", "32 to 63", "64 to 127", "128 to 255"):
        asked, written, frozen = numbers(printed, distance)
        assert asked > 20
        assert frozen < 0.2 < 0.8 < written
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_flax_and_equinox_hold_the_layer(tmp_path):
    printed = run(ROOT / "examples/jax_modules.py", cwd=tmp_path)
    for library in ("Flax NNX", "Equinox"):
        before, after = map(float, re.search(rf"{library}: loss (\S+), then (\S+)", printed).groups())
        assert after < before
        assert float(re.search(rf"{library}: decoded .* plain layer (\S+)", printed)[1]) < 1e-5


@pytest.mark.parametrize(
    ("example", "backend"),
    [("torch", ""), ("jax", ""), ("keras", "tensorflow"), ("keras", "jax"), ("keras", "torch")],
    ids=lambda name: name or "alone",
)
def test_text_that_is_generated_is_that_of_one_call(tmp_path, example, backend):
    """The scripts assert it themselves; here they run, and XLA compiles fast instead of well."""
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", **({"KERAS_BACKEND": backend} if backend else {})}
    printed = run(ROOT / f"examples/{example}_generate.py", "--bytes", "20", cwd=tmp_path, **quick)
    assert "one call over all of it chooses the same 40 bytes" in printed
    assert example != "jax" or printed.endswith("compiled steps: 1\n")


def test_users_who_share_rows_are_served_twice(tmp_path):
    """The second process goes on from the first one's folder; the script asserts that each reads as alone."""
    for back in (0, 1):
        printed = run("-m", "examples.serve", "--folder", tmp_path / "users", cwd=ROOT)
        assert "served 5 users, 0 failed; each reads what it reads alone" in printed
        assert printed.count("I am back.") == 4 * back  # the fifth user was deleted
        assert len(re.findall("^(in a row|in memory|on the disk): .", printed, re.MULTILINE)) == 3


def test_what_torch_began_others_finish(tmp_path):
    printed = run(ROOT / "examples/portable.py", cwd=tmp_path, KERAS_BACKEND="tensorflow")
    worst = re.findall(r"^(.+): worst difference (\S+)$", printed, re.MULTILINE)
    assert [name for name, _ in worst] == ["JAX", "Keras on tensorflow"]
    assert all(float(number) < 1e-5 for _, number in worst)


def numbers(printed, label):
    """Those of the row of a table that begins with ``label``."""
    return [float(x) for x in re.search(rf"^{label} +(.*)$", printed, re.MULTILINE)[1].split()]


PAGES = (
    "README.md", "docs/guide.md", "docs/batches.md", "docs/diagnostics.md", "docs/serving.md", "docs/transformers.md",
    "docs/lifecycle.md", "docs/tools.md",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(tmp_path, page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    # TensorFlow's tensors do not yet take NumPy 2's copy argument; Keras asks them for arrays in model.save.
    tensorflow = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    for block in blocks:  # each by itself, as readers copy them: TensorFlow and Triton must not share a process
        run("-W", "error", "-W", tensorflow, "-c", block, cwd=tmp_path)
