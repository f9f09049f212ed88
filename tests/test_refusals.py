"""What is not implemented is refused, in every backend and by the kernels: none computes something else."""

import numpy as np
import pytest
import refusing
import test_errors

import fwpkm
from fwpkm import reference, validation
from fwpkm.tokens import Tokens


@pytest.mark.parametrize("field", refusing.CHOICES)
def test_a_choice_that_is_not_implemented_is_refused(be, monkeypatch, field):
    refusing.check_unknown_values(be, monkeypatch, field)


def test_a_field_that_is_not_served_must_be_at_its_default(be):
    refusing.check_unknown_fields(be)


@pytest.mark.parametrize("field", refusing.CHOICES)
def test_the_kernels_refuse_a_choice_that_they_do_not_know(monkeypatch, field):
    refusing.check_unknown_values(fwpkm.get_backend("torch"), monkeypatch, field, implementation="triton")


def test_the_kernels_refuse_a_field_that_they_do_not_serve():
    be = fwpkm.get_backend("torch")
    cfg = refusing.WiderConfig(**refusing.BASE, forget=0.5)
    calls = refusing.calls(be, cfg, implementation="triton")
    for name in ("apply", "flush", "lookup", "chunk_update"):
        with pytest.raises(ValueError, match=r"forget.*0\.5"):
            calls[name]()


@pytest.mark.parametrize("pending", [False, True], ids=["in the call", "in the state"])
def test_a_token_field_that_is_not_served_must_be_left_out(pending):
    """An implementation that has no gate must not read past one, of a call or of a state that another made."""
    gateless = reference.SELF._replace(fields=reference.SELF.fields - {"gate"})
    cfg = fwpkm.FwPKMConfig(**refusing.BASE)
    query, value = np.ones((2, 1, 3, 16), np.float32)
    gate = np.full((1, 3), 0.5, np.float32)
    state = reference.init_state(cfg, reference.init_memory(cfg), 1)
    if pending:
        state = reference.apply(cfg, state, query, value, gate)[1]
    validation.check_apply(cfg, state, Tokens(query, value, gate), None, True, reference.SELF)
    tokens = Tokens(query, value, None if pending else gate)
    with pytest.raises(ValueError, match=r"gate must be left out: the NumPy reference does not serve it"):
        validation.check_apply(cfg, state, tokens, None, True, gateless)


@pytest.mark.eager
@pytest.mark.parametrize("function", ["apply", "flush", "reset", "put"])
def test_in_place_is_true_or_false(be, function):
    for flag in test_errors.NO_FLAGS:
        text = test_errors.message(be, function, test_errors.arguments(function) | {"inplace": flag})
        assert text == f"inplace must be True or False. Received: {flag!r}"
