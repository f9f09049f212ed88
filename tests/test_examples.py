"""Every example runs."""

import re
import shutil

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
        "distributed_torch.py",
        "jax_devices.py",
        "jax_generate.py",
        "jax_recall.py",
        "keras_devices.py",
        "keras_generate.py",
        "keras_text.py",
        "numpy_facts.py",
        "portable.py",
        "serve.py",
        "torch_columns.py",
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


def test_a_table_in_columns_trains_as_a_whole_one(tmp_path):
    """The script asserts that losses and what is read on from the files are those of one process."""
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"
    printed = run(*torchrun, ROOT / "examples/torch_columns.py", "--folder", tmp_path / "state", cwd=tmp_path)
    # Lines of two processes may share one.
    assert len(re.findall(r"rank \d of 2: .*? columns torch.Size\(\[2, 4096, 32\]\)", printed)) == 2
    assert re.search(r"losses .*, those of one process within \d", printed)


@pytest.mark.parametrize("framework", ["jax", "keras"])
def test_four_devices_give_what_one_gives(tmp_path, framework):
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    printed = run(ROOT / f"examples/{framework}_devices.py", cwd=tmp_path, XLA_FLAGS=flags, KERAS_BACKEND="jax")
    differences = [float(x) for x in re.findall(r"\d\.\de[+-]\d\d", printed)]
    assert len(differences) == {"jax": 2, "keras": 4}[framework]
    assert max(differences) < 1e-4
    assert framework == "keras" or "tables of (4, 256, 32), on each of 4 devices (2, 256, 16)" in printed


def test_users_who_share_rows_are_served_twice(tmp_path):
    """The second process goes on from the first one's folder; the script asserts that each reads as alone."""
    for back in (0, 1):
        printed = run("-m", "examples.serve", "--folder", tmp_path / "users", cwd=ROOT)
        assert "served 5 users, 0 failed; each reads what it reads alone" in printed
        assert printed.count("I am back.") == 4 * back  # the fifth user was deleted
        assert len(re.findall("^(in a row|in memory|on the disk): .", printed, re.MULTILINE)) == 3


def test_any_number_of_ranks_trains_the_same_and_goes_on_from_the_others(tmp_path):
    """The text of a checkpoint's last whole folder is half read: its memories must come along, dealt anew."""

    def steps(ranks, how, folder):
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
        script = (ROOT / "examples/distributed_torch.py", "--how", how, "--folder", folder)
        printed = run(*launch, *script, cwd=tmp_path, OMP_NUM_THREADS="1")
        return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): (\S+) nats", printed, re.MULTILINE)}

    sharded = steps(2, "fsdp", "sharded")
    assert sharded.keys() == set(range(1, 9))
    for name in ("step-8", "step-4"):
        shutil.rmtree(tmp_path / "sharded" / name)
    (tmp_path / "sharded" / "step-6" / ".metadata").rename(tmp_path / "metadata")  # as a killed save leaves it
    again = steps(4, "fsdp", "sharded")
    assert again.keys() == set(range(3, 9))
    replicated = steps(2, "ddp", "replicated")
    assert again == pytest.approx({step: sharded[step] for step in again}, abs=2e-4)
    assert replicated == pytest.approx(sharded, abs=2e-4)


def test_what_torch_began_others_finish(tmp_path):
    printed = run(ROOT / "examples/portable.py", cwd=tmp_path, KERAS_BACKEND="tensorflow")
    worst = re.findall(r"^(.+): worst difference (\S+)$", printed, re.MULTILINE)
    assert [name for name, _ in worst] == ["JAX", "Keras on tensorflow"]
    assert all(float(number) < 1e-5 for _, number in worst)


def numbers(printed, label):
    """Those of the row of a table that begins with ``label``."""
    return [float(x) for x in re.search(rf"^{label} +(.*)$", printed, re.MULTILINE)[1].split()]
