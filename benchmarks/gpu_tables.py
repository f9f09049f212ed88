"""From what was found and measured to tables and the stated targets."""

import dataclasses
from collections.abc import Iterable, Sequence

from benchmarks import gpu_plan
from benchmarks.findings import Report, equal
from benchmarks.gpu_plan import TRAIN
from benchmarks.gpu_speed import SCORING, Speed
from benchmarks.gpu_tasks import Outcome, Task
from benchmarks.measure import Summary, summarize
from benchmarks.report import Claim, Table, milliseconds
from benchmarks.workloads import WORKLOADS

_FORM = "{:.3g}"
_STEPS = ("forward", "train")
_SHOWN_KERNELS = 16


@dataclasses.dataclass
class Results:
    """Everything that one run has found so far."""

    checks: list[Outcome] = dataclasses.field(default_factory=list)
    timings: dict[str, object] = dataclasses.field(default_factory=dict)
    """By the task's name."""
    failed: list[str] = dataclasses.field(default_factory=list)
    """Names of tasks that raised, or disagreed."""
    silenced: list[str] = dataclasses.field(default_factory=list)
    """Names of timings that were not taken, because what they would time was not shown to agree."""

    def speed(self, name: str) -> Speed | None:
        """What was measured at a workload."""
        found = self.timings.get(name)
        return found if isinstance(found, Speed) else None

    def seconds(self, name: str, step: str) -> Summary | None:
        """Of a step at a workload."""
        speed = self.speed(name)
        return summarize(speed.seconds.get(step, ())) if speed else None

    def floor(self, name: str, step: str) -> float | None:
        """Seconds that its least bytes take at the speed of a copy."""
        speed, bandwidth = self.speed(name), self.timings.get("copy bandwidth")
        return getattr(speed.least_bytes, step) / bandwidth if speed and isinstance(bandwidth, float) else None

    def attention(self, batch: int, length: int, step: str) -> Summary | None:
        """Seconds of attention over as many tokens."""
        found = self.timings.get(f"attention: B={batch} T={length}")
        return summarize(found[step]) if isinstance(found, dict) else None

    def kernels(self, name: str, step: str) -> dict[str, float]:
        """Device seconds by kernel."""
        found = self.timings.get(f"kernels: {name}")
        return found[step] if isinstance(found, dict) else {}

    def agreed(self, task: Task) -> bool:
        """Whether what a task would time was compared, at its configuration and dtype, and all of it agrees.

        True of what runs no memory.
        """
        timed = gpu_plan.subject(task)
        section = "decode" if task.section == "decode" else "agreement"
        mine = [x for x in self.checks if x.task.section == section and gpu_plan.subject(x.task) == timed]
        return timed is None or (bool(mine) and all(map(agrees, mine)))


def agrees(outcome: Outcome) -> bool:
    """Whether a check ran to its end and found agreement."""
    return isinstance(outcome.result, Report) and outcome.result.agrees


def check_line(outcome: Outcome) -> str:
    """One line for a check that has ended."""
    name = f"{outcome.task.section}  {outcome.task.name}"
    if not isinstance(outcome.result, Report):
        return f"{name}: RAISED, {outcome.seconds:.1f} s"
    wrong = [finding for finding in outcome.result.findings if not finding.agrees]
    said = "; ".join(map(str, wrong or [outcome.result.worst]))
    return f"{name}: {said}" + "".join(f"; {note}" for note in outcome.result.notes) + f", {outcome.seconds:.1f} s"


def timing_line(outcome: Outcome) -> str:
    """One line for a timing that has ended."""
    result, name = outcome.result, f"{outcome.task.section}  {outcome.task.name}"
    if outcome.error:
        said = "RAISED"
    elif isinstance(result, float):
        said = f"{result / 1e12:.2f} TB/s"
    elif isinstance(result, list):
        said = f"{milliseconds(summarize(result), _FORM)} ms"
    else:
        seconds = result.seconds if isinstance(result, Speed) else result
        said = "; ".join(f"{step} {_total(samples)} ms" for step, samples in seconds.items())
    return f"{name}: {said}, {outcome.seconds:.1f} s"


def _total(samples: object) -> str:
    if isinstance(samples, dict):
        return f"{1e3 * sum(samples.values()):.3g}"
    return milliseconds(summarize(samples), _FORM)


def between_processes(outcomes: Iterable[Outcome]) -> Report | None:
    """Whether the processes that computed the same thing came to the same bits; None before two have."""
    digests = [o.result.digest for o in outcomes if isinstance(o.result, Report) and o.result.digest]
    if len(digests) < 2:
        return None
    return Report([equal("sha256 in two processes", len(set(digests)) == 1)])


