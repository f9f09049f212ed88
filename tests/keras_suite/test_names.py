"""What is said of arguments that the Keras layer does not have, and what completion shows."""

import pytest

import fwpkm
from fwpkm.backends.keras import FwPKM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_subkey": 4}, r"takes no argument 'num_subkey'. Did you mean num_subkeys\?"),
        ({"return_states": True}, r"Did you mean return_state\?"),
        ({"hidden_size": 8}, "takes no argument 'hidden_size' in Keras: it is taken from the input"),
        ({"config": fwpkm.FwPKMConfig()}, r"takes no argument 'config' in Keras: .* \*\*dataclasses.asdict\(config\)"),
    ],
)
def test_an_unknown_argument_says_what_was_meant(fields, message):
    with pytest.raises(TypeError, match=message):
        FwPKM(**fields)


def test_completion_shows_public_names_only():
    assert dir(fwpkm.backends.keras) == fwpkm.backends.keras.__all__
    assert type(fwpkm.FwPKM("keras", num_subkeys=8)) is FwPKM
