"""From what was found and measured on a GPU to tables and the stated targets."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.findings import Report, worst
from benchmarks.gpu_speed import STEPS
from benchmarks.measure import Summary, summarize
from benchmarks.report import Claim, Table, claims_table, spread
from benchmarks.worker import Outcome, Task
from benchmarks.workloads import WORKLOADS, Workload

_SHOWN_KERNELS = 18
_COPY = "copy bandwidth/copy"
_BATCH = "B=8 T=4096 N=512²"
_UNSCORED = "{step}: all but scoring"
_TARGETS: tuple[tuple[str, str, str, float, tuple[float | None, ...]], ...] = (
    # What; which quantity, over which, in which unit; at most how much in forward, and with backward.
    (_BATCH + ", one table: {text}, ms", "shared-512/{step}", "", 1e3, (1.2, 2.4)),
    (_BATCH + ", one table, from a CUDA graph: {text}, ms", "shared-512/captured {step}", "", 1e3, (1.0, 2.2)),
    (_BATCH + ", a table a sequence: {text}, ms", "train-512/{step}", "", 1e3, (None, None)),
    ("the same from a CUDA graph: {text}, ms", "train-512/captured {step}", "", 1e3, (None, None)),
    (_BATCH + ", one table: extra GiB, {text}", "shared-512/extra: {step}", "", 2**-30, (1.5, 1.5)),
    ("B=8 T=4096, N=1024² / N=256²: {text}", "shared-1024/{step}", "shared-256/{step}", 1, (1.5, 1.5)),
    (
        "the same without scoring, device time (the least traffic grows by 1.23): {text}",
        *("kernels: shared-1024/" + _UNSCORED, "kernels: shared-256/" + _UNSCORED, 1, (1.08 * 1.23, 1.08 * 1.23)),
    ),
    (
        "B=1 T=131072 N=512², memory / attention: {text}",
        *("read-128k-512/{step}", "attention: B=1 T=131072/{step}", 1, (1, None)),
    ),
    ("B=1 T=131072 N=512²: {text}, ms", "read-128k-512/{step}", "", 1e3, (12, 24)),
    ("B=1 T=131072 N=512², from a CUDA graph: {text}, ms", "read-128k-512/captured {step}", "", 1e3, (None, None)),
    ("B=1 N=512², a token at T=131072 / 32768", "read-128k-512/forward", "read-32k-512/forward", 1 / 4, (1.1,)),
    (
        _BATCH + ", one table: {text}, JAX / torch from a CUDA graph",
        *("jax: shared-512/{step}", "jax: shared-512/torch captured {step}", 1, (1.3, 1.3)),
    ),
    (
        "the same from a state that stands anywhere: {text}",
        *("jax: anywhere shared-512/{step}", "jax: shared-512/torch captured {step}", 1, (None, None)),
    ),
    (
        "B=8 T=6144 with a third masked / T=4096, N=512², a table a sequence: {text}",
        *("rows: mask/masked {step}", "rows: mask/full {step}", 1, (1.2, 1.2)),
    ),
    (
        "32 rows of 100 to 4096 tokens under a mask / 32 of 4096, N=512²: {text}",
        *("rows: 32/masked {step}", "rows: 32/full {step}", 1, (1.3, 1.3)),
    ),
    (
        "the same packed / 32 of 4096: {text}",
        *("rows: 32/packed {step}", "rows: 32/full {step}", 1, (None, None)),
    ),
    (
        _BATCH + ", from one memory without a state / in place, a table a sequence: {text}",
        *("stateless: 20/rows {step}", "stateless: 20/in place {step}", 1, (1.2, 1.2)),
    ),
    (
        "20 packed sequences of as many tokens, nearly alike / the same: {text}",
        *("stateless: 20/even {step}", "stateless: 20/in place {step}", 1, (1.2, 1.2)),
    ),
    (
        "20 of lengths that are drawn, up to 4096 / the same: {text}",
        *("stateless: 20/drawn {step}", "stateless: 20/in place {step}", 1, (1.2, 1.2)),
    ),
    (
        "20 of 100 tokens up / the same: {text}",
        *("stateless: 20/uneven {step}", "stateless: 20/in place {step}", 1, (1.2, 1.2)),
    ),
    ("64 packed sequences without a state: extra GiB, {text}", "stateless: 64/extra: even {step}", "", 2**-30, (4, 4)),
    ("64 of 100 tokens up: extra GiB, {text}", "stateless: 64/extra: uneven {step}", "", 2**-30, (4, 4)),
    ("64 of lengths that are drawn: extra GiB, {text}", "stateless: 64/extra: drawn {step}", "", 2**-30, (4, 4)),
    ("a layer of width 512, compiled, B=8 T=4096: {text}, ms", "layer: ours/{step}", "", 1e3, (None, None)),
    ("the layer from a CUDA graph: {text}, ms", "layer: ours/captured {step}", "", 1e3, (1.7, 4)),
    (
        "the layer / a Gated DeltaNet layer from a CUDA graph: {text}",
        *("layer: ours/captured {step}", "layer: Gated DeltaNet/captured {step}", 1, (None, None)),
    ),
    ("decode B=1 in a CUDA graph, µs a token", "decode: decode-512/graph", "", 1e6, (28,)),
    (
        "decode B=32 in a CUDA graph, rows at positions that differ, µs a token of each",
        *("decode: decode-512-rows/graph", "", 1e6, (60,)),
    ),
)
"""What the kernels are to reach on one H200."""

Timings = dict[str, list[float]]
"""Samples in seconds or bytes, each quantity by the task's name, a slash, and the name that the task gave it."""


