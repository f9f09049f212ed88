"""Serve in processes that are killed, and check after each that what it acknowledged is there, and goes on as alone.

    python tests/killed_server.py FOLDER TIMES

It forks, so that a process costs no imports. Prints how many were killed, how many acknowledgments they gave, and how
many users there are.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch

from examples.serving.engine import Engine
from examples.serving.model import ByteModel, choices
from fwpkm import FwPKMConfig


def serve(model, folder, seed, pipe):
    """Requests at random without an end; what was acknowledged goes down the pipe, a line each: a text, or None."""
    rng, engine = random.Random(seed), Engine(model, folder, rows=2, in_memory=1, piece=9)
    texts = {user: engine.text(user) for user in engine.users}  # as the users know them

    def acknowledge(user, text):
        texts[user] = text
        os.write(pipe, json.dumps([user, text.hex()]).encode() + b"\n")

    for number in range(10**6):
        user = rng.choice(list(texts)) if texts else None
        what = "delete" if len(texts) > 8 else rng.choice(("join", "read", "write", "fork", "leave"))
        if user is None or what == "join":
            new, text = f"{seed} {number}", rng.randbytes(rng.randint(1, 40))
            engine.join(new, text)
            acknowledge(new, text)
        elif what == "fork":
            engine.fork(user, f"{seed} {number}")
            acknowledge(f"{seed} {number}", texts[user])
        elif what == "read":
            more = rng.randbytes(20)
            engine.read(user, more)
            acknowledge(user, texts[user] + more)
        elif what == "write":
            engine.write(user, 3)
        elif what == "leave":
            engine.leave(user)
        else:
            acknowledge(user, b"")  # from here on the user may be there, or not
            engine.delete(user)
            del texts[user]
            os.write(pipe, json.dumps([user, None]).encode() + b"\n")
        for _ in range(rng.choice((0, 0, 1, 2))):
            for name, byte in engine.step().written.items():
                acknowledge(name, texts[name] + byte)


def check(model, folder, acknowledged):
    """Every text begins with what was acknowledged; who was deleted is gone; each goes on as alone; no litter."""
    engine = Engine(model, folder, rows=3, in_memory=2)
    for user, text in acknowledged.items():
        if text is None:
            assert user not in engine.users, f"{user} was deleted, and is there"
        elif text or user in engine.users:
            found = engine.text(user)
            assert found.startswith(text), f"of {user} {len(text)} bytes were acknowledged, {len(found)} are there"
    texts = {user: engine.text(user) for user in engine.users}
    for user in texts:
        engine.write(user, 4)
    assert engine.run() == {}
    for user, before in texts.items():
        text = engine.text(user)
        assert text[-4:] == choices(model, text)[-5:-1], f"{user} does not go on as alone"
        assert len(text) == len(before) + 4
        acknowledged[user] = text
        engine.leave(user)
    files = {path.name for path in Path(folder).iterdir()}
    assert files == {"model"} | {f"{user.encode().hex()}.{kind}" for user in texts for kind in ("text", "state")}


def main():
    """Fork, kill, check."""
    folder, times = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteModel(
        FwPKMConfig(key_dim=8, value_dim=8, num_subkeys=8, top_k=4, chunk_size=4), width=16, layers=1
    ).double()
    acknowledged, killed, lines = {}, 0, 0
    for seed in range(times):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                serve(model, folder, seed, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            rng = random.Random(seed)
            first = [pipe.readline() for _ in range(rng.randint(1, 30))]
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            for line in (*first, *pipe):
                user, text = json.loads(line)
                acknowledged[user] = None if text is None else bytes.fromhex(text)
                lines += 1
        check(model, folder, acknowledged)
    print(killed, lines, sum(text is not None for text in acknowledged.values()))


if __name__ == "__main__":
    main()
