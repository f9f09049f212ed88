"""What is not implemented is refused, by the functions and the layer (SPEC.md §8)."""

import pytest
import refusing

import fwpkm


@pytest.mark.parametrize("field", refusing.CHOICES)
def test_a_choice_that_is_not_implemented_is_refused(monkeypatch, field):
    refusing.check_unknown_values(fwpkm.get_backend("keras"), monkeypatch, field)


def test_a_field_that_is_not_served_must_be_at_its_default():
    refusing.check_unknown_fields(fwpkm.get_backend("keras"))
