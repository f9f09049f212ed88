"""What the pages say: every block of Python runs, every command exists, and the README is short."""

import importlib.util
import re
import shlex

import pytest
from processes import python
from sources import ROOT

from fwpkm import cli

PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
# TensorFlow's tensors do not yet take NumPy 2's copy argument; Keras asks them for arrays in model.save.
TENSORFLOW = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
# peft asks models of transformers for this by its old name.
PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
SPEC = """
import torch, fwpkm
cfg, B = fwpkm.FwPKMConfig(key_dim=4, value_dim=2, num_subkeys=4, top_k=2, chunk_size=2), 1
query, value = torch.ones(1, 3, 4), torch.ones(1, 3, 2)
target, rows, x, dtype = value, [0], torch.ones(2), "float32"
fn, args, cotangents = torch.sin, [x], [x]
states = [fwpkm.get_backend("torch").init_state(cfg, fwpkm.get_backend("torch").init_memory(cfg), 1)]
other = states[0]
"""
"""What the list of functions of SPEC.md §8 takes for granted."""


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCK.findall(text) if found == language]


def test_the_pages_are_known():
    """Those whose code runs below; the others have none."""
    coded = {page for page in PAGES if blocks(page, "python")}
    start = {f"docs/start/{name}.md" for name in ("torch", "jax", "keras", "transformers")}
    use = {"guide", "batches", "diagnostics", "serving", "transformers", "lifecycle", "training", "sizes", "index"}
    assert coded >= {"README.md", "docs/SPEC.md", "docs/conformance.md", *start, *(f"docs/{name}.md" for name in use)}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs(tmp_path, page):
    """Each block in a process of its own, all in one folder; one that begins with a file's name becomes that file."""
    quick = {"OMP_WAIT_POLICY": "PASSIVE", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    if page.startswith("docs/start/"):  # they train: compile fast instead of well
        quick |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "KERAS_BACKEND": "torch"}
    for block in blocks(page, "python"):
        if name := FILE.match(block):
            (tmp_path / name[1]).write_text(block)
        code = SPEC + block if page == "docs/SPEC.md" else block
        done = python("-W", "error", "-W", TENSORFLOW, "-W", PEFT, "-c", code, cwd=tmp_path, **quick)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def commands(page):
    """The lines of the shell on a page, those that go on in the next one joined."""
    for language in ("", "sh"):
        for block in blocks(page, language):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.strip()


def test_the_commands_of_the_pages_exist(monkeypatch):
    """``fwpkm ...`` is parsed, modules are found, targets of make and extras of pip are there."""
    monkeypatch.chdir(ROOT)
    seen = set()
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line, comments=True)
            match words:
                case ["fwpkm", *rest]:
                    assert cli._parser().parse_args(rest).run, (page, line)
                case ["python", "-m", module, *_] | [_, "python", "-m", module, *_]:
                    assert importlib.util.find_spec(module), (page, line)
                case ["make", target, *_]:
                    assert f"\n{target}:" in makefile, (page, line)
                case ["pip", "install", "-e", extra, *_]:
                    assert f"\n{extra.strip('.[]')} = " in project, (page, line)
                case _:
                    continue
            seen.add(words[0])
    assert seen >= {"fwpkm", "python", "make", "pip"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
