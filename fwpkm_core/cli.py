"""The command ``fwpkm``: ``demo``, ``doctor``, ``inspect``, ``backends``, ``conform`` and ``vectors``."""

import argparse
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fwpkm import __version__, backend_names, vectors
from fwpkm.conformance import require_extra
from fwpkm.demo import DemoError, command, recall
from fwpkm.diagnostics import doctor, page
from fwpkm.installation import listing

DESCRIPTION = "Fast-weight Product Key Memory: a memory layer that is rewritten while a sequence is read."
DEMO = """\
Stream a text through an untrained memory, several times, and count how often it recalls the next token; beside it
run two controls, one that never writes and one whose targets are shuffled, and a dictionary of the last 8 tokens; ask
both once more with one token in twenty replaced. Prints tables and saves a picture."""
CONFORM = """\
Judge backends by the NumPy reference (SPEC.md §6) on drawn cases: outputs, slots, weights, losses, tables, the state in
mid-sequence, gradients, which are held to torch's in float64, each function by itself, and whether arguments stay as
they were. Exit status: 1 where a bound is broken, 2 where a backend cannot run."""
VECTORS = """\
Write the reference vectors into a new folder: inputs, and the float64 results and gradients of the published equations,
as .npz files."""

DOCTOR = """\
Report on a saved layer or state: shapes, config, numbers that are not finite, norms of the rows of its tables,
positions and pending tokens. Exit status: 1 where something is not finite or the file is damaged, 2 where it is no file
that can be judged."""
BACKENDS = """\
List every backend, and the other parts of the package, with the versions of what they need, Keras's framework, or what
to install. From metadata: nothing is imported. With --check each part that is installed is imported in a process of its
own and computes one call; exit status 1 where one of them gives no right answer."""
JSON = "print one JSON object instead"
INSPECT = """\
Make one HTML page of a recording (fwpkm.Recorder): the map of slots, who wrote each of them, which are contested, and
the norms of their rows over time. It needs no network and no other file."""


