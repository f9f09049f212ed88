"""Continuous batching of many users over few tables, each remembered, and forgotten when asked."""

import dataclasses
import os

from examples.serving.model import Model
from examples.serving.requests import REFUSALS, Step, check_new, check_number, check_text, check_user
from examples.serving.store import Store
from examples.serving.tables import Tables


@dataclasses.dataclass
class Seat:
    """Who holds a row."""

    user: str
    unread: bytearray
    """Text that the row's memory has not read, at least its last byte: that is read when the next one is asked for."""
    since: int
    """When it took the row, in calls."""
    used: int
    """When it last read."""


class Engine:
    """Continuous batching over a bounded number of tables. Bytes are chosen greedily.

    ``join``, ``read``, ``write``, ``fork``, ``leave``, ``delete`` and ``reread`` raise ValueError for a user who is
    unknown, or exists already, and for arguments that make no sense; OSError where the disk fails. Nothing has changed
    then, except that a ``leave``, ``delete`` or ``reread`` that the disk stopped has given up the row: call it again.
    Text is on record once the call that brought it, or the step that wrote it, returns.

    Args:
        model: what reads and writes; its weights must not change.
        folder: where users are kept, of this process alone; users of an earlier one are there again.
        rows: how many users hold a table at a time.
        in_memory: how many more are kept packed in memory, and not on disk.
        piece: the most bytes of a text that one call reads, so that those who are answered never wait for long.
        turn: after how many calls a user who is not done gives up the row to one who waits.
    """

    def __init__(
        self,
        model: Model,
        folder: str | os.PathLike[str],
        rows: int = 8,
        in_memory: int = 64,
        piece: int = 64,
        turn: int = 64,
    ):
        """Open the folder."""
        for name, number in (("rows", rows), ("piece", piece), ("turn", turn)):
            check_number(name, number, 1)
        check_number("in_memory", in_memory, 0)
        self.piece, self.turn = piece, turn
        self.store = Store(folder, in_memory, model.digest())
        self.tables = Tables(model, rows)
        self._seats: list[Seat | None] = [None] * rows
        self._lengths = self.store.lengths()  # of each user's text
        self._wanted: dict[str, int] = {}  # bytes still to write
        self._queue: dict[str, None] = {}  # who waits for a row, in order
        self._calls = 0

    # --- What users ask for ---

    def join(self, user: str, text: bytes) -> None:
        """A new user, whose text begins so."""
        check_new(user, self._lengths)
        check_text(text)
        self.store.create(user, text)
        self._lengths[user] = len(text)
        self._queue[user] = None

    def read(self, user: str, text: bytes) -> None:
        """More text of a user."""
        check_user(user, self._lengths)
        check_text(text)
        self._append(user, text)
        if self._row_of(user) is None:
            self._queue[user] = None

    def write(self, user: str, number: int) -> None:
        """Ask for so many bytes in answer to all text so far."""
        check_user(user, self._lengths)
        check_number("number", number, 1)
        self._wanted[user] = self._wanted.get(user, 0) + number
        if self._row_of(user) is None:
            self._queue[user] = None

    def fork(self, user: str, new: str) -> None:
        """A new user with all that ``user`` has read and written until now, and nothing in common from here on."""
        check_user(user, self._lengths)
        check_new(new, self._lengths)
        row = self._row_of(user)
        packed = self.store.load(user) if row is None else self.tables.pack(row)
        self.store.create(new, self.store.text(user))
        self._lengths[new] = self._lengths[user]
        if packed is not None:
            self.store.keep(new, packed)
            self.store.spill()  # where that fails, the next step tries again, and tells

    def leave(self, user: str) -> None:
        """Bring a user to the disk now, who gives up row, place in memory and what was still to write."""
        check_user(user, self._lengths)
        row = self._row_of(user)
        if row is not None:
            self._vacate(row)
        self._forget_request(user)
        self.store.save(user)

    def delete(self, user: str) -> None:
        """Forget a user everywhere: the row's tables are the initial ones again, and no file has a byte of them."""
        check_user(user, self._lengths)
        row = self._row_of(user)
        if row is not None:
            self._clear(row)
        self._forget_request(user)
        self.store.delete(user)
        del self._lengths[user]

    def reread(self, user: str) -> None:
        """Forget a user's packed states, as where their file is damaged, and make them again from the text."""
        check_user(user, self._lengths)
        row = self._row_of(user)
        if row is not None:
            self._clear(row)
        self.store.drop_states(user)
        self._queue[user] = None

    # --- Serving ---

    def step(self) -> Step:
        """One call of the model: rows that have unread text read a piece of it, rows that answer one byte."""
        failed = self._admit()
        pieces = [self._next_piece(seat) for seat in self._seats]
        if not any(pieces):
            return Step({}, failed)
        try:
            chosen = self.tables.read(pieces)
        except BaseException:  # all rows go back to what was packed
            for held in [seat for seat in self._seats if seat]:
                self._return(held)
            raise
        self._calls += 1
        written = {}
        for seat, piece, byte in zip(list(self._seats), pieces, chosen):
            if seat and piece:
                seat.used = self._calls
                del seat.unread[: len(piece)]
                if not seat.unread:  # it has read everything, so this byte was asked for
                    try:
                        self._answer(seat, bytes([byte]))
                    except REFUSALS as error:
                        failed[seat.user] = error
                    else:
                        written[seat.user] = bytes([byte])
        return Step(written, failed)

    def run(self) -> dict[str, Exception]:
        """Steps until everything is read and written; who failed on the way, and why last."""
        failed: dict[str, Exception] = {}
        while self.busy:
            failed |= self.step().failed
        return failed

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._queue) or any(map(self._next_piece, self._seats))

    # --- What is there ---

    @property
    def users(self) -> list[str]:
        """All, in the order of joining; those of an earlier process come first."""
        return list(self._lengths)

    @property
    def resident(self) -> list[str]:
        """Those who hold a row."""
        return [seat.user for seat in self._seats if seat]

    def text(self, user: str) -> bytes:
        """All that a user has been told and answered."""
        check_user(user, self._lengths)
        return self.store.text(user)

    # --- Rows ---

    def _next_piece(self, seat: Seat | None) -> bytes:
        """What a row reads next. The last byte waits until the one after it is asked for."""
        if seat is None:
            return b""
        ready = len(seat.unread) - (not self._wanted.get(seat.user))
        return bytes(seat.unread[: min(ready, self.piece)])

    def _admit(self) -> dict[str, Exception]:
        """Give rows to those who wait, as long as there are free or idle ones; who cannot have one, and why."""
        failed: dict[str, Exception] = {}
        for user in list(self._queue):
            row = self._free_row()
            if row is None:
                break
            try:
                self._seat(user, row)
            except REFUSALS as error:
                failed[user] = error
                self._forget_request(user)
            else:
                del self._queue[user]
        return failed | self.store.spill()

    def _free_row(self) -> int | None:
        """A row that nobody holds, if need be that of who has had nothing to do for longest, or whose turn is over.

        None where all are busy.
        """
        if None in self._seats:
            return self._seats.index(None)
        held = [(row, seat) for row, seat in enumerate(self._seats) if seat]
        idle = [(seat.used, row) for row, seat in held if not self._next_piece(seat)]
        over = [(seat.since, row) for row, seat in held if self._calls - seat.since >= self.turn]
        if not idle and not over:
            return None
        row = min(idle or over)[1]
        user, waits = held[row][1].user, not idle
        self._vacate(row)
        if waits:
            self._queue[user] = None
        return row

    def _seat(self, user: str, row: int) -> None:
        """Bring a user's memories into a free row, or leave it free."""
        packed = self.store.load(user)
        position = 0 if packed is None else self.tables.put(row, packed)
        unread = self.store.text(user, position)
        if not unread or position + len(unread) != self._lengths[user]:
            self.tables.clear(row)
            raise ValueError(
                f"the text of {user!r} is damaged, or another process has written it. Expected: "
                f"{self._lengths[user]} bytes, of which {position} were read. Received: {position + len(unread)}"
            )
        self._seats[row] = Seat(user, bytearray(unread), self._calls, self._calls)
        self.store.release(user)

    def _vacate(self, row: int) -> None:
        """Pack who holds a row, which is free then."""
        seat = self._seats[row]
        assert seat is not None
        self.store.keep(seat.user, self.tables.pack(row))
        self._clear(row)

    def _return(self, seat: Seat) -> None:
        """Free a row whose memories cannot be relied on; its user goes on from what was packed before."""
        self._clear(self._seats.index(seat))
        self._queue[seat.user] = None

    def _clear(self, row: int) -> None:
        """Make a row what it was at the start: nothing of its user is left in it."""
        self._seats[row] = None
        self.tables.clear(row)

    def _row_of(self, user: str) -> int | None:
        return next((row for row, seat in enumerate(self._seats) if seat and seat.user == user), None)

    # --- Users ---

    def _append(self, user: str, text: bytes) -> None:
        """To the record first, then to what is unread."""
        self.store.append(user, text, self._lengths[user])
        self._lengths[user] += len(text)
        row = self._row_of(user)
        seat = None if row is None else self._seats[row]
        if seat is not None:
            seat.unread += text

    def _answer(self, seat: Seat, byte: bytes) -> None:
        """Put a byte that was asked for on record. Where that fails the user goes back, and the request is dropped."""
        try:
            self._append(seat.user, byte)
        except REFUSALS:
            self._clear(self._seats.index(seat))
            self._forget_request(seat.user)
            raise
        self._wanted[seat.user] -= 1

    def _forget_request(self, user: str) -> None:
        self._wanted.pop(user, None)
        self._queue.pop(user, None)
