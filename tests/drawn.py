"""Cases for tests that choose a configuration themselves."""

from fwpkm.conformance.strategies import make_case


def drawn(cfg, batch, length, seed=0, dtype="float64", gated=True, masked=True):
    """A case of drawn tables and tokens, without any twist."""
    return make_case(cfg, seed, dtype, frozenset(), batch, length, gated, masked, None)