def targets(timings: Timings, sections: set[str]) -> Iterator[Claim]:
    """What is to be reached in the sections that were run, and what was."""
    for what, quantity, over, unit, bounds in _TARGETS:
        section = next((x for x in ("decode", "rows", "stateless", "layer", "jax") if quantity.startswith(x)), "speed")
        for (step, text), bound in zip(STEPS.items(), bounds if section in sections else ()):
            found = measured(timings, quantity.format(step=step), over.format(step=step), unit)
            yield Claim(what.format(text=text), found, at_most=bound)


def measured(timings: Timings, quantity: str, over: str = "", unit: float = 1.0) -> Summary | None:
    """A quantity, or its ratio to another: of medians, with the quartiles that are farthest apart."""
    a, b = summarize(unit * x for x in timings.get(quantity, ())), summarize(timings.get(over, ()))
    if a and over:
        return b and Summary(a.median / b.median, a.low / b.high, a.high / b.low, min(a.size, b.size))
    return a


def agrees(outcome: Outcome) -> bool:
    """Whether a task ran to its end and, if it is a check, found agreement."""
    return outcome.result.agrees if isinstance(outcome.result, Report) else not outcome.error


def agreed(checks: Sequence[Outcome], task: Task) -> bool:
    """Whether what a task would time was compared, at its configuration and dtype, and all of it agrees.

    True of what runs no memory.
    """
    timed, section = _subject(task), task.section if task.section in ("decode", "jax") else "agreement"
    mine = [x for x in checks if section in x.task.section.split() and _subject(x.task) == timed]
    return timed is None or (bool(mine) and all(map(agrees, mine)))


def _subject(task: Task) -> tuple[Any, str] | None:
    """The configuration and the dtype that a task is about, which all that is compiled depends on."""
    workload, dtype, *_ = *task.arguments, None, None
    return (workload.config, dtype) if isinstance(workload, Workload) else None


def line(outcome: Outcome) -> str:
    """One line for a task that has ended."""
    found = outcome.result
    if outcome.error:
        said = ["RAISED"]
    elif isinstance(found, Report):
        wrong = [str(finding) for finding in found.findings if not finding.agrees]
        said = [*(wrong or [str(worst(found.findings))]), *found.notes]
    else:
        said = [f"{name} {spread(summarize(samples))}" for name, samples in found.items() if ": " not in name]
    return f"{outcome.task.section}  {outcome.task.name}: {'; '.join(said)}, took {outcome.seconds:.1f} s"


