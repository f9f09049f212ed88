"""What is not implemented is refused, in every backend and by the kernels: none computes something else."""

import pytest
import refusing

import fwpkm


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
