"""All that the benchmarks use of the package's inside, in one place. What a benchmark does not need is not imported."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

SCORING_KERNELS = ("select_kernel", "rank_kernel", "combine_kernel")
"""The Triton kernels that score."""


def torch_select(cfg: Any, keys: Any, query: Any) -> Any:
    """The torch backend's scoring of one chunk, ``query [B, C, H*Dk]``: sub-scores and their top-k."""
    from fwpkm.backends.torch import addressing
    from fwpkm.backends.torch.tokens import halves

    return addressing.select(cfg, halves(cfg, query, len(keys)), keys)


def jax_select(cfg: Any, keys: Any, query: Any) -> Any:
    """The JAX backend's scoring of one chunk."""
    from fwpkm.backends.jax import addressing
    from fwpkm.backends.jax.tokens import halves

    return addressing.choose(cfg, halves(cfg, query, len(keys)), keys)


def kernels_backend() -> Any:
    """The torch backend held to its kernels, with the functions that conformance calls."""
    from fwpkm.conformance import triton

    return triton


def conformance() -> Any:
    """What draws cases and judges results for ``fwpkm conform``, by name."""
    from fwpkm.conformance import drawing, gradients, judging, results, rounding, running, shapes, strategies

    owners = {
        drawing: ("draw",),
        gradients: ("INPUTS", "gradients"),
        judging: ("bound", "errors", "reading_errors"),
        results: ("run",),
        rounding: ("expect_unmoved",),
        running: ("Reading", "read"),
        shapes: ("Shape", "passages"),
        strategies: ("Case", "Tokens"),
    }
    return types.SimpleNamespace(**{name: getattr(owner, name) for owner, names in owners.items() for name in names})


@contextlib.contextmanager
def poisoned_workspaces(poison: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block the kernels' workspaces begin with ``poison(dtype)`` in every buffer."""
    from fwpkm.kernels.room import Room

    @functools.wraps(Room.empty)
    def filled(*args: Any) -> Room:
        room = empty(*args)
        for name, place in room.layout.places.items():
            if place is not None:
                room[name].fill_(poison(place.dtype))
        return room

    empty = Room.empty
    with mock.patch.object(Room, "empty", filled):
        yield