def tables(checks: Sequence[Outcome], timings: Timings, claims: Sequence[Claim]) -> list[Table]:
    """Everything that was found."""
    apart = "decode: ", "initial state: ", "rows: ", "stateless: ", "layer: ", "jax: "
    others = [name for name in timings if name.startswith(apart)]
    peaks = [name for name in timings if "/extra: " in name and name.startswith("stateless: ")]
    rows = [(name, _cell(timings, name, 1e6)) for name in others if name not in peaks]
    rows += [(f"{name}, MiB", _cell(timings, name, 2**-20)) for name in peaks]
    made = [
        *(agreement_table(checks), *workload_tables(timings), kernels_table(timings)),
        Table(
            "Decoding a token; copying an initial memory; rows that are not alike; a layer; JAX", ("what", "µs"), rows
        ),
        claims_table("Targets, for one H200", claims, "target"),
    ]
    return [table for table in made if table.rows]


def agreement_table(checks: Sequence[Outcome]) -> Table:
    """What agrees, by group: a task's name up to its colon."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in checks:
        groups[outcome.task.name.partition(":")[0]].append(outcome)
    rows = []
    for name, members in groups.items():
        findings = [finding for member in members if not member.error for finding in member.result.findings]
        raised = sum(bool(member.error) for member in members)
        verdict = f"RAISED in {raised}" if raised else "agrees" if all(map(agrees, members)) else "DISAGREES"
        rows.append((name, str(len(members)), str(len(findings)), str(worst(findings) or "-"), verdict))
    return Table("Agreement", ("what", "cases", "quantities", "nearest to its bound", "verdict"), rows)


def workload_tables(timings: Timings) -> list[Table]:
    """Of every workload that was timed: times, times against the traffic floor, and peaks of memory."""
    times, floors, memory = [], [], []
    for name in (name for name in WORKLOADS if f"{name}/forward" in timings):
        workload = WORKLOADS[name]
        many = f"{workload.memories} tables" if workload.memories > 1 else "one table"
        title = f"B={workload.batch} T={workload.length} N={workload.config.num_subkeys}², {many}"
        attention = f"attention: B={workload.batch} T={workload.length}/"
        sources = f"{name}/", f"{name}/captured ", f"{name}/eager ", attention
        times.append((title, *(_cell(timings, source + step, 1e3) for source, step in product(sources, STEPS))))
        sources = f"{name}/extra: ", f"{name}/extra: eager "
        memory.append((title, *(_cell(timings, source + step, 2**-30) for source, step in product(sources, STEPS))))
        cells = []
        for step in STEPS:
            least, floor = f"{name}/least: {step}", measured(timings, f"{name}/least: {step}", _COPY)
            multiple = floor and measured(timings, f"{name}/{step}", unit=1 / floor.median)
            cells += [_cell(timings, least, 1e-9), spread(floor, factor=1e3), spread(multiple)]
        floors.append((title, *cells))
    columns = [f"{kind}{text}" for kind in ("", "captured ", "eager ", "attention ") for text in STEPS.values()]
    least = [f"{text}: {what}" for text in STEPS.values() for what in ("least GB", "floor, ms", "time / floor")]
    return [
        Table("Time", ("time, ms", *columns), times),
        Table(f"Traffic; a device copy moves {_cell(timings, _COPY, 1e-12)} TB/s", ("workload", *least), floors),
        Table("Memory", ("peak GiB beyond inputs, outputs, tables", *columns[:2], *columns[4:6]), memory),
    ]


def kernels_table(timings: Timings) -> Table:
    """Where the device's time goes."""
    columns = [
        name for name in (f"kernels: {name}/{step}" for name, step in product(WORKLOADS, STEPS)) if name in timings
    ]
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for column, (name, samples) in product(columns, timings.items()):
        if name.startswith(column):
            found[name.removeprefix(column).removeprefix(": ") or "all"][column] = 1e6 * sum(samples)
    rows = [
        (kernel[:60].replace("|", "/"), *(f"{seconds.get(column, 0):.1f}" for column in columns))
        for kernel, seconds in sorted(found.items(), key=lambda item: -max(item[1].values()))[:_SHOWN_KERNELS]
    ]
    return Table("Kernels of one call", ("device time, µs", *columns), rows)


def _cell(timings: Timings, quantity: str, unit: float) -> str:
    return spread(measured(timings, quantity, unit=unit))
