"""Cases for tests that choose a configuration themselves, or one row of a case."""

import dataclasses

import numpy as np

from fwpkm import Memory
from fwpkm.conformance.strategies import Case, floating, make_case, unmasked
from fwpkm.tokens import Tokens


def drawn(cfg, batch, length, seed=0, dtype="float64", left_out=()):
    """A case of drawn tables and tokens, without any twist."""
    return make_case(cfg, seed, dtype, frozenset(), batch, length, left_out, None)


def row_alone(case: Case, row: int) -> Case:
    """The tokens of one row that are there, with all its tables; in sequence scope they have that row's clock."""
    own = slice(row, row + 1) if case.cfg.memory_scope == "sequence" else slice(None)
    at = np.flatnonzero(unmasked(case.tokens)[row])
    tokens = case.tokens._replace(mask=None).map(lambda x: x[row : row + 1, at])
    memory = Memory(*(table[own] for table in case.memory))
    return dataclasses.replace(case, batch=1, length=len(at), memory=memory, tokens=tokens)


def masked_tick(case: Case, row: int, token: int) -> Case:
    """What others see of a dead token (§5): zeros with mask False that keep their tick.

    In batch scope a masked token is that. In sequence scope ``case`` must be one row without masked tokens, which has
    the clock of batch scope.
    """
    mask = unmasked(case.tokens).copy()
    assert case.cfg.memory_scope == "batch" or (case.batch == 1 and mask.all())
    query, value, gate = (None if x is None else x.copy() for x in floating(case.tokens).values())
    for array in (query, value, gate, mask):
        if array is not None:
            array[row, token] = 0
    cfg = dataclasses.replace(case.cfg, memory_scope="batch")
    return dataclasses.replace(case, cfg=cfg, tokens=Tokens(query, value, gate, mask))
