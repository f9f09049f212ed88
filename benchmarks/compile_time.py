"""``python -m benchmarks.compile_time``: how long JAX takes to compile a layer of the default configuration.

Of one row, 64 wide:

- gradient: of Σ y² with respect to the params, y [1, 128, 64], from the initial memory;
- gradient, carried: the same from a carried state, whose position is traced, so that XLA cannot drop the write;
- decode step: ``layer.decode`` of x [1, 1, 64] from a carried state, which is donated;
- apply, one token: the same by ``layer.apply``.

A run is a fresh process without a compilation cache. It gives CPU seconds of that process, over all its threads: of
tracing and lowering to StableHLO, and of XLA's compilation.
"""

import time

from benchmarks import report
from benchmarks.measure import summarize
from benchmarks.worker import Worker

PROGRAMS = {"gradient": 128, "gradient, carried": 128, "decode step": 1, "apply, one token": 1}
"""The tokens that each reads."""


def cpu_seconds(program: str) -> tuple[float, float, float]:
    """In this process: to trace and lower, to compile, and both."""
    import jax
    import jax.numpy as jnp

    from fwpkm.backends.jax import FwPKM

    layer, x = FwPKM(64), jnp.ones((1, PROGRAMS[program], 64))
    variables = layer.init(jax.random.key(0))
    state = None if program == "gradient" else layer.init_state(variables, 1)

    def step(params, x, state):
        return layer.apply({**variables, "params": params}, x, state)

    def decode(params, x, state):
        return layer.decode({**variables, "params": params}, x, state)

    def loss(params, x, state):
        return jnp.square(step(params, x, state)[0]).sum()

    if program.startswith("gradient"):
        function = jax.jit(jax.grad(loss))
    else:
        function = jax.jit(decode if program == "decode step" else step, donate_argnums=2)
    start = time.process_time()
    lowered = function.lower(variables["params"], x, state)
    between = time.process_time()
    lowered.compile()
    end = time.process_time()
    return between - start, end - between, end - start


def main() -> None:
    """Print the table."""
    runs = (3, "fresh processes for each program")
    args = report.parser("compile_time", __doc__, "markdown", runs=runs).parse_args()
    import jax  # noqa: F401  its version stands above the table

    rows = []
    for program in PROGRAMS:
        runs = []
        for _ in range(args.runs):
            with Worker(JAX_ENABLE_COMPILATION_CACHE="false") as worker:
                runs.append(worker.run(cpu_seconds, program))
        rows.append((program, *(report.spread(summarize(stage), "{:.1f}") for stage in zip(*runs))))
    table = report.Table("CPU seconds to compile a layer", ("program", "trace and lower", "compile", "both"), rows)
    report.show([f"medians of {args.runs} runs with their quartiles"], [table], markdown=args.markdown)


if __name__ == "__main__":
    main()
