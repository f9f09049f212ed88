"""Many users, few tables: conversations that are each remembered, packed when they rest, and forgotten when asked.

Five users share two rows; others rest, packed in memory or on the disk. In the end each text is read again in one call
by itself, which must choose the same bytes. The model is untrained, so that what it writes is noise.

    python -m examples.serve [--folder users]

With a folder, run it twice: the second run goes on where the first stopped, or was killed.
"""

import argparse
import tempfile

import torch

from examples.serving.engine import Engine
from examples.serving.model import ByteModel, choices

USERS = {
    "Ann": b"The key to the archive hangs behind the third door.",
    "Ben": b"My sister's ship is called the Heron.",
    "Cem": b"Meet me at noon, not at one.",
    "Dora": b"Seven lamps, and one of them is out.",
    "Eve": b"I never said this.",
}


def main() -> None:
    """Serve, tell who rests where, compare with each user alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the users are kept; without it, nowhere for long")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = ByteModel().double()
    with tempfile.TemporaryDirectory() as temporary:
        engine = Engine(model, args.folder or temporary, rows=2, in_memory=1, piece=16)
        for user, text in USERS.items():
            if user in engine.users:
                engine.read(user, b" I am back. " + text)
            else:
                engine.join(user, text)
            engine.write(user, 12)
        failed = engine.run()
        if "Ann's other self" not in engine.users:
            engine.fork("Ann", "Ann's other self")
        engine.delete("Eve")
        places = {"in a row": engine.resident, "in memory": engine.store.bytes_in_memory()}
        places["on the disk"] = engine.store.bytes_on_disk()
        for place, users in places.items():
            print(f"{place}: {', '.join(users)}")
        for user in engine.users:
            print(f"{user}: {engine.text(user)!r}")
            start = len(engine.text(user)) - 12
            assert choices(model, engine.text(user))[start - 1 : -1] == engine.text(user)[start:]
    print(f"served {len(USERS)} users, {len(failed)} failed; each reads what it reads alone")


if __name__ == "__main__":
    main()
