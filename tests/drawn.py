"""Cases for tests that choose a configuration themselves."""

from fwpkm.conformance.strategies import make_case


def drawn(cfg, batch, length, seed=0, dtype="float64", left_out=()):
    """A case of drawn tables and tokens, without any twist."""
    return make_case(cfg, seed, dtype, frozenset(), batch, length, left_out, None)
