"""The commands: prepare a corpus, train, measure, draw."""

import argparse
import sys
from pathlib import Path

import torch

from examples.language_model import by_position, corpus, needle, training
from examples.language_model.settings import Experiment


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what the user can mend is said in one line, with exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.language_model", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a corpus of texts")
    prepare.add_argument("source", type=Path, help="a folder of text files, or of .jsonl or .jsonl.xz files")
    prepare.add_argument("out", type=Path)
    prepare.add_argument("--code", action="store_true", help="the source is a tree of C code")
    prepare.set_defaults(run=lambda o: corpus.prepare(o.source, o.out, code=o.code))

    train = commands.add_parser("train", help="train an experiment, or go on from its checkpoint")
    train.add_argument("experiment", type=Path, help="a TOML file, see examples/language_model/configs")
    _common(train)
    train.add_argument("--steps", type=int, help="instead of the file's")
    train.add_argument("--seed", type=int, help="instead of the file's")
    train.add_argument("--facts", type=float, help="instead of the file's")
    train.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    train.add_argument("--seconds", type=float, help="stop with a checkpoint after so many")
    train.set_defaults(run=_train)

    ask = commands.add_parser("needle", help="ask for facts in long texts")
    _common(ask)
    ask.add_argument("--model", type=Path, required=True, help="the folder of a trained model")
    ask.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    ask.add_argument("--samples", type=int, default=200)
    ask.add_argument("--readings", type=int, default=4)
    ask.add_argument("--phrasings", nargs="+", default=["seen-0", "unseen-0"])
    ask.add_argument("--controls", action="store_true", help="also learning rate 0 and another document's memory")
    ask.set_defaults(run=_needle)

    position = commands.add_parser("bits", help="bits per byte by position on held-out documents")
    _common(position)
    position.add_argument("--model", type=Path, required=True, help="the folder of a trained model")
    position.add_argument("--length", type=int, default=131072)
    position.set_defaults(run=_bits)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", type=Path, required=True, help="a folder made by prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


def _train(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("steps", "seed", "facts") if getattr(options, name) is not None}
    experiment = Experiment.read(options.experiment, **given)
    path = training.train(
        experiment, corpus.load(options.corpus), options.out, options.device,
        compile=options.compile and options.device.type == "cuda", seconds=options.seconds,
    )  # fmt: skip
    print(path)


def _needle(options: argparse.Namespace) -> None:
    path = needle.measure(
        options.model, corpus.load(options.corpus), options.out, options.device, lengths=options.lengths,
        samples=options.samples, readings=options.readings, phrasings=options.phrasings, controls=options.controls,
    )  # fmt: skip
    print(path)


def _bits(options: argparse.Namespace) -> None:
    print(
        by_position.measure(
            options.model, corpus.load(options.corpus), options.out, options.device, length=options.length
        )
    )
