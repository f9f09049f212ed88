"""What a backend makes of a passage, and what the reference makes of it."""

import functools
from typing import Any, NamedTuple

import numpy as np

from fwpkm import reference
from fwpkm.conformance.gradients import INPUTS, draw_cotangents, gradients
from fwpkm.conformance.running import BrokenContractError, Reading, as_numpy, joined, native, start, stream
from fwpkm.conformance.shapes import Passage
from fwpkm.conformance.strategies import Tokens
from fwpkm.containers import State
from fwpkm.registry import get_backend


class Result(NamedTuple):
    """One passage through one backend, as NumPy arrays."""

    reading: Reading
    state: State
    """In mid-sequence, where it passed through NumPy."""
    gradients: dict[str, np.ndarray]
    """By the names of ``INPUTS``; empty where none were asked for, or the backend has no ``vjp``."""


def run(be: Any, passage: Passage) -> Result:
    """Read a passage; its gradients too where it asks for them and the backend has ``vjp``."""
    derived = passage.with_gradients and callable(getattr(be, "vjp", None))
    return Result(*_read(be, passage), _gradients(be, passage) if derived else {})


def expect(passage: Passage) -> Result:
    """The reference's result on the same numbers in float64, with torch's gradients."""
    wide = passage._replace(case=passage.case.widened())
    grads = _gradients(get_backend("torch"), wide) if passage.with_gradients else {}
    return Result(*_read(reference, wide), grads)


def _read(be: Any, passage: Passage) -> tuple[Reading, State]:
    """In calls of the passage's sizes, flushed where the case says and at the end, handed over in the middle."""
    case, sizes, parts = passage.case, passage.sizes, []
    state, at, call = start(be, case), 0, 0
    stops = [(passage.handed, False), (len(sizes), True)]
    if case.flush_after is not None:
        flushed = np.cumsum(sizes).tolist().index(case.flush_after) + 1
        stops = [(flushed, True), *stops]
    for stop, flush in stops:
        part = sizes[call:stop]
        tokens = case.tokens.cut(at, at + sum(part))
        reading, state = stream(be, case.cfg, state, tokens, part, flush=flush)
        parts.append(reading)
        at, call = at + sum(part), stop
        if stop == passage.handed and not flush:
            half = as_numpy(be, state)
            state = native(be, half)
    whole = functools.reduce(joined, parts)
    for name, array in (("output", whole.output), *zip(("keys", "values"), whole.memory)):
        if str(array.dtype) != case.dtype:
            raise BrokenContractError(f"{name} must have dtype {case.dtype}. Received: {array.dtype}")
    return whole, half


def _gradients(be: Any, passage: Passage) -> dict[str, np.ndarray]:
    case = passage.case
    output, keys, values = draw_cotangents(case, np.random.default_rng(case.seed))
    output = np.where(_finite(case.tokens)[..., None], output, 0)
    cotangents = [array.astype(case.dtype) for array in (output, keys, values)]
    received = gradients(be, case, cotangents, passage.gradient_sizes)
    return {name: gradient for name, gradient in zip(INPUTS, received) if gradient is not None}


def _finite(tokens: Tokens) -> np.ndarray:
    """``[B, T]``: tokens whose output is not NaN; drawn scores never overflow."""
    finite = np.isfinite(tokens.query).all(-1) & np.isfinite(tokens.value).all(-1)
    return finite if tokens.gate is None else finite & np.isfinite(tokens.gate)
