"""From what was found and measured on a GPU to tables and the stated targets."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.findings import Report, worst
from benchmarks.gpu_speed import STEPS, Speed
from benchmarks.internals import SCORING_KERNELS
from benchmarks.measure import Summary, summarize
from benchmarks.report import Claim, Table, claims_table, milliseconds, spread
from benchmarks.worker import Outcome, Task
from benchmarks.workloads import WORKLOADS, Workload

PROFILED = ("shared-256", "shared-512", "shared-1024")
_FORM = "{:.3g}"
_TEXTS = dict(zip(STEPS, ("forward", "forward + backward")))
_SHOWN_KERNELS = 16


@dataclasses.dataclass
class Results:
    """Everything that one run has found so far."""

    checks: list[Outcome] = dataclasses.field(default_factory=list)
    timings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By the task's name."""
    failed: list[str] = dataclasses.field(default_factory=list)
    """Names of tasks that raised, or disagreed."""
    silenced: list[str] = dataclasses.field(default_factory=list)
    """Names of timings that were not taken, because what they would time was not shown to agree."""

    def seconds(self, name: str, step: str) -> Summary | None:
        """Of a step of a task."""
        found = self.timings.get(name, {})
        return summarize((found.seconds if isinstance(found, Speed) else found).get(step, ()))

    def kernels(self, workload: str, step: str) -> dict[str, float]:
        """Device seconds by kernel."""
        return self.timings.get(f"kernels: {workload}", {}).get(step, {})

    def agreed(self, task: Task) -> bool:
        """Whether what a task would time was compared, at its configuration and dtype, and all of it agrees.

        True of what runs no memory.
        """
        timed = _subject(task)
        section = "decode" if task.section == "decode" else "agreement"
        mine = [x for x in self.checks if section in x.task.section.split() and _subject(x.task) == timed]
        return timed is None or (bool(mine) and all(map(agrees, mine)))


def _subject(task: Task) -> tuple[Any, str] | None:
    """The configuration and the dtype that a task is about, which all that is compiled depends on."""
    if not task.arguments or not isinstance(task.arguments[0], Workload):
        return None
    workload, dtype, *_ = task.arguments
    return workload.config, dtype


def agrees(outcome: Outcome) -> bool:
    """Whether a check ran to its end and found agreement."""
    return isinstance(outcome.result, Report) and outcome.result.agrees


def check_line(outcome: Outcome) -> str:
    """One line for a check that has ended."""
    name, found = f"{outcome.task.section}  {outcome.task.name}", outcome.result
    if not isinstance(found, Report):
        return f"{name}: RAISED, {outcome.seconds:.1f} s"
    wrong = [finding for finding in found.findings if not finding.agrees]
    said = "; ".join(map(str, wrong)) or str(worst(found.findings))
    return "; ".join((f"{name}: {said}", *found.notes)) + f", {outcome.seconds:.1f} s"


def timing_line(outcome: Outcome) -> str:
    """One line for a timing that has ended."""
    result, name = outcome.result, f"{outcome.task.section}  {outcome.task.name}"
    if outcome.error:
        said = "RAISED"
    elif isinstance(result, float):
        said = f"{result / 1e12:.2f} TB/s"
    else:
        seconds = result.seconds if isinstance(result, Speed) else result
        said = "; ".join(f"{step} {_total(samples)} ms" for step, samples in seconds.items())
    return f"{name}: {said}, {outcome.seconds:.1f} s"


def _total(samples: Any) -> str:
    return f"{1e3 * sum(samples.values()):.3g}" if isinstance(samples, dict) else _ms(summarize(samples))


def _ms(seconds: Summary | None) -> str:
    return milliseconds(seconds, _FORM)


