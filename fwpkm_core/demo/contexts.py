"""Token ids to queries and values. All random numbers of a demo come from here and from one NumPy seed."""

import numpy as np

SEED = 0
CONTEXT = 8  # tokens that a query sees, its own included
# The nearer token counts more, yet all eight must count, or places that share their last words read the same slots:
# on the shipped text the second pass recalls 0.99 at 0.9, 0.90 at 0.7 and 0.69 at 0.5.
RATIO = 0.9


class Contexts:
    """The fixed random codes of a vocabulary and the fixed random projection of eight of them to one query.

    Args:
        ids: ``[T]`` int64 token ids.
        vocabulary_size: V.
        key_dim: width of a query.
        value_dim: width of a code.
    """

    def __init__(self, ids: np.ndarray, vocabulary_size: int, key_dim: int, value_dim: int) -> None:
        """Draw the codes, the projection and the order of the shuffled targets."""
        rng = np.random.default_rng(SEED)
        self.ids = ids
        self.codes = _zscore(rng.standard_normal((vocabulary_size, value_dim)))
        """``[V, Dv]`` float32, each of mean 0 and standard deviation 1."""
        projection = rng.standard_normal((CONTEXT, value_dim, key_dim))
        weights = RATIO ** np.arange(CONTEXT)
        self._projection = (projection * weights[:, None, None]).reshape(-1, key_dim).astype(np.float32)
        self._permutation = rng.permutation(len(ids))
        self._lagged = np.append(np.full(CONTEXT - 1, vocabulary_size), ids)  # before the text stands a code of zeros
        self._codes_and_zero = np.append(self.codes, np.zeros_like(self.codes[:1]), axis=0)

    def queries(self, start: int, stop: int) -> np.ndarray:
        """``[n, Dk]`` float32 of unit norm: the contexts of tokens start to stop."""
        last = CONTEXT - 1
        lags = [self._codes_and_zero[self._lagged[start + last - lag : stop + last - lag]] for lag in range(CONTEXT)]
        projected = np.concatenate(lags, axis=1) @ self._projection
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    def values(self, start: int, stop: int, shuffled: bool = False) -> np.ndarray:
        """``[n, Dv]`` float32: the codes of tokens start to stop; shuffled: of tokens drawn from the whole text.

        The shuffled order is one permutation of the text, the same in every pass.
        """
        ids = self.ids[self._permutation[start:stop]] if shuffled else self.ids[start:stop]
        return self.codes[ids]

    def nearest(self, output: np.ndarray) -> np.ndarray:
        """``[n]`` ids of the codes nearest to what was read [n, Dv], in Euclidean distance."""
        half_squared_norm = 0.5 * np.square(self.codes).sum(1)
        return np.argmax(output @ self.codes.T - half_squared_norm, axis=1)


def _zscore(x: np.ndarray) -> np.ndarray:
    """(x - mean) / (std + 1e-6) of each row, std unbiased (SPEC.md §7)."""
    centred = x - x.mean(1, keepdims=True)
    return (centred / (x.std(1, ddof=1, keepdims=True) + 1e-6)).astype(np.float32)
