"""What is not implemented is refused, by the functions and the layer (SPEC.md §8)."""

import keras
import pytest
import refusing

import fwpkm
from fwpkm.backends.keras import FwPKM


@pytest.mark.parametrize("field", refusing.CHOICES)
def test_a_choice_that_is_not_implemented_is_refused(monkeypatch, field):
    refusing.check_unknown_values(fwpkm.get_backend("keras"), monkeypatch, field)


def test_a_field_that_is_not_served_must_be_at_its_default():
    refusing.check_unknown_fields(fwpkm.get_backend("keras"))


def test_a_distribution_is_refused_where_keras_deals_nothing_out():
    """On jax a layer is built under it."""
    layer = FwPKM(key_dim=4, value_dim=4, num_subkeys=4, top_k=2, chunk_size=2)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    try:
        if keras.backend.backend() == "jax":
            layer.build((None, None, 4))
            return
        with pytest.raises(ValueError, match=r"keras\.distribution must be left out on tensorflow and torch") as caught:
            layer.build((None, None, 4))
        assert str(caught.value).endswith(f"on {keras.backend.backend()}")
    finally:
        keras.distribution.set_distribution(None)
