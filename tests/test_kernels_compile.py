"""What Triton's interpreter cannot tell: that every kernel compiles, for GPUs that need not be here."""

from pathlib import Path

import pytest
from processes import python

SCORING = """
    coefficients_backward_kernel coefficients_kernel key_sums_kernel keys_backward_kernel keys_kernel
    listed_select_slots_kernel propose_kernel rank_kernel scan_kernel scores_backward_kernel select_slots_kernel
    token_kernel
"""


def run(*arguments: str, script: str = "compile_kernels.py"):
    return python(Path(__file__).parent / script, *arguments, timeout=500, TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("capability", "configs"), [(80, "paper rest"), (90, "paper rest"), (80, "odd"), (90, "largest")], ids=str
)
def test_every_kernel_compiles(capability: int, configs: str) -> None:
    """For GPUs that need not be here; the interpreter takes what compilers refuse."""
    done = run(str(capability), *configs.split())
    assert done.returncode == 0, done.stderr[-3000:]
    printed = {line.split()[1] for line in done.stdout.splitlines()}
    assert {"propose_kernel", "values_kernel", "scores_backward_kernel", "store_pending_kernel"} <= printed


@pytest.mark.parametrize(("capability", "config"), [(90, "paper"), (80, "odd")], ids=str)
def test_every_kernel_compiles_as_jax_triton_passes_arguments(capability: int, config: str) -> None:
    """Its parameters stand in another order then; what it may store into is what XLA is told."""
    done = run(str(capability), config, script="compile_jax_kernels.py")
    assert done.returncode == 0, done.stderr[-3000:]
    printed = {line.split()[2] for line in done.stdout.splitlines()}
    assert {"nothing", "left_over_kernel", "values_kernel", "scores_backward_kernel", "sort_kernel"} <= printed


@pytest.mark.parametrize(
    ("field", "kernels"),
    [
        ("SCORE", SCORING),
        ("WRITE_SCALE", "read_backward_kernel read_kernel"),
        ("SCOPE", "left_align_kernel token_kernel"),
    ],
)
def test_an_unknown_choice_does_not_compile(field: str, kernels: str) -> None:
    """Whoever adds a score must tell each kernel that has to know it."""
    done = run("refuse", field)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == kernels.split()