def agreement_table(outcomes: Sequence[Outcome]) -> Table:
    """What agrees, by group: a task's name up to its colon."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.task.name.partition(":")[0], []).append(outcome)
    rows = []
    for name, members in groups.items():
        reports = [member.result for member in members if isinstance(member.result, Report)]
        findings = [finding for report in reports for finding in report.findings]
        worst = max(findings, key=lambda finding: finding.share, default=None)
        raised = len(members) - len(reports)
        verdict = f"RAISED in {raised}" if raised else "agrees" if all(map(agrees, members)) else "DISAGREES"
        rows.append((name, str(len(members)), str(len(findings)), str(worst or "-"), verdict))
    return Table("Agreement", ("what", "cases", "quantities", "nearest to its bound", "verdict"), rows)


def speed_tables(results: Results) -> list[Table]:
    """Times, ratios to the floor, and memory of every workload that was timed."""
    names = [name for name in results.timings if results.speed(name)]
    if not names:
        return []
    return [_times(results, names), _floors(results, names), _memory(results, names)]


def _times(results: Results, names: list[str]) -> Table:
    columns = ("time, ms", "forward", "forward + backward", "captured forward", "captured forward + backward")
    columns += ("eager forward", "eager forward + backward", "attention forward", "attention forward + backward")
    rows = []
    for name in names:
        kinds = ("", "captured ", "eager ")
        of_memory = [results.seconds(name, kind + step) for kind in kinds for step in _STEPS]
        workload = _workload(name)
        of_attention = [results.attention(workload.batch, workload.length, step) for step in _STEPS]
        rows.append((_title(name), *(milliseconds(x, _FORM) for x in (*of_memory, *of_attention))))
    return Table("Time", columns, rows)


def _floors(results: Results, names: list[str]) -> Table:
    columns = ("against the traffic floor", "forward: least GB", "floor, ms", "time / floor")
    columns += ("with backward: least GB", "floor, ms", "time / floor")
    rows = []
    for name in names:
        cells: list[str] = []
        for step in _STEPS:
            speed, seconds, floor = results.speed(name), results.seconds(name, step), results.floor(name, step)
            cells.append(f"{getattr(speed.least_bytes, step) / 1e9:.3g}" if speed else "-")
            cells.append(_FORM.format(1e3 * floor) if floor else "-")
            cells.append(_FORM.format(seconds.median / floor) if seconds and floor else "-")
        rows.append((_title(name), *cells))
    bandwidth = results.timings.get("copy bandwidth")
    copy = f"{bandwidth / 1e12:.2f} TB/s" if isinstance(bandwidth, float) else "not measured"
    return Table(f"Traffic; a device copy reads and writes {copy}", columns, rows)


def _memory(results: Results, names: list[str]) -> Table:
    steps = (*_STEPS, *(f"eager {step}" for step in _STEPS))
    rows = []
    for name in names:
        speed = results.speed(name)
        sizes = [speed.extra_bytes.get(step) if speed else None for step in steps]
        rows.append((_title(name), *("-" if size is None else f"{size / 2**30:.2f}" for size in sizes)))
    columns = ("peak GiB beyond inputs, outputs, tables", "forward", "forward + backward")
    return Table("Memory", (*columns, "eager forward", "eager forward + backward"), rows)


def kernel_tables(results: Results) -> list[Table]:
    """Where the device's time goes."""
    names = [name for name in TRAIN if results.kernels(name, "train")]
    if not names:
        return []
    columns = ("device time, µs", *(f"{name}: {step}" for name in names for step in ("forward", "with backward")))
    by_name = {(name, step): results.kernels(name, step) for name in names for step in _STEPS}
    every = {kernel for kernels in by_name.values() for kernel in kernels}
    order = sorted(every, key=lambda kernel: -max(kernels.get(kernel, 0) for kernels in by_name.values()))
    rows = [
        (kernel[:60].replace("|", "/"), *(f"{1e6 * kernels.get(kernel, 0):.1f}" for kernels in by_name.values()))
        for kernel in order[:_SHOWN_KERNELS]
    ]
    rows.append(("all", *(f"{1e6 * sum(kernels.values()):.1f}" for kernels in by_name.values())))
    rows.append(("all but scoring", *(f"{1e6 * _unscored(kernels):.1f}" for kernels in by_name.values())))
    return [Table("Kernels of one call", columns, rows)]


def _unscored(kernels: dict[str, float]) -> float:
    return sum(seconds for name, seconds in kernels.items() if not any(score in name for score in SCORING))


