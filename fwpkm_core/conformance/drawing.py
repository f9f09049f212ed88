"""Drawing from Hypothesis strategies outside a test: the same seed gives the same cases."""

from collections.abc import Callable
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from fwpkm.conformance.shapes import Passage, Shape, passages, shapes

T = TypeVar("T")


def draw(strategy: st.SearchStrategy[T], seed: int | str) -> T:
    """One value of a strategy that follows from the seed, and from the version of Hypothesis."""
    drawn: list[T] = []

    # The first example is always the simplest, and the second the first that is random.
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        drawn.append(value)

    collect()
    return drawn[-1]


def drawer(seed: int, dtype: str, unit: int = 1) -> Callable[[int], Passage]:
    """From a case's number to the case, whatever the number of cases: it is of shape number modulo ten.

    Args:
        seed: what the cases follow from.
        dtype: of their arrays.
        unit: of Dk and Dv, as in :func:`shapes`.
    """
    drawn: tuple[Shape, ...] = draw(shapes(unit), seed)

    def passage(number: int) -> Passage:
        return draw(passages(number, drawn[number % len(drawn)], dtype), f"{seed}/{number}")

    return passage
