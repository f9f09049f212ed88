"""All that the benchmarks use of the package's inside, in one place. What a benchmark does not need is not imported."""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

SCORING_KERNELS = ("propose_kernel", "rank_kernel", "select_slots_kernel")
"""The Triton kernels that score."""


def select(backend: str, cfg: Any, keys: Any, query: Any) -> Any:
    """A backend's scoring of one chunk, ``query [B, C, H*Dk]``: sub-scores and their top-k; "torch" or "jax"."""
    folder = f"fwpkm.backends.{backend}"
    addressing, tokens = (importlib.import_module(f"{folder}.{name}") for name in ("addressing", "tokens"))
    scoring = addressing.select_subkeys if backend == "torch" else addressing.select_slots
    return scoring(cfg, tokens.halves(cfg, query, len(keys)), keys)


def kernels_backend() -> Any:
    """The torch backend held to its kernels, with the functions that conformance calls."""
    from fwpkm.conformance import contestants

    return contestants.load("triton", "float32")


def conformance() -> Any:
    """What draws cases and judges results for ``fwpkm conform``, by name."""
    from fwpkm.conformance import drawing, judging, results, running, strategies

    owners = {
        drawing: ("Passage", "Shape", "draw", "passages"),
        judging: ("bound", "errors", "expect_unmoved", "reading_errors"),
        results: ("run",),
        running: ("INPUTS", "Reading", "as_numpy", "gradients", "joined_traces", "native", "start"),
        strategies: ("Case",),
    }
    return types.SimpleNamespace(**{name: getattr(owner, name) for owner, names in owners.items() for name in names})


@contextlib.contextmanager
def poisoned_workspaces(poison: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block the kernels' workspaces begin with ``poison(dtype)`` in every buffer."""
    from fwpkm.kernels.runtime.workspace import Workspace

    @functools.wraps(Workspace.empty)
    def filled(*args: Any) -> Workspace:
        workspace = empty(*args)
        for name, spec in workspace.layout.tensors.items():
            if spec is not None:
                workspace[name].fill_(poison(spec.dtype))
        return workspace

    empty = Workspace.empty
    with mock.patch.object(Workspace, "empty", filled):
        yield