class UsageError(Exception):
    """Wrong arguments; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """Complains by exception, and takes no abbreviated options: a later one could make them ambiguous."""

    commands: Sequence[str] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after an error (one line on stderr), 130 when interrupted."""
    try:
        parser, argv = _parser(), sys.argv[1:] if argv is None else argv
        _check_command(argv, parser.commands)
        arguments = parser.parse_args(argv)
        _print_anything()
        return arguments.run(arguments)
    except (UsageError, DemoError, ImportError) as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("not enough memory; try a smaller --num-subkeys or --chunk-size")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has left, as `fwpkm demo | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FileNotFoundError as error:
        return _fail(f"{error.filename}: no such file" if error.filename else str(error))
    except OSError as error:  # such as a full disk
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _check_command(argv: Sequence[str], known: Sequence[str]) -> None:
    """Say of a command that is not there which one was probably meant."""
    name = next(iter(argv), "-")
    if name.startswith("-") or name in known:
        return
    meant = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {meant[0]}?" if meant else f"expected one of {', '.join(known)}"
    raise UsageError(f"unknown command {name!r}: {hint} (see fwpkm --help)")


def _parser() -> _Parser:
    parser = _Parser(prog="fwpkm", description=DESCRIPTION)
    parser.add_argument("-V", "--version", action="version", version=f"fwpkm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="stream a text through a memory and show what it recalls", description=DEMO)
    demo.add_argument(
        "files", nargs="*", metavar="FILE", help="UTF-8 text; several are read as one (default: a short story)"
    )
    names = ", ".join(backend_names())
    demo.add_argument(
        "--backend", metavar="NAME", help=f"one of {names} (default: torch where it is installed, else numpy)"
    )
    numbers: tuple[tuple[str, int, int, int | None, str], ...] = (
        ("--passes", 3, 1, None, "how many times the text is read"),
        (
            "--num-subkeys",
            256,
            recall.TOP_K,
            recall.MAX_SUBKEYS,
            "S, sub-keys per codebook: the memory has S x S slots",
        ),
        ("--chunk-size", 512, 2, None, "tokens per write"),
    )
    for name, default, lowest, highest, text in numbers:
        number = _integer(lowest, highest)
        demo.add_argument(name, type=number, default=default, metavar="N", help=f"{text} (default: {default})")
    demo.add_argument(
        "--out", default="fwpkm-demo", metavar="DIR", help="folder for the picture (default: ./%(default)s)"
    )
    demo.add_argument("--json", action="store_true", help=JSON)
    demo.set_defaults(run=_demo)
    _add_diagnostics(commands)
    _add_conform(commands)
    reference = commands.add_parser("vectors", help="write the reference vectors as .npz files", description=VECTORS)
    reference.add_argument("folder", metavar="DIR", help="the folder; one that is there already must be empty")
    reference.set_defaults(run=_vectors)
    _add_backends(commands)
    parser.commands = list(commands.choices)
    return parser


def _add_backends(commands: Any) -> None:
    short = "list every backend with its versions, or what to install"
    backends = commands.add_parser("backends", help=short, description=BACKENDS)
    backends.add_argument("--check", action="store_true", help="import each part that is installed and run one call")
    backends.add_argument("--json", action="store_true", help=JSON)
    backends.set_defaults(run=_backends)


def _add_diagnostics(commands: Any) -> None:
    judge = commands.add_parser("doctor", help="report on a saved layer or state", description=DOCTOR)
    judge.add_argument("file", metavar="FILE", help="a file of fwpkm.save or fwpkm.save_state")
    judge.add_argument(
        "--memory", metavar="FILE", help="the layer, or state, that it began from: count the slots written since"
    )
    judge.add_argument("--json", action="store_true", help="print the report as JSON")
    judge.set_defaults(run=_doctor)
    inspect = commands.add_parser("inspect", help="make a page of a recording", description=INSPECT)
    inspect.add_argument("recording", metavar="RECORD", help="a file of fwpkm.Recorder")
    inspect.add_argument(
        "--out", default="fwpkm-inspect", metavar="DIR", help=f"folder for {page.NAME} (default: ./%(default)s)"
    )
    inspect.add_argument("--overwrite", action="store_true", help="replace a page that is there already")
    inspect.set_defaults(run=_inspect)


def _add_conform(commands: Any) -> None:
    conform = commands.add_parser("conform", help="judge backends by the reference", description=CONFORM)
    conform.add_argument(
        "--backends",
        nargs="+",
        default=[],
        metavar="NAME",
        help="numpy, torch, jax, keras-tensorflow, keras-jax, keras-torch, triton and jax-triton (torch and jax on the "
        "kernels, float32 only), or any module that has the functions of SPEC.md §8, such as mypackage.mymodule "
        "(default: every backend of this package, without the kernels)",
    )
    for name, default, lowest, text in (
        ("--cases", 200, 1, "how many cases are drawn (default: 200)"),
        ("--seed", 0, 0, "what they follow from (default: 0)"),
        ("--case", None, 0, "run this case alone"),
    ):
        conform.add_argument(name, type=_integer(lowest, None), default=default, metavar="N", help=text)
    conform.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    conform.add_argument("--markdown", action="store_true", help="print the table alone, as Markdown")
    conform.add_argument("--json", action="store_true", help=JSON)
    conform.set_defaults(run=_conform)


def _demo(arguments: argparse.Namespace) -> int:
    backend = arguments.backend
    if backend is None:
        backend = "torch" if importlib.util.find_spec("torch") else "numpy"
    if backend not in backend_names():
        raise UsageError(f"argument --backend: must be one of {', '.join(backend_names())}. Received: {backend!r}")
    # Read when a framework loads: threads that spin while they wait make torch twenty times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command.run(
        arguments.files,
        backend,
        passes=arguments.passes,
        num_subkeys=arguments.num_subkeys,
        chunk_size=arguments.chunk_size,
        out=arguments.out,
        as_json=arguments.json,
    )
    return 0


def _conform(arguments: argparse.Namespace) -> int:
    if arguments.markdown and arguments.json:
        raise UsageError("--markdown and --json exclude each other (see fwpkm conform --help)")
    require_extra()
    from fwpkm.conformance.command import run  # only now: it imports hypothesis, rich and torch
    from fwpkm.conformance.contestants import CannotRunError

    try:
        return run(
            arguments.backends,
            cases=arguments.cases,
            seed=arguments.seed,
            dtype=arguments.dtype,
            case=arguments.case,
            markdown=arguments.markdown,
            as_json=arguments.json,
        )
    except CannotRunError as error:
        raise UsageError(f"argument --backends: {error}") from None


def _doctor(arguments: argparse.Namespace) -> int:
    try:
        report = doctor.examine(arguments.file, arguments.memory)
    except doctor.DoctorError as error:
        raise UsageError(str(error)) from None
    print(json.dumps(report, indent=1, allow_nan=False) if arguments.json else doctor.as_text(report))
    return 1 if report["problems"] else 0


def _inspect(arguments: argparse.Namespace) -> int:
    try:
        written = page.write_page(arguments.recording, arguments.out, overwrite=arguments.overwrite)
    except FileExistsError as error:
        raise UsageError(f"{error} (--overwrite)") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(written)
    return 0


def _vectors(arguments: argparse.Namespace) -> int:
    folder = vectors.write(arguments.folder)
    print(f"{len(vectors.names())} vectors in {folder}")
    return 0


def _backends(arguments: argparse.Namespace) -> int:
    return listing.run(checked=arguments.check, as_json=arguments.json)


def _integer(lowest: int, highest: int | None) -> Callable[[str], int]:
    """A reader of integers in a range, whose complaint says what was expected."""
    rule = f"an integer of at least {lowest}" + (f" and at most {highest}" if highest else "")

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest or (highest is not None and number > highest):
            raise argparse.ArgumentTypeError(f"must be {rule}. Received: {text!r}")
        return number

    return read


def _print_anything() -> None:
    """Escape what the terminal's encoding lacks, such as letters in a file's name, rather than stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int = 2) -> int:
    print("fwpkm: error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
