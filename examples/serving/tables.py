"""The tables that users read in: a row of each memory's state for everyone who is being served."""

import itertools

import torch

from examples.serving.model import Model, Rows
from examples.serving.store import Packed
from fwpkm.backends.torch import nbytes, pack, put, reset, select, unpack


class Tables:
    """Where the rows of a model stand. A row that nobody holds is the initial one.

    Args:
        model: what reads and writes; its weights must not change.
        rows: how many.
    """

    def __init__(self, model: Model, rows: int):
        """Make the states."""
        self.model, self.config = model, model.config
        self._initial = {str(i): memory.memory() for i, memory in enumerate(model.layers)}
        self._device = self._initial["0"].values.device
        self._rows = model.start(rows)

    def read(self, pieces: list[bytes]) -> list[int]:
        """Read a piece in each row, which may be empty; the likeliest next byte of each that has one.

        Where it raises, some tables may be ahead of others: no row can be relied on.
        """
        ends = torch.tensor([0, *itertools.accumulate(map(len, pieces))], dtype=torch.int32)
        tokens = torch.tensor([list(b"".join(pieces))], device=self._device)
        logits, self._rows = self.model.read(tokens, self._rows, ends)
        return logits.argmax(-1).tolist()

    def pack(self, row: int) -> Packed:
        """What a row holds, which stays as it is."""
        memories = {
            name: pack(self.config, select(self.config, state, [row]), self._initial[name])
            for name, state in zip(self._initial, self._rows.memories)
        }
        return Packed(memories, {name: x[row].cpu().numpy().copy() for name, x in self._rows.beside.items()})

    def put(self, row: int, packed: Packed) -> int:
        """Unpack into a row that nobody holds: how many bytes had been read. The row is still free where it raises.

        Raises:
            ValueError: these are not one row of this model.
        """
        positions = [one.position.tolist() for one in packed.memories.values()]
        names = packed.memories.keys(), {name: x.shape for name, x in packed.beside.items()}
        wanted = self._initial.keys(), {name: tuple(x.shape[1:]) for name, x in self._rows.beside.items()}
        if names != wanted or any(len(x) != 1 or x != positions[0] for x in positions):
            raise ValueError(
                f"packed states must be one row of each of {list(self._initial)}, all at one position, beside "
                f"{wanted[1] or 'nothing'}. Received: {list(packed.memories)} at {positions} beside {names[1]}"
            )
        unpacked = [unpack(self.config, one, self._initial[name]) for name, one in packed.memories.items()]
        try:
            for i, state in enumerate(unpacked):
                self._rows.memories[i] = put(self.config, self._rows.memories[i], [row], state, inplace=True)
            for name, x in packed.beside.items():
                self._rows.beside[name][row] = torch.from_numpy(x)
        except BaseException:
            self.clear(row)
            raise
        return positions[0][0]

    def clear(self, row: int) -> None:
        """Make a row what it was at the start: nothing of its user is left in it."""
        for i, initial in enumerate(self._initial.values()):
            self._rows.memories[i] = reset(self.config, self._rows.memories[i], initial, [row], inplace=True)
        for x in self._rows.beside.values():
            x[row] = 0

    @property
    def rows(self) -> Rows:
        """Where they stand."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Of all rows, whoever holds them."""
        return sum(map(nbytes, self._rows.memories)) + sum(x.nbytes for x in self._rows.beside.values())
