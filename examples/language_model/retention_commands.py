"""The commands of docs/retention.md: domains, what a memory keeps of them, and experiments in lists."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.language_model import choices, domains, experiments, retained, retention


def add(commands: Any, on_device: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add them to the parser's commands; ``on_device`` gives one a --device."""
    build = commands.add_parser("domains", help="build the domains that retention reads")
    build.add_argument("out", type=Path, help="a folder to make")
    build.add_argument("--list", type=Path, default=domains.LIST, help="a TOML file that names documents")
    build.add_argument("--source", type=_pair, nargs="+", required=True, metavar="NAME=PATH", help="of the list's")
    build.add_argument("--corpus", type=Path, required=True, help="what models are trained on, made by prepare")
    build.set_defaults(run=_domains)

    keep = commands.add_parser("retention", help="what a memory keeps of a domain while it reads others")
    keep.add_argument("--model", type=Path, required=True, help="the folder of a trained model")
    keep.add_argument("--domains", type=Path, required=True, help="a folder made by domains")
    keep.add_argument("--out", type=Path, required=True, help="NAME-SEED.retention.json")
    keep.add_argument("--size", type=int, default=retention.SIZE, help="bytes that are read of a domain")
    keep.add_argument("--other", type=int, default=retention.OTHER, help="bytes of its other documents, to measure on")
    keep.add_argument("--texts", type=int, default=retention.TEXTS, help="of each domain")
    keep.add_argument("--memory", type=_pair, nargs="+", default=[], metavar="FIELD=VALUE", help="override the model's")
    keep.add_argument("--snapshots", action="store_true", help="keep the memories after each domain; read what fits")
    on_device(keep)
    keep.set_defaults(run=_retention)

    kept = commands.add_parser("retained", help="print the tables of retention, and draw it")
    kept.add_argument("folder", type=Path, help="holds NAME-SEED.retention.json")
    kept.add_argument("--pictures", type=Path, metavar="OUT", help="a folder for the picture")
    kept.set_defaults(run=_retained)

    group = commands.add_parser("experiments", help="print the experiments of a group, as train takes them")
    group.add_argument("group")
    group.add_argument("--list", type=Path, default=experiments.LIST, help="a TOML file of groups")
    group.set_defaults(run=lambda o: print(*experiments.of_group(o.list, o.group), sep="\n"))

    choose = commands.add_parser("choices", help="print one table of models that differ in a choice")
    choose.add_argument("folder", type=Path, help="holds NAME-SEED.retention.json, and results of other commands")
    choose.add_argument("--against", required=True, metavar="NAME", help="the model that the others are compared with")
    choose.set_defaults(run=lambda o: print(choices.report(choices.load(o.folder), o.against), end=""))


def _pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE. Received: {text}")
    return name, value


def _domains(options: argparse.Namespace) -> None:
    sources = {name: Path(value) for name, value in options.source}
    print(domains.build(options.list, sources, options.corpus, options.out))


def _retention(options: argparse.Namespace) -> None:
    fields = {name: _value(value) for name, value in options.memory}
    path = retention.measure(
        options.model, domains.load(options.domains), options.out, options.device, size=options.size,
        other=options.other, texts=options.texts, memory=fields, snapshots=options.snapshots,
    )  # fmt: skip
    print(path)


def _value(text: str) -> Any:
    """A number, true, false or null, as JSON writes them; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _retained(options: argparse.Namespace) -> None:
    models = retained.load(options.folder)
    print(retained.report(models), end="")
    if options.pictures is not None:
        from examples.language_model import retention_picture  # training needs no matplotlib

        print(retention_picture.draw(models, options.pictures), file=sys.stderr)
