"""The commands: prepare a corpus, train, measure, draw."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.language_model import (
    by_position,
    capacity,
    conversations,
    corpus,
    names,
    needle,
    report,
    retention_commands,
    run,
    side_by_side,
    topics,
    training,
)  # fmt: skip
from examples.language_model.settings import Experiment


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what the user can mend is said in one line, with exit status 2, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.language_model", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a corpus of texts")
    prepare.add_argument("source", type=Path, help="a folder of text files, or of .jsonl or .jsonl.xz files")
    prepare.add_argument("out", type=Path)
    prepare.add_argument("--code", action="store_true", help="the source is a tree of C code")
    prepare.add_argument("--hold-out", type=int, default=0, metavar="N", help="so many contributors more")
    prepare.set_defaults(run=lambda o: corpus.prepare(o.source, o.out, code=o.code, hold_out=o.hold_out))

    help_topics = commands.add_parser("topics", help="write a small text for prepare: the topics of Python's help()")
    help_topics.add_argument("out", type=Path, help="a folder")
    help_topics.set_defaults(run=lambda o: print(topics.write(o.out)))

    train = commands.add_parser("train", help="train an experiment, or go on from its checkpoint")
    train.add_argument("experiment", type=Path, help="a TOML file, or one of a list, see configs and experiments.toml")
    _common(train, model=False)
    for name, kind in (("--steps", int), ("--seed", int), ("--facts", float)):
        train.add_argument(name, type=kind, help="instead of the file's")
    train.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    train.add_argument("--seconds", type=float, help="stop with a checkpoint after so many")
    train.set_defaults(run=_train)

    everything = commands.add_parser("run", help="train and measure experiments, a process for each seed, on all cards")
    everything.add_argument("experiments", type=Path, nargs="+", metavar="CONFIG", help="TOML files, or some of a list")
    everything.add_argument("--seeds", type=int, nargs="+", required=True)
    everything.add_argument("--corpus", type=Path, required=True, help="a folder made by prepare")
    everything.add_argument("--out", type=Path, required=True, help="a folder; what is done there is kept")
    everything.add_argument("--steps", type=int, help="instead of the files'")
    everything.add_argument("--measures", nargs="*", choices=list(run.MEASURES), help="all, by default")
    about = "a folder made by domains; without it no retention is measured"
    everything.add_argument("--domains", type=Path, help=about)
    _asked(everything)
    everything.add_argument("--length", type=int, default=run.Asked().length, help="of texts, for bits and capacity")
    everything.add_argument("--facts", type=int, nargs="+", default=capacity.NUMBERS, help="numbers, for capacity")
    everything.add_argument("--side-by-side", type=int, default=1, metavar="N", help="processes at once on a card")
    everything.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    everything.set_defaults(run=_run)

    ask = commands.add_parser("needle", help="ask for facts in long texts")
    _common(ask)
    _asked(ask)
    ask.set_defaults(run=_needle)

    hold = _measuring(
        commands, "capacity", "ask for ever more facts in 128K bytes", capacity.measure, "length", "numbers"
    )
    hold.add_argument("--length", type=int, default=capacity.LENGTH)
    hold.add_argument("--facts", type=int, nargs="+", default=capacity.NUMBERS, dest="numbers", metavar="FACTS")

    about = "how many bytes packed memories take"
    talk = _measuring(commands, "conversations", about, conversations.measure, "number", "length")
    talk.add_argument("--number", type=int, default=100, help="of documents")
    talk.add_argument("--length", type=int, default=4096, help="bytes of each")

    about = "bits per byte by position on held-out documents"
    position = _measuring(commands, "bits", about, by_position.measure, "length")
    position.add_argument("--length", type=int, default=131072)

    about = "ask for names that held-out books hold and training books do not"
    own = _measuring(commands, "names", about, names.measure, "length")
    own.add_argument("--length", type=int, default=131072)

    retention_commands.add(commands, _on_device)

    look = commands.add_parser("inside", help="draw what the memories hold, and where their gates open")
    _common(look)
    look.set_defaults(run=_inside)

    tables = commands.add_parser("report", help="print the tables of what was measured, and draw it")
    tables.add_argument("folder", type=Path, help="holds NAME.needle.json, NAME.bits.json, NAME.record.jsonl")
    tables.add_argument("--pictures", type=Path, metavar="OUT", help="a folder for the pictures")
    tables.set_defaults(run=_report)
    return parser


def _measuring(
    commands: Any, name: str, about: str, measure: Callable[..., Path], *given: str
) -> argparse.ArgumentParser:
    """A command that measures a trained model and prints where the results are; ``given`` options reach ``measure``."""

    def run(o: argparse.Namespace) -> None:
        print(measure(o.model, corpus.load(o.corpus), o.out, o.device, **{name: getattr(o, name) for name in given}))

    parser = commands.add_parser(name, help=about)
    _common(parser)
    parser.set_defaults(run=run)
    return parser


def _asked(parser: argparse.ArgumentParser) -> None:
    """What needles are asked, where it is not what the results report."""
    parser.add_argument("--kinds", nargs="+", help=f"what is asked, of: {', '.join(needle.KINDS)}")
    parser.add_argument("--lengths", type=int, nargs="+", help="of contexts, in bytes")
    parser.add_argument("--contexts", type=int, help="of five facts, for each kind and length")
    parser.add_argument("--readings", type=int, help="how often a context is read")


def _common(parser: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        parser.add_argument("--model", type=Path, required=True, help="the folder of a trained model")
    parser.add_argument("--corpus", type=Path, required=True, help="a folder made by prepare")
    parser.add_argument("--out", type=Path, required=True)
    _on_device(parser)


def _on_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _device(name: str) -> torch.device:
    """A device that is here."""
    here = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    here += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in here:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(here)}. Received: {name}")
    return torch.device(name)


def _train(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("steps", "seed", "facts") if getattr(options, name) is not None}
    experiment = Experiment.read(options.experiment, **given)
    path = training.train(
        experiment, corpus.load(options.corpus), options.out, options.device,
        compile=options.compile and options.device.type == "cuda", seconds=options.seconds,
    )  # fmt: skip
    print(path)


def _run(options: argparse.Namespace) -> None:
    if options.side_by_side < 1:
        raise ValueError(f"--side-by-side must be at least 1. Received: {options.side_by_side}")
    jobs, texts = run.plan(options.experiments, options.seeds, options.steps), corpus.load(options.corpus)
    cells = needle.chosen(options.kinds, options.lengths, options.contexts, options.readings)
    asked = run.Asked(options.length, cells, options.facts, options.domains)
    if options.measures is None:
        options.measures = [name for name in run.MEASURES if name != "retention" or options.domains is not None]
    for job in jobs:  # all of them first, so that nothing is said after hours
        run.check(job, texts, options.out, options.measures, asked)
    if len(jobs) > 1:
        side_by_side.run_all(jobs, options.out, _again(options), options.side_by_side)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1 / options.side_by_side)
    compile = options.compile and device.type == "cuda"
    run.do(
        jobs[0], texts, options.out, device, options.measures, asked, compile=compile, side_by_side=options.side_by_side
    )  # fmt: skip


def _again(options: argparse.Namespace) -> list[str]:
    """The arguments of ``run`` for one of its jobs, without config and seed."""
    arguments = ["--no-compile"][: not options.compile]
    repeated = ("steps", "measures", "kinds", "lengths", "contexts", "readings", "length", "facts", "domains")
    for name in (*repeated, "side_by_side"):
        if (given := getattr(options, name)) is not None:
            values = given if isinstance(given, (list, tuple)) else [given]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return ["--corpus", str(options.corpus), "--out", str(options.out), *arguments]


def _needle(options: argparse.Namespace) -> None:
    cells = needle.chosen(options.kinds, options.lengths, options.contexts, options.readings)
    print(needle.measure(options.model, corpus.load(options.corpus), options.out, options.device, cells))


def _inside(options: argparse.Namespace) -> None:
    from examples.language_model import inside  # training needs no matplotlib

    for path in inside.draw(options.model, corpus.load(options.corpus), options.out, options.device):
        print(path)


def _report(options: argparse.Namespace) -> None:
    print(report.report(options.folder), end="")
    if options.pictures is not None:
        from examples.language_model import pictures  # training needs no matplotlib

        for path in pictures.draw(options.folder, options.pictures):
            print(path, file=sys.stderr)
