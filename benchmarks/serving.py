"""``python -m benchmarks.serving``: many users on the engine of ``examples/serve.py``, a load test.

Each user sends a text, asks for an answer, and sends the next text once it has that, until it has all its tokens. All
users send their first text at once, and each its next as soon as it is answered, so that rows never rest; a wait
includes the queue for a row. The model is untrained: what it costs does not hang on what it says.

In the end some users' texts are read again, each alone, and the bytes that were written must be the likeliest there. In
float64 all must. In float32 other batches round otherwise, and now and then that chooses another slot: one in a hundred
may differ, where users whose memories were mixed would differ in most.
"""

import argparse
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report
from fwpkm import FwPKMConfig

TOLERANCE = 1e-3
"""A byte counts as the likeliest if its logit is at most so far below the likeliest one's."""
ALLOWED = {"float32": 0.01, "float64": 0.0}
"""The fraction of the checked bytes that may differ."""
MIB = 2**20


class Load(NamedTuple):
    """What was measured."""

    seconds: float
    read: int
    written: int
    steps: np.ndarray
    """seconds of each call in which somebody was answered"""
    turns: np.ndarray
    """seconds from each user's text to the last byte of the answer"""
    resident: int
    """bytes of all rows' states"""
    in_memory: list[int]
    """bytes of each user who was packed in memory in the end"""
    on_disk: list[int]
    """bytes of each file of packed states in the end"""
    checked: int
    wrong: int
    """bytes that were written, of the users who were checked, and those that would not have been written alone"""


def measure(args: argparse.Namespace, folder: str) -> Load:
    """Serve all users to the end, then check some."""
    import torch
    from rich.progress import Progress

    from examples.serving.engine import Engine
    from examples.serving.model import ByteModel

    torch.manual_seed(0)
    size = {"key_dim": args.width, "value_dim": args.width, "num_subkeys": args.num_subkeys}
    config = FwPKMConfig(**size, chunk_size=args.chunk)
    model = ByteModel(config, args.width, args.layers).to(args.device, getattr(torch, args.dtype))
    engine = Engine(model, folder, args.rows, args.in_memory, args.piece, args.turn)
    clients = [_Client(f"user {i}", i, args) for i in range(args.users)]
    by_name = {client.name: client for client in clients}
    steps, turns = [], []
    start = time.perf_counter()
    with Progress(transient=True) as progress:
        bar = progress.add_task("serving", total=args.users * args.tokens)
        for client in clients:
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
                client = by_name[user]
                client.left -= 1
                if not client.left:
                    turns.append(now - client.sent)
                    progress.advance(bar, client.size)
                    client.send(engine)
    seconds = time.perf_counter() - start
    checks = [_check(model, engine, client) for client in clients[:: -(-args.users // args.checked)]]
    written = sum(len(client.answers) for client in clients)
    sizes = list(engine.store.bytes_in_memory().values()), list(engine.store.bytes_on_disk().values())
    read = sum(client.total for client in clients) - written
    checked, wrong = (sum(counts) for counts in zip(*checks))
    return Load(seconds, read, written, np.array(steps), np.array(turns), engine.tables.nbytes, *sizes, checked, wrong)


class _Client:
    """A user: texts of words that only it has, and answers."""

    def __init__(self, name: str, seed: int, args: argparse.Namespace):
        self.name, self.args, self.rng = name, args, np.random.default_rng(seed)
        letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
        self.words = [self.rng.choice(letters, self.rng.integers(2, 9)).tobytes() for _ in range(500)]
        self.total = self.left = self.size = 0
        self.sent = 0.0
        self.answers: list[int] = []

    def send(self, engine: Any) -> None:
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


def _check(model: Any, engine: Any, client: _Client) -> tuple[int, int]:
    """How many bytes a user was answered with, and how many are not the likeliest where its text is read alone."""
    import torch

    text = engine.text(client.name)
    logits = model.logits_of(text)[torch.tensor(client.answers) - 1]
    written = torch.tensor([text[i] for i in client.answers], device=logits.device)
    behind = logits.amax(-1) - logits.gather(-1, written[:, None])[:, 0]
    return len(written), int((behind > TOLERANCE).sum())


def table(load: Load, users: int) -> report.Table:
    """The measurements, a row each."""

    def percentiles(seconds: np.ndarray) -> str:
        return ", ".join(f"{1000 * x:,.0f}" for x in np.percentile(seconds, (50, 99)))

    def mean(sizes: list[int]) -> str:
        return f"{np.mean(sizes) / MIB:.2f} ({len(sizes)} users)" if sizes else "- (0 users)"

    rows = [
        ("tokens a second, read and written", f"{(load.read + load.written) / load.seconds:,.0f}"),
        ("tokens read, written", f"{load.read:,}, {load.written:,}"),
        ("a byte of an answer, ms, p50 and p99", percentiles(load.steps)),
        ("from a text to the end of its answer, queue included, ms, p50 and p99", percentiles(load.turns)),
        ("tables of all rows, MiB", f"{load.resident / MIB:.2f}"),
        ("the same for each user, MiB", f"{load.resident / MIB / users:.3f}"),
        ("packed in memory, MiB a user", mean(load.in_memory)),
        ("packed on disk, MiB a user", mean(load.on_disk)),
        ("bytes checked alone, of them others", f"{load.checked:,}, {load.wrong}"),
    ]
    return report.Table(f"{users} users", ("", "measured"), rows)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a user was written what it would not have been written alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    options = {
        "users": (64, "how many"),
        "tokens": (8192, "of each, at least"),
        "text": (240, "bytes of a text"),
        "answer": (16, "bytes of an answer"),
        "rows": (8, "tables of each memory"),
        "in-memory": (24, "users packed in memory"),
        "piece": (64, "bytes of a text that a call reads"),
        "turn": (64, "calls until a user who is not done gives up the row"),
        "width": (64, "Dk, Dv and the model's width"),
        "num-subkeys": (64, "S"),
        "layers": (2, "memories"),
        "chunk": (64, "C"),
        "checked": (4, "users read again alone"),
    }
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=report.count, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    parser.add_argument("--folder", help="where users are kept; a new one that is removed if left out")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args = parser.parse_args(argv)
    import torch  # noqa: F401  its version stands above the table

    with tempfile.TemporaryDirectory() as temporary:
        load = measure(args, args.folder or temporary)
    legend = [", ".join(f"{name} {getattr(args, name.replace('-', '_'))}" for name in options)]
    report.show(legend, [table(load, args.users)], markdown=args.markdown)
    return int(load.wrong > ALLOWED[args.dtype] * load.checked)


if __name__ == "__main__":
    raise SystemExit(main())