def tables(results: Results, claims: Sequence[Claim]) -> list[Table]:
    """Everything that was found."""
    made = [agreement_table(results.checks)] if results.checks else []
    made += workload_tables(results)
    profiled = [name for name in PROFILED if results.kernels(name, "train")]
    made += [_kernels_table(results, profiled)] if profiled else []
    for name, found in results.timings.items():
        if name.startswith("decode: "):
            rows = [(step, spread(_scaled(summarize(samples), 1e6), _FORM)) for step, samples in found.items()]
            title = f"Decoding, {_title(name.partition(': ')[2])}"
            made.append(Table(title, ("implementation", "µs a token"), rows))
    copies = [name for name in results.timings if name.startswith("initial state: ")]
    rows = [(name.partition(": ")[2], _ms(results.seconds(name, "copy"))) for name in copies]
    made += [Table("A copy of the initial memory adds", ("workload", "ms"), rows)] if rows else []
    return [*made, claims_table("Targets, for one H200", claims, "target")] if claims else made


def agreement_table(outcomes: Sequence[Outcome]) -> Table:
    """What agrees, by group: a task's name up to its colon."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.task.name.partition(":")[0], []).append(outcome)
    rows = []
    for name, members in groups.items():
        reports = [member.result for member in members if isinstance(member.result, Report)]
        findings = [finding for report in reports for finding in report.findings]
        raised = len(members) - len(reports)
        verdict = f"RAISED in {raised}" if raised else "agrees" if all(map(agrees, members)) else "DISAGREES"
        rows.append((name, str(len(members)), str(len(findings)), str(worst(findings) or "-"), verdict))
    return Table("Agreement", ("what", "cases", "quantities", "nearest to its bound", "verdict"), rows)


def workload_tables(results: Results) -> list[Table]:
    """Of every workload that was timed: times, times against the traffic floor, and peaks of memory."""
    bandwidth = results.timings.get("copy bandwidth")
    times, floors, memory = [], [], []
    for name, speed in results.timings.items():
        if not isinstance(speed, Speed):
            continue
        workload, title = WORKLOADS[name], _title(name)
        attention = f"attention: B={workload.batch} T={workload.length}"
        tasks = (name, ""), (name, "captured "), (name, "eager "), (attention, "")
        times.append((title, *(_ms(results.seconds(task, kind + step)) for task, kind in tasks for step in STEPS)))
        floors.append((title, *(cell for step in STEPS for cell in _floor(results, name, step, bandwidth))))
        sizes = (speed.extra_bytes.get(kind + step) for kind in ("", "eager ") for step in STEPS)
        memory.append((title, *("-" if size is None else f"{size / 2**30:.2f}" for size in sizes)))
    columns = [kind + text for kind in ("", "captured ", "eager ", "attention ") for text in _TEXTS.values()]
    copy = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth else "not measured"
    least = ("forward: least GB", "floor, ms", "time / floor", "with backward: least GB", "floor, ms", "time / floor")
    peaks = (name for name in columns if not name.startswith(("captured", "attention")))
    made = [
        Table("Time", ("time, ms", *columns), times),
        Table(f"Traffic; a device copy reads and writes {copy}", ("against the traffic floor", *least), floors),
        Table("Memory", ("peak GiB beyond inputs, outputs, tables", *peaks), memory),
    ]
    return made if times else []


def _floor(results: Results, name: str, step: str, bandwidth: float | None) -> tuple[str, str, str]:
    """The least GB, the ms that they take at the speed of a copy, and the time as a multiple of that."""
    least, seconds = getattr(results.timings[name].least_bytes, step), results.seconds(name, step)
    if not bandwidth or not seconds:
        return f"{least / 1e9:.3g}", "-", "-"
    return f"{least / 1e9:.3g}", f"{1e3 * least / bandwidth:.3g}", f"{seconds.median * bandwidth / least:.3g}"


def _kernels_table(results: Results, names: Sequence[str]) -> Table:
    """Where the device's time goes."""
    columns = [(name, step) for name in names for step in STEPS]
    by_column = [results.kernels(name, step) for name, step in columns]
    every = {kernel for kernels in by_column for kernel in kernels}
    order = sorted(every, key=lambda kernel: -max(kernels.get(kernel, 0) for kernels in by_column))[:_SHOWN_KERNELS]
    rows = [
        *((kernel[:60].replace("|", "/"), [kernels.get(kernel, 0) for kernels in by_column]) for kernel in order),
        ("all", [sum(kernels.values()) for kernels in by_column]),
        ("all but scoring", [_unscored(kernels) for kernels in by_column]),
    ]
    titles = (f"{name}: {'forward' if step == 'forward' else 'with backward'}" for name, step in columns)
    cells = [(name, *(f"{1e6 * seconds:.1f}" for seconds in row)) for name, row in rows]
    return Table("Kernels of one call", ("device time, µs", *titles), cells)


