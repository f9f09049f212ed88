"""Files and packed states of uses that nobody can have counted, or of another dtype, are refused; ``doctor`` tells."""

import dataclasses
import re

import numpy as np
import pytest
from layer_files import CFG, half_read_state
from test_damaged_files import edit
from test_doctor import doctor
from test_packed_files import MEMORY

import fwpkm
from fwpkm import reference

USED = dataclasses.replace(CFG, usage_weight=1.0)
RIGHT = "finite numbers of at least 0"


def state_with(number):
    """A state of which one slot was used so often."""
    state = half_read_state(cfg=USED)
    uses = state.uses.copy()
    uses[1, 2] = number
    return state._replace(uses=uses)


@pytest.mark.parametrize("number", [np.nan, np.inf, -1.0])
def test_uses_that_are_no_counts(number, tmp_path, capsys):
    """They are not written; a file that holds them is not read, and told by ``doctor``."""
    bad, path = state_with(number), tmp_path / "file"
    wanted = rf"bad {{}}uses\. Expected: {RIGHT}\. Received: 1 of 18 are not, the first {number}\."
    with pytest.raises(ValueError, match=wanted.format("")):
        fwpkm.save_state(path, bad, USED)
    with pytest.raises(ValueError, match=wanted.format("")):
        fwpkm.save_states(path, {"a": bad}, USED)
    with pytest.raises(ValueError, match=rf"state\.uses must hold {RIGHT}\. Received: 1 of 18 are not, .*{number}"):
        reference.pack(USED, bad, MEMORY)
    packed = dataclasses.replace(reference.pack(USED, state_with(3), MEMORY), uses=bad.uses)
    with pytest.raises(ValueError, match=rf"packed\['a'\]\.uses must hold {RIGHT}"):
        fwpkm.save_packed(path, {"a": packed})
    with pytest.raises(ValueError, match=rf"packed\.uses must hold {RIGHT}"):
        reference.unpack(USED, packed, MEMORY)
    assert list(tmp_path.iterdir()) == []

    told = "expected numbers of at least 0, received -1.0" if number < 0 else "1 of 18 numbers are not finite"
    for write, read, name in (
        (lambda x: fwpkm.save_state(path, x, USED), lambda: fwpkm.load_state(path, USED, "numpy"), ""),
        (lambda x: fwpkm.save_states(path, {"a": x}, USED), lambda: fwpkm.load_states(path, USED, "numpy"), "a."),
        (
            lambda x: fwpkm.save_packed(path, {"a": reference.pack(USED, x, MEMORY)}),
            lambda: fwpkm.load_packed(path),
            "a.",
        ),
    ):
        write(state_with(3))
        read()
        assert doctor(capsys, path)["problems"] == []
        edit(path, lambda tensors, _, key=f"{name}uses": tensors.update({key: bad.uses}))
        with pytest.raises(ValueError, match=wanted.format(re.escape(name))):
            read()
        assert doctor(capsys, path)["problems"] == [f"{name}uses: {told}"]


@pytest.mark.parametrize("field", ["uses", "pending_query", "pending_gate", "memory.values"])
def test_what_is_floating_has_the_dtype_of_the_keys(field, tmp_path):
    """``apply`` refuses other states: such a one is neither written nor read."""
    state, path = half_read_state(cfg=USED), tmp_path / "file"
    wide = state.arrays()[field].astype("float64")
    given = {"memory": state.memory._replace(values=wide)} if field == "memory.values" else {field: wide}
    words = rf"wrong shape or dtype of {field}\. Expected: {field} .* float32\. Received: {field} .* float64\."
    with pytest.raises(ValueError, match=f"{words} Pass the state as apply or flush returned it"):
        fwpkm.save_state(path, state._replace(**given), USED)
    fwpkm.save_state(path, state, USED)
    edit(path, lambda tensors, _: tensors.update({field: wide}))
    with pytest.raises(ValueError, match=words):
        fwpkm.load_state(path, USED, "numpy")
    fwpkm.save_state(path, half_read_state(cfg=USED, dtype="float64"), USED)
    assert fwpkm.load_state(path, USED, "numpy").uses.dtype == np.float64
