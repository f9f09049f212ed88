"""Launches that are listed once: what they pass on when they are made again. Kernels here are stand-ins."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fwpkm.kernels import launch
from fwpkm.kernels.launch import Steps
from fwpkm.kernels.room import Layout, Room
from fwpkm.kernels.sums import most_pieces, pieces_of

STREAM = 7


class Kernel:
    """Notes what it is compiled for and launched with; its arguments are tensors, one integer and one constant."""

    arg_names = ("x", "y", "absent", "count", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple] = []
        self.launched: list[tuple] = []

    def warmup(self, *arguments: Any, grid: tuple, **constants: Any) -> SimpleNamespace:
        self.compiled.append(arguments)
        return SimpleNamespace(run=lambda *given: self.launched.append(given), function="f", packed_metadata="m")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One that nothing has compiled yet."""
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return Kernel()


def steps_of(kernel: Kernel, layout: Layout) -> Steps:
    """Two launches, on a tensor of a room, one that is given and one that never is."""
    steps = Steps(layout)
    add = steps.of(kernel, "mine", "given", "never", BLOCK=64, num_warps=2)
    add((5,), 1)
    add((6, 2), 2**30)
    return steps


def test_addresses_are_those_of_the_call(kernel: Kernel) -> None:
    layout = Layout.of({"other": ((3,), torch.float32), "mine": ((2, 2), torch.float32)})
    steps = steps_of(kernel, layout)
    for _ in range(3):
        room, x = Room.empty(layout, torch.zeros(1)), torch.zeros(8)
        kernel.launched.clear()
        steps.run({"given": x, "never": None, "unused": None}, room)
        head = (STREAM, "f", "m", None, None, None, room["mine"].data_ptr(), x.data_ptr(), None)
        assert kernel.launched == [(5, 1, 1, *head, 1, 64), (6, 2, 1, *head, 2**30, 64)]
    assert len(kernel.compiled) == 1
    assert room["mine"].data_ptr() == room.buffer.data_ptr() + 256


def test_another_kind_of_tensors_is_compiled_anew(kernel: Kernel) -> None:
    layout = Layout.of({"mine": ((4,), torch.float32)})
    steps, room, x = steps_of(kernel, layout), Room.empty(layout, torch.zeros(1)), torch.zeros(8)
    kinds = [x, x[1:], x.to(torch.bfloat16), None, x[4:]]  # the last is aligned as the first
    for given_tensor in kinds:
        steps.run({"given": given_tensor, "never": None}, room)
    assert len(kernel.compiled) == 4
    steps_of(kernel, layout).run({"given": x, "never": None}, room)  # what one list has compiled, another launches
    assert len(kernel.compiled) == 4


def test_tensors_of_a_room_do_not_overlap() -> None:
    specs = {"bytes": ((3,), torch.int8), "none": ((0, 4), torch.float32), "numbers": ((5, 2), torch.int64)}
    layout = Layout.of(specs)
    room = Room.empty(layout, torch.zeros(1))
    for i, name in enumerate(specs):
        room[name].fill_(i + 1)
    for i, (name, (shape, dtype)) in enumerate(specs.items()):
        assert room[name].shape == shape
        assert room[name].dtype == dtype
        assert (room[name] == i + 1).all()
        assert layout.places[name].offset % 256 == 0
    assert layout.size == room.buffer.numel()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 10000))
def test_there_is_room_for_the_pieces_of_shorter_windows(longest: int, shorter: int, rows: int) -> None:
    pieces, per_piece = pieces_of(min(shorter, longest), rows)
    assert pieces <= most_pieces(longest, rows)
    assert (pieces - 1) * per_piece < min(shorter, longest) <= pieces * per_piece


def test_a_name_that_nobody_gives_is_told(kernel: Kernel) -> None:
    layout = Layout.of({"mine": ((4,), torch.float32)})
    with pytest.raises(KeyError, match="never"):
        steps_of(kernel, layout).run({"given": torch.zeros(8)}, Room.empty(layout, torch.zeros(1)))


def test_what_a_layout_lacks_is_absent(kernel: Kernel) -> None:
    layout = Layout.of({"never": None, "mine": ((4,), torch.float32)})
    room = Room.empty(layout, torch.zeros(1))
    steps_of(kernel, layout).run({"given": None}, room)
    assert [launched[9:] for launched in kernel.launched] == [
        (room.buffer.data_ptr(), None, None, n, 64) for n in (1, 2**30)
    ]