def _unscored(kernels: dict[str, float]) -> float:
    return sum(seconds for name, seconds in kernels.items() if not any(score in name for score in SCORING_KERNELS))


def targets(results: Results, sections: set[str]) -> list[Claim]:
    """What the kernels are to reach on one H200, for the sections that were run."""
    claims: list[Claim] = []
    if "speed" in sections:
        claims += [*_batch_targets(results), *_growth_targets(results), *_long_targets(results)]
    if "decode" in sections:
        seconds = results.seconds("decode: decode-512", "graph")
        claims.append(Claim("decode B=1 in a CUDA graph, µs a token", _scaled(seconds, 1e6), at_most=40))
    return claims


def _batch_targets(results: Results) -> Iterator[Claim]:
    aims = {"forward": (1.5, 1.0), "train": (5.0, 3.0)}
    for name, what, factor in (("shared-512", "one table", 1.0), ("train-512", "a table a sequence", 1.5)):
        for step, (bound, aim) in aims.items():
            text = f"B=8 T=4096 N=512², {what}: {_TEXTS[step]}, ms" + f" (aim {aim:g})" * (factor == 1)
            yield Claim(text, _scaled(results.seconds(name, step), 1e3), at_most=factor * bound)
            replayed = _scaled(results.seconds(name, f"captured {step}"), 1e3)
            yield Claim("the same call, replayed from a CUDA graph, ms", replayed, at_most=factor * bound)
    speed = results.timings.get("shared-512")
    for step, text in _TEXTS.items():
        size = speed.extra_bytes.get(step) if speed else None
        measured = summarize([] if size is None else [size / 2**30])
        yield Claim(f"B=8 T=4096 N=512², one table: extra memory of {text}, GiB", measured, at_most=1.5)


def _growth_targets(results: Results) -> Iterator[Claim]:
    for step, text in _TEXTS.items():
        large, small = (results.seconds(name, step) for name in ("shared-1024", "shared-256"))
        yield Claim(f"B=8 T=4096, {text}: N=1024² / N=256²", _ratio(large, small), at_most=1.5)
        rests = [_unscored(results.kernels(name, step)) for name in ("shared-1024", "shared-256")]
        measured = summarize([rests[0] / rests[1]] if all(rests) else [])
        yield Claim(f"the same without scoring, device time, {text}", measured, at_most=1.1)


def _long_targets(results: Results) -> Iterator[Claim]:
    long, short = WORKLOADS["read-128k-512"], WORKLOADS["read-32k-512"]
    for step, text in _TEXTS.items():
        attention = results.seconds(f"attention: B=1 T={long.length}", step)
        ratio, bound = _ratio(results.seconds(long.name, step), attention), 1.0 if step == "forward" else None
        yield Claim(f"B=1 T=131072 N=512², {text}: memory / attention", ratio, at_most=bound)
    ratio = _ratio(results.seconds(long.name, "forward"), results.seconds(short.name, "forward"))
    per_token = _scaled(ratio, short.length / long.length)
    yield Claim("B=1 N=512², forward a token: T=131072 / T=32768", per_token, at_most=1.1)


def _ratio(a: Summary | None, b: Summary | None) -> Summary | None:
    """Of medians, with the quartiles that are farthest apart."""
    if a is None or b is None:
        return None
    return Summary(a.median / b.median, a.low / b.high, a.high / b.low, min(a.size, b.size))


def _scaled(summary: Summary | None, factor: float) -> Summary | None:
    return summary and summary.scaled(factor)


def _title(name: str) -> str:
    workload = WORKLOADS[name]
    tables = f"{workload.memories} tables" if workload.memories > 1 else "one table"
    return f"B={workload.batch} T={workload.length} N={workload.config.num_subkeys}², {tables}"
