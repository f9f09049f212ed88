"""The commands: prepare a corpus, train, measure, draw."""

import argparse
import sys
from pathlib import Path

import torch

from examples.language_model import by_position, capacity, corpus, names, needle, report, training
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

    train = commands.add_parser("train", help="train an experiment, or go on from its checkpoint")
    train.add_argument("experiment", type=Path, help="a TOML file, see examples/language_model/configs")
    _common(train, model=False)
    for name, kind in (("--steps", int), ("--seed", int), ("--facts", float)):
        train.add_argument(name, type=kind, help="instead of the file's")
    train.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    train.add_argument("--seconds", type=float, help="stop with a checkpoint after so many")
    train.set_defaults(run=_train)

    ask = commands.add_parser("needle", help="ask for facts in long texts")
    _common(ask)
    ask.add_argument("--kinds", nargs="+", help=f"what is asked, of: {', '.join(needle.KINDS)}")
    ask.add_argument("--lengths", type=int, nargs="+", help="of contexts, in bytes")
    ask.add_argument("--contexts", type=int, help="of five facts, for each kind and length")
    ask.add_argument("--readings", type=int, help="how often a context is read")
    ask.set_defaults(run=_needle)

    hold = commands.add_parser("capacity", help="ask for ever more facts in 128K bytes")
    _common(hold)
    hold.add_argument("--length", type=int, default=capacity.LENGTH)
    hold.add_argument("--facts", type=int, nargs="+", default=capacity.NUMBERS, help="numbers of them")
    hold.set_defaults(run=_capacity)

    position = commands.add_parser("bits", help="bits per byte by position on held-out documents")
    _common(position)
    position.add_argument("--length", type=int, default=131072)
    position.set_defaults(run=_bits)

    own = commands.add_parser("names", help="ask for names that held-out books hold and training books do not")
    _common(own)
    own.add_argument("--length", type=int, default=131072)
    own.set_defaults(run=_names)

    look = commands.add_parser("inside", help="draw what the memories hold, and where their gates open")
    _common(look)
    look.set_defaults(run=_inside)

    tables = commands.add_parser("report", help="print the tables of what was measured, and draw it")
    tables.add_argument("folder", type=Path, help="holds NAME.needle.json, NAME.bits.json, NAME.record.jsonl")
    tables.add_argument("--pictures", type=Path, metavar="OUT", help="a folder for the pictures")
    tables.set_defaults(run=_report)
    return parser


def _common(parser: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        parser.add_argument("--model", type=Path, required=True, help="the folder of a trained model")
    parser.add_argument("--corpus", type=Path, required=True, help="a folder made by prepare")
    parser.add_argument("--out", type=Path, required=True)
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


def _needle(options: argparse.Namespace) -> None:
    cells = needle.chosen(options.kinds, options.lengths, options.contexts, options.readings)
    print(needle.measure(options.model, corpus.load(options.corpus), options.out, options.device, cells))


def _capacity(options: argparse.Namespace) -> None:
    path = capacity.measure(
        options.model, corpus.load(options.corpus), options.out, options.device, length=options.length,
        numbers=options.facts,
    )  # fmt: skip
    print(path)


def _bits(options: argparse.Namespace) -> None:
    texts = corpus.load(options.corpus)
    print(by_position.measure(options.model, texts, options.out, options.device, length=options.length))


def _names(options: argparse.Namespace) -> None:
    texts = corpus.load(options.corpus)
    print(names.measure(options.model, texts, options.out, options.device, length=options.length))


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
