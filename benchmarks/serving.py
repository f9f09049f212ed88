"""``python -m benchmarks.serving``: many users on the engine of ``examples/serve.py``, a load test.

Each user sends a text, asks for an answer, and sends the next text once it has that, until it has all its tokens. All
users send their first text at once, and each its next as soon as it is answered, so that rows never rest; a wait
includes the queue for a row. The model is a small untrained one, whose cost does not hang on what it says; or the
language model of a folder, trained.

In the end some users' texts are read again, each alone, and the bytes that were written must be the likeliest there. In
float64 all must. In float32 other batches round otherwise, and now and then that chooses another slot: one in a hundred
may differ, where users whose memories were mixed would differ in most.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks import report
from examples.language_model.checkpoint import load
from examples.language_model.needle import MEMORIES
from examples.serving.engine import Engine
from examples.serving.language_model import Served
from examples.serving.model import ByteModel, Model
from fwpkm import FwPKMConfig

TOLERANCE = 1e-3
"""A byte counts as the likeliest if its logit is at most so far below the likeliest one's."""
ALLOWED = {"float32": 0.01, "float64": 0.0}
"""The fraction of the checked bytes that may differ."""
MIB = 2**20
OPTIONS: dict[str, tuple[int | None, str]] = {
    "users": (64, "how many"),
    "tokens": (8192, "of each, at least"),
    "text": (240, "bytes of a text"),
    "answer": (16, "bytes of an answer"),
    "rows": (8, "tables of each memory"),
    "in_memory": (24, "users packed in memory"),
    "piece": (64, "bytes of a text that a call reads"),
    "turn": (64, "calls until a user who is not done gives up the row"),
    "checked": (4, "users read again alone"),
}
UNTRAINED: dict[str, tuple[int | None, str]] = {
    "width": (64, "Dk, Dv and width of the untrained model"),
    "num_subkeys": (64, "its S"),
    "chunk": (64, "its C"),
}


class _Client:
    """A user: texts of words that only it has, and answers."""

    def __init__(self, seed: int, args: argparse.Namespace):
        self.name, self.args, self.rng = f"user {seed}", args, np.random.default_rng(seed)
        letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
        self.words = [self.rng.choice(letters, self.rng.integers(2, 9)).tobytes() for _ in range(500)]
        self.total = self.left = self.size = 0
        self.sent = 0.0
        self.answers: list[int] = []

    def send(self, engine: Engine) -> None:
        """The next text, unless this user has all its tokens."""
        if self.total >= self.args.tokens:
            return
        rank = (self.rng.zipf(1.3, self.args.text) - 1) % len(self.words)
        text = b" ".join(self.words[i] for i in rank)[: self.args.text]
        (engine.read if self.total else engine.join)(self.name, text)
        engine.write(self.name, self.args.answer)
        first, self.left, self.size = self.total + len(text), self.args.answer, len(text) + self.args.answer
        self.answers += range(first, first + self.left)
        self.total, self.sent = first + self.left, time.perf_counter()


def measure(args: argparse.Namespace, folder: str) -> tuple[report.Table, bool]:
    """Serve all users to the end, then check some: the measurements, and whether too many bytes were others."""
    model = _model(args)
    engine = Engine(model, folder, args.rows, args.in_memory, args.piece, args.turn)
    clients = {f"user {i}": _Client(i, args) for i in range(args.users)}
    start = time.perf_counter()
    steps, turns = _serve(engine, clients, args.users * args.tokens)
    seconds = time.perf_counter() - start
    everyone = list(clients.values())
    checks = [_check(model, engine, client) for client in everyone[:: -(-args.users // args.checked)]]
    checked, wrong = (sum(counts) for counts in zip(*checks))
    total, written = sum(client.total for client in everyone), sum(len(client.answers) for client in everyone)
    rows = [
        ("tokens a second, read and written", f"{total / seconds:,.0f}"),
        ("tokens read, written", f"{total - written:,}, {written:,}"),
        ("a byte of an answer, ms, p50 and p99", _percentiles(steps)),
        ("from a text to the end of its answer, queue included, ms, p50 and p99", _percentiles(turns)),
        ("tables of all rows, MiB", f"{engine.tables.nbytes / MIB:.2f}"),
        ("the same for each user, MiB", f"{engine.tables.nbytes / MIB / args.users:.3f}"),
        ("packed in memory, MiB a user", _mean(engine.store.bytes_in_memory())),
        ("packed on disk, MiB a user", _mean(engine.store.bytes_on_disk())),
        ("bytes checked alone, of them others", f"{checked:,}, {wrong}"),
    ]
    return report.Table(f"{args.users} users", ("", "measured"), rows), wrong > ALLOWED[args.dtype] * checked


def _model(args: argparse.Namespace) -> Model:
    if args.language_model is not None:
        model, _ = load(args.language_model, torch.device(args.device), **MEMORIES)
        return Served(model.to(getattr(torch, args.dtype)))
    torch.manual_seed(0)
    size = {"key_dim": args.width, "value_dim": args.width, "num_subkeys": args.num_subkeys}
    config = FwPKMConfig(**size, chunk_size=args.chunk)
    return ByteModel(config, args.width).to(args.device, getattr(torch, args.dtype))


def _serve(engine: Engine, clients: dict[str, _Client], total: int) -> tuple[list[float], list[float]]:
    """Seconds of each call in which somebody was answered, and from each text to the last byte of its answer."""
    steps, turns = [], []
    with Progress(transient=True) as progress:
        bar = progress.add_task("serving", total=total)
        for client in clients.values():
            client.send(engine)
        while engine.busy:
            before = time.perf_counter()
            done = engine.step()
            now = time.perf_counter()
            if done.failed:
                raise RuntimeError(f"users failed: {done.failed}")
            if done.written:
                steps.append(now - before)
            for user in done.written:
                client = clients[user]
                client.left -= 1
                if not client.left:
                    turns.append(now - client.sent)
                    progress.advance(bar, client.size)
                    client.send(engine)
    return steps, turns


def _check(model: Model, engine: Engine, client: _Client) -> tuple[int, int]:
    """How many bytes a user was answered with, and how many are not the likeliest where its text is read alone."""
    text = engine.text(client.name)
    logits = model.logits_of(text)[torch.tensor(client.answers) - 1]
    written = torch.tensor([text[i] for i in client.answers], device=logits.device)
    behind = logits.amax(-1) - logits.gather(-1, written[:, None])[:, 0]
    return len(written), int((behind > TOLERANCE).sum())


def _percentiles(seconds: list[float]) -> str:
    return ", ".join(f"{1000 * x:,.0f}" for x in np.percentile(seconds, (50, 99)))


def _mean(sizes: dict[Any, int]) -> str:
    return f"{np.mean([*sizes.values()]) / MIB:.2f} ({len(sizes)} users)" if sizes else "- (0 users)"


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a user was written what it would not have been written alone."""
    parser = report.parser("serving", __doc__, "markdown", **OPTIONS, **UNTRAINED)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    parser.add_argument("--language-model", type=Path, help="a folder of examples/language_model's train or run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        table, mixed = measure(args, folder)
    trained = args.language_model is not None
    names = OPTIONS if trained else OPTIONS | UNTRAINED
    legend = ", ".join(f"{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    model = f"the language model of {args.language_model}" if trained else "an untrained model"
    report.show([model, legend], [table], markdown=args.markdown)
    return int(mixed)


if __name__ == "__main__":
    raise SystemExit(main())
