"""Lists of experiments, each some changes of one that stands in a file; LIST.toml/GROUP/NAME stands for one of them."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("experiments.toml")
FIELDS = {"base", "every", "experiments"}
"""Of a group."""


def tables(path: Path) -> dict[str, Any]:
    """The tables of an experiment, from a file of its own, or of a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not TOML, or the list has no such experiment; says which it has.
    """
    listing = next((parent for parent in path.parents if parent.is_file()), None)
    if path.exists() or listing is None:
        return _toml(path)
    group, _, name = path.relative_to(listing).as_posix().partition("/")
    its = _group(listing, group)
    if name not in its["experiments"]:
        raise ValueError(f"{listing} has no {name!r} in {group!r}; it has {', '.join(its['experiments'])}")
    base = _toml(listing.parent / its["base"])
    return _merged(_merged(base, its.get("every", {})), its["experiments"][name])


def of_group(listing: Path, group: str) -> list[Path]:
    """The experiments of a group, as paths that ``tables`` takes.

    Raises:
        ValueError: the list has no such group; says which it has.
    """
    return [listing / group / name for name in _group(listing, group)["experiments"]]


def _group(listing: Path, group: str) -> dict[str, Any]:
    groups = _toml(listing)
    if group not in groups:
        raise ValueError(f"{listing} has no group {group!r}; it has {', '.join(groups)}")
    its = groups[group]
    if not isinstance(its, dict) or not {"base", "experiments"} <= set(its) <= FIELDS:
        found = sorted(its) if isinstance(its, dict) else its
        raise ValueError(f"{listing}: [{group}] must have base, experiments, and may have every. Received: {found}")
    return its


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deep
        raise ValueError(f"{path} is not TOML: {error}") from error


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``; tables are merged field by field."""
    both = dict(base)
    for name, value in changes.items():
        old = both.get(name)
        both[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
