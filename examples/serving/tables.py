"""The tables that users read in: a row of each memory's state for everyone who is being served."""

import itertools

import torch

from examples.serving.model import ByteModel
from examples.serving.store import Packed
from fwpkm.backends.torch import nbytes, pack, put, reset, select, unpack


class Tables:
    """States of all memories of a model, ``rows`` rows each. A row that nobody holds is the initial one.

    Args:
        model: what reads and writes; its weights must not change.
        rows: how many.
    """

    def __init__(self, model: ByteModel, rows: int):
        """Make the states."""
        self.model, self.config = model, model.config
        self._device = model.embedding.weight.device
        self._initial = {str(i): memory.memory() for i, memory in enumerate(model.memories)}
        self._states = dict(zip(self._initial, model.start(rows)))

    def read(self, pieces: list[bytes]) -> list[int]:
        """Read a piece in each row, which may be empty; the likeliest next byte of each that has one.

        Where it raises, some tables may be ahead of others: no row can be relied on.
        """
        ends = torch.tensor([0, *itertools.accumulate(map(len, pieces))], dtype=torch.int32)
        tokens = torch.tensor([list(b"".join(pieces))], device=self._device)
        logits, states = self.model(tokens, list(self._states.values()), ends)
        self._states = dict(zip(self._states, states))
        return logits.argmax(-1).tolist()

    def pack(self, row: int) -> Packed:
        """What a row holds, which stays as it is."""
        return {
            name: pack(self.config, select(self.config, state, [row]), self._initial[name])
            for name, state in self._states.items()
        }

    def put(self, row: int, packed: Packed) -> int:
        """Unpack into a row that nobody holds: how many bytes had been read. The row is still free where it raises.

        Raises:
            ValueError: these are not one row of this model's memories.
        """
        positions = [one.position.tolist() for one in packed.values()]
        if packed.keys() != self._initial.keys() or any(len(x) != 1 or x != positions[0] for x in positions):
            raise ValueError(
                f"packed states must be one row of each of {list(self._initial)}, all at one position. Received: "
                f"{list(packed)} at {positions}"
            )
        unpacked = {name: unpack(self.config, one, self._initial[name]) for name, one in packed.items()}
        try:
            for name, state in unpacked.items():
                self._states[name] = put(self.config, self._states[name], [row], state, inplace=True)
        except BaseException:
            self.clear(row)
            raise
        return positions[0][0]

    def clear(self, row: int) -> None:
        """Make a row what it was at the start: nothing of its user is left in it."""
        for name, initial in self._initial.items():
            self._states[name] = reset(self.config, self._states[name], initial, [row], inplace=True)

    @property
    def nbytes(self) -> int:
        """Of all rows, whoever holds them."""
        return sum(map(nbytes, self._states.values()))
