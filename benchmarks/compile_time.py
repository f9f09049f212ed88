"""``python -m benchmarks.compile_time``: how long JAX takes to compile a layer of the default configuration.

Of one row, 64 wide:

- gradient: of Σ y² with respect to the params, y [1, 128, 64], from the initial memory;
- gradient, carried: the same from a carried state, whose position is traced, so that XLA cannot drop the write;
- decode step: y [1, 1, 64] and the next state from a carried one, which is donated.

A run is a fresh process without a compilation cache. It gives CPU seconds of that process, over all its threads: of
tracing and lowering to StableHLO, and of XLA's compilation. The table holds medians of three runs with their range.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

PROGRAMS = {"gradient": 128, "gradient, carried": 128, "decode step": 1}
"""The tokens that each reads."""


def measure(program: str) -> dict[str, float]:
    """CPU seconds of each stage in this process."""
    import jax
    import jax.numpy as jnp

    from fwpkm.backends.jax import FwPKM

    layer, x = FwPKM(64), jnp.ones((1, PROGRAMS[program], 64))
    variables = layer.init(jax.random.key(0))
    state = None if program == "gradient" else layer.init_state(variables, 1)

    def step(params, x, state):
        return layer.apply({**variables, "params": params}, x, state)

    def loss(params, x, state):
        return jnp.square(step(params, x, state)[0]).sum()

    function = jax.jit(jax.grad(loss)) if program.startswith("gradient") else jax.jit(step, donate_argnums=2)
    start = time.process_time()
    lowered = function.lower(variables["params"], x, state)
    between = time.process_time()
    lowered.compile()
    end = time.process_time()
    return {"trace and lower": between - start, "compile": end - between, "both": end - start}


def in_fresh_process(program: str) -> dict[str, float]:
    """What ``measure`` gives in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "benchmarks.compile_time", "--in-this-process", program]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes for each program")
    parser.add_argument("--in-this-process", choices=PROGRAMS, help="measure one program once, and print JSON")
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps(measure(args.in_this_process)))
        return
    import jax
    import jaxlib

    versions = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {platform.python_version()}"
    table = Table(title=f"CPU seconds to compile a layer: {versions}, {jax.devices()[0].platform}")
    for column in ("program", "trace and lower", "compile", "both"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for program in PROGRAMS:
        runs = [in_fresh_process(program) for _ in range(args.runs)]
        samples = ([run[stage] for run in runs] for stage in runs[0])
        table.add_row(program, *(f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in samples))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
