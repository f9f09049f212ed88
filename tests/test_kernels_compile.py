"""What Triton's interpreter cannot tell: that every kernel compiles, for GPUs that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("capability", "config"), [(80, "paper"), (90, "paper"), (80, "odd"), (90, "largest")], ids=str
)
def test_every_kernel_compiles(capability: int, config: str) -> None:
    """For GPUs that need not be here; the interpreter takes what compilers refuse."""
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(capability), config]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = {line.split()[2] for line in done.stdout.splitlines()}
    assert {"select_kernel", "rank_kernel", "values_kernel", "scores_backward_kernel", "settle_kernel"} <= printed