def other_tables(results: Results) -> list[Table]:
    """Decoding, and the copies of the initial memory."""
    tables = []
    for name, found in results.timings.items():
        if name.startswith("decode: ") and isinstance(found, dict):
            rows = [(step, _microseconds(summarize(samples))) for step, samples in found.items()]
            tables.append(Table(f"Decoding, {_title(name.partition(': ')[2])}", ("implementation", "µs a token"), rows))
    copies = [(name, found) for name, found in results.timings.items() if name.startswith("initial state: ")]
    rows = [(name.partition(": ")[2], milliseconds(summarize(found), _FORM)) for name, found in copies]
    return [*tables, Table("A fresh copy of the initial memory adds", ("workload", "ms"), rows)] if rows else tables


def _microseconds(seconds: Summary | None) -> str:
    """A time with its quartiles."""
    return milliseconds(_scaled(seconds, 1e3), _FORM)


def targets(results: Results, sections: set[str]) -> list[Claim]:
    """What the kernels are to reach on one H200, for the sections that were run."""
    claims = []
    if "speed" in sections:
        claims += [*_batch_targets(results), *_growth_targets(results), *_long_targets(results)]
    if "decode" in sections:
        found = results.timings.get("decode: decode-512")
        seconds = summarize(found["graph"]) if isinstance(found, dict) else None
        claims.append(Claim("decode B=1 in a CUDA graph, µs a token", _scaled(seconds, 1e6), at_most=40))
    return claims


def _batch_targets(results: Results) -> Iterable[Claim]:
    for name, what, factor in (("shared-512", "one table", 1.0), ("train-512", "a table a sequence", 1.5)):
        for step, text, bound, aim in (("forward", "forward", 1.5, 1.0), ("train", "forward + backward", 5.0, 3.0)):
            aims = f" (aim {aim:g})" if factor == 1 else ""
            text = f"B=8 T=4096 N=512², {what}: {text}, ms{aims}"
            yield Claim(text, _scaled(results.seconds(name, step), 1e3), at_most=factor * bound)
            captured = _scaled(results.seconds(name, f"captured {step}"), 1e3)
            yield Claim("the same call, replayed from a CUDA graph, ms", captured, at_most=factor * bound)
    speed = results.speed("shared-512")
    for step, text in zip(_STEPS, ("forward", "forward + backward")):
        size = speed.extra_bytes.get(step) if speed else None
        measured = summarize([] if size is None else [size / 2**30])
        yield Claim(f"B=8 T=4096 N=512², one table: extra memory of {text}, GiB", measured, at_most=1.5)


def _growth_targets(results: Results) -> Iterable[Claim]:
    for step, text in zip(_STEPS, ("forward", "forward + backward")):
        large, small = (results.seconds(name, step) for name in ("shared-1024", "shared-256"))
        yield Claim(f"B=8 T=4096, {text}: N=1024² / N=256²", _ratio(large, small), at_most=1.5)
        rests = [_unscored(results.kernels(name, step)) for name in ("shared-1024", "shared-256")]
        measured = summarize([rests[0] / rests[1]] if all(rests) else [])
        yield Claim(f"the same without scoring, device time, {text}", measured, at_most=1.1)


def _long_targets(results: Results) -> Iterable[Claim]:
    long, short = WORKLOADS["read-128k-512"], WORKLOADS["read-32k-512"]
    for step, text in zip(_STEPS, ("forward", "forward + backward")):
        mine, other = results.seconds(long.name, step), results.attention(1, long.length, step)
        bound = 1.0 if step == "forward" else None
        yield Claim(f"B=1 T=131072 N=512², {text}: memory / attention", _ratio(mine, other), at_most=bound)
    ratio = _ratio(results.seconds(long.name, "forward"), results.seconds(short.name, "forward"))
    per_token = _scaled(ratio, short.length / long.length)
    yield Claim("B=1 N=512², forward a token: T=131072 / T=32768", per_token, at_most=1.1)


def _ratio(a: Summary | None, b: Summary | None) -> Summary | None:
    """Of medians, with the quartiles that are farthest apart."""
    if a is None or b is None:
        return None
    return Summary(a.median / b.median, a.low / b.high, a.high / b.low, min(a.size, b.size))


def _scaled(summary: Summary | None, factor: float) -> Summary | None:
    return summary and Summary(*(factor * x for x in summary[:3]), summary.size)


def _workload(name: str) -> gpu_plan.Workload:
    return gpu_plan.TINY if name == gpu_plan.TINY.name else WORKLOADS[name]


def _title(name: str) -> str:
    workload = _workload(name)
    tables = f"{workload.memories} tables" if workload.memories > 1 else "one table"
    return f"B={workload.batch} T={workload.length} N={workload.config.num_subkeys}², {tables}"
