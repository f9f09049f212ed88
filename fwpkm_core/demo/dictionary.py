"""The baseline of the demo: a Python dictionary from the last eight tokens to the one that followed them."""

from collections.abc import Iterator

import numpy as np

from fwpkm.demo.contexts import CONTEXT


class Dictionary:
    """What followed the last tokens when they last stood in the text, for each of several lengths of context.

    Args:
        vocabulary_size: V; V stands for what is before the text, as in the memory's queries.
    """

    def __init__(self, vocabulary_size: int) -> None:
        """Start with nothing."""
        self._before = [vocabulary_size] * (CONTEXT - 1)
        self._followers: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in range(CONTEXT))

    def read(self, ids: np.ndarray, next_ids: np.ndarray) -> np.ndarray:
        """Ask for each successor, then note the true one, token by token; ``[T]`` ids, -1 where nothing is known."""
        found = []
        for context, follower in zip(self._contexts(ids), next_ids.tolist()):
            found.append(self._followers[-1].get(context, -1))
            for length, followers in enumerate(self._followers, 1):
                followers[context[-length:]] = follower
        return np.array(found)

    def ask(self, ids: np.ndarray, *, fall_back: bool = False) -> np.ndarray:
        """Ask for the successor of each token and note nothing; ``[T]`` ids, -1 where nothing is known.

        With ``fall_back`` the last 7, 6 ... 1 tokens are looked up where the last eight are not known.
        """
        lengths = range(CONTEXT, 0 if fall_back else CONTEXT - 1, -1)
        return np.array(
            [
                next((self._followers[n - 1][c[-n:]] for n in lengths if c[-n:] in self._followers[n - 1]), -1)
                for c in self._contexts(ids)
            ]
        )

    def _contexts(self, ids: np.ndarray) -> Iterator[tuple[int, ...]]:
        padded = self._before + ids.tolist()
        return (tuple(padded[t : t + CONTEXT]) for t in range(len(ids)))


def replace_some(ids: np.ndarray, vocabulary_size: int, seed: int) -> np.ndarray:
    """``ids`` with one token in twenty, at least one, replaced by another of the vocabulary."""
    rng = np.random.default_rng(seed)
    where = rng.permutation(len(ids))[: max(1, len(ids) // 20)]
    replaced = ids.copy()
    replaced[where] = (ids[where] + rng.integers(1, vocabulary_size, len(where))) % vocabulary_size
    return replaced
