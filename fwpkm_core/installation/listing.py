"""``fwpkm backends``: a line for each part of this package, or all of them as JSON."""

import json
import platform
from importlib.metadata import version
from typing import Any

from fwpkm.installation.checking import Answer, check
from fwpkm.installation.found import Status, backend_status, other_status

HINT = "From metadata alone: nothing was imported. --check imports each and runs one call."


def run(*, checked: bool = False, as_json: bool = False) -> int:
    """Print what is installed and what it lacks.

    Args:
        checked: import each part that is installed, run one call of it, and print its line as soon as it has answered.
        as_json: print one JSON object at the end instead; docs/commands.md has its keys.

    Returns:
        the exit status: 1 where a part that is installed gave no right answer, else 0.
    """
    failed = False
    report: dict[str, Any] = {"fwpkm": version("fwpkm"), "python": platform.python_version()}
    report["platform"] = f"{platform.system()} {platform.machine()}"
    if not as_json:
        print(f"fwpkm {report['fwpkm']}, Python {report['python']} on {report['platform']}")
    for kind, parts in (("backends", backend_status()), ("others", other_status())):
        report[kind] = []
        if not as_json:
            print(flush=True)
        for part in parts:
            answer = check(part.name) if checked and not part.reason else None
            failed |= answer is not None and bool(answer.error)
            report[kind].append(_entry(part, answer))
            if not as_json:
                print(_line(part, answer), flush=True)
    if as_json:
        print(json.dumps(report, indent=1))
    elif not checked:
        print(f"\n{HINT}")
    return int(failed)


def _entry(part: Status, answer: Answer | None) -> dict[str, Any]:
    entry = part._asdict() | {"check": None}
    if answer is not None:
        entry["check"] = {"ok": not answer.error, **answer._asdict(), "seconds": round(answer.seconds, 2)}
    return entry


def _line(part: Status, answer: Answer | None) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in part.packages.items())
    if part.reason:
        return f"{part.name:<13} {part.reason}"
    line = "; ".join(text for text in (versions, part.note) if text)
    if answer is None:
        return f"{part.name:<13} {line}"
    became = f"FAILED: {answer.error}" if answer.error else f"ok on {answer.device}"
    return f"{part.name:<13} {became} ({answer.seconds:.1f} s; {line})"
