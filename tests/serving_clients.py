"""Random users of the engine of examples/serve.py."""

import random


def text_of(rng, most=30):
    return rng.randbytes(rng.randint(1, most))


class Clients:
    """Random users of an engine, and what each has given and been given: the places of bytes that were answers."""

    def __init__(self, engine, seed):
        self.engine, self.rng, self.given, self.answers = engine, random.Random(seed), {}, {}
        self.counts = dict.fromkeys(("join", "read", "write", "fork", "leave", "delete", "reread"), 0)
        self.number = 0

    def act(self):
        """One request of a user."""
        what = self.rng.choices(list(self.counts), (3, 3, 8, 2, 1.5, 1, 1.5))[0]
        if not self.given or len(self.given) > 9:
            what = "delete" if self.given else "join"
        user = self.rng.choice(list(self.given)) if self.given else ""
        getattr(self, what)(user)
        self.counts[what] += 1

    def join(self, _):
        user, self.number = f"user {self.number % 12}", self.number + 1  # so that names come again
        if user not in self.given:
            self.given[user], self.answers[user] = bytearray(text_of(self.rng)), []
            self.engine.join(user, bytes(self.given[user]))

    def read(self, user):
        more = text_of(self.rng)
        self.given[user] += more
        self.engine.read(user, more)

    def write(self, user):
        self.engine.write(user, self.rng.randint(1, 12))

    def fork(self, user):
        new, self.number = f"fork {self.number}", self.number + 1
        self.engine.fork(user, new)
        self.given[new], self.answers[new] = bytearray(self.given[user]), list(self.answers[user])

    def leave(self, user):
        self.engine.leave(user)

    def delete(self, user):
        self.engine.delete(user)
        del self.given[user], self.answers[user]

    def reread(self, user):
        self.engine.reread(user)

    def step(self):
        done = self.engine.step()
        assert done.failed == {}
        for user, byte in done.written.items():
            text = self.engine.text(user)
            assert text[-1:] == byte
            self.answers[user].append(len(text) - 1)
