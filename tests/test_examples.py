"""Every example runs, and so does every block of code in the README and the guide."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(*arguments, cwd):
    # Waiting threads that spin would slow each other down where tests share two cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_forgotten():
    assert EXAMPLES == ["numpy_facts.py", "torch_copy.py"]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_facts_are_recalled(tmp_path, backend):
    assert "6 of 6 right" in run(ROOT / "examples/numpy_facts.py", "--backend", backend, cwd=tmp_path)


def test_the_second_reading_is_remembered(tmp_path):
    last = run(ROOT / "examples/torch_copy.py", "--steps", "40", cwd=tmp_path).splitlines()[-1]
    first, second = map(float, re.fullmatch(r"step 40: first reading (\S+), second (\S+)", last).groups())
    assert second < 2 < 3.4 < first


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_code_of_a_page_runs(tmp_path, page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    run("-W", "error", "-c", "\n".join(blocks), cwd=tmp_path)
