"""Data parallel in PyTorch: ranks give what one process gives, in float64 to its rounding (SPEC.md §6)."""

import json
import re
from pathlib import Path

import pytest
from processes import python
from sources import ROOT

from benchmarks.workloads import WORKLOADS
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Experiment
from fwpkm.backends.torch import FwPKM

SCRIPT = ROOT / "tests" / "torch_ranks.py"
CASES = (
    *("ddp", "ddp, learned", "ddp, learned, carried", "ddp, traffic"),
    *("fsdp", "fsdp, learned", "fsdp, learned, carried", "fsdp, bfloat16", "fsdp, bfloat16, learned", "fsdp, meta"),
    *("to fewer", "to more", "language model", "bad input", "columns"),
)
ONLY_TWO = ("ddp, no_sync", "ddp, compiled", "fsdp, one group", "fsdp, compiled", "killed")


@pytest.fixture(scope="module")
def found() -> dict[str, float | str]:
    """By case and ranks, the worst error over its bound, or what was raised."""
    done = python(SCRIPT, OMP_NUM_THREADS="1", timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, filter(None, done.stdout.splitlines())))


@pytest.mark.parametrize(
    "case",
    [*(f"{case}, {ranks} ranks" for ranks in (2, 4) for case in CASES), *(f"{case}, 2 ranks" for case in ONLY_TWO)],
)
def test_ranks_agree_with_one_process(found: dict[str, float | str], case: str) -> None:
    error = found[case]
    assert not isinstance(error, str), error
    assert error < 1


def test_the_benchmark_of_a_cluster_measures_and_counts(tmp_path: Path) -> None:
    """What a step sends is the gradients, each once: the tables stay where they are."""
    (tmp_path / "small.toml").write_text(
        "[model]\nwidth = 16\nlayers = 1\nheads = 2\nwindow = 8\nhidden = 16\nmemories = [0]\n"
        "memory = { num_subkeys = 16, top_k = 2, chunk_size = 16 }\n"
        "[training]\nlength = 32\nfacts = 0.0\n"
    )
    line = ("--workload", "tiny", "--experiment", tmp_path / "small.toml", "--rows", 2, "--repeats", 2, "--markdown")
    line = (*line, "--check")
    done = python("-m", "benchmarks.cluster", *line, cwd=ROOT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    model = LanguageModel(Experiment.read(tmp_path / "small.toml").model)
    layer = FwPKM(16, WORKLOADS["tiny"].config)
    for name, module in (("layer", layer), ("language model", model)):
        size = 4 * sum(p.numel() for p in module.parameters()) / 1e6
        assert re.search(rf"^\| {name} \|.*\| {size:.3f} in 1 \|$", done.stdout, re.MULTILINE), done.stdout
        for scaling in ("weak", "strong"):
            ratio = re.search(rf"^\| {name}, {scaling} \| (\S+) ", done.stdout, re.MULTILINE)
            assert ratio is not None
            assert float(ratio[1]) > 0
    refused = python("-m", "benchmarks.cluster", "--rows", 3, cwd=ROOT)
    assert refused.returncode == 2
    assert "--rows must be a multiple of --ranks, 2. Received: 3" in refused.stderr


def test_the_agreement_of_a_cluster_is_judged() -> None:
    """FSDP2's bits and tables in columns, small, on two processes; with a command line that cannot be."""
    line = ("--width", 32, "--num-subkeys", 8, "--rows", 3, "--length", 300, "--steps", 2, "--tokens", 20)
    done = python("-m", "benchmarks.cluster_agreement", *line, "--device", "cpu", "--markdown", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = re.findall(r"^\| .* over its bound \| (\S+) \|$", done.stdout, re.MULTILINE)
    assert len(errors) == 3, done.stdout
    assert all(float(error) < 1 for error in errors)
    assert re.search(r"^\| columns: bytes of all tables \| 24,576 \|$", done.stdout, re.MULTILINE), done.stdout
    assert python("-m", "benchmarks.cluster_agreement", "--rows", 0, cwd=ROOT).returncode == 2
