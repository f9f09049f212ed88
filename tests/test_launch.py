"""Launches that are listed once: what they pass on when they are made again. Kernels here are stand-ins."""

import dataclasses
import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from interpreter import SMALL

from fwpkm import FwPKMConfig
from fwpkm import kernels as package
from fwpkm.kernels import left_align
from fwpkm.kernels.key_sums import most_pieces, pieces_of
from fwpkm.kernels.runtime import call, decoding, launch, windows
from fwpkm.kernels.runtime.launch import Launches
from fwpkm.kernels.runtime.workspace import Layout, Workspace

STREAM = 7


@pytest.mark.parametrize(("number", "expected"), [(np.array([True]), "bool"), (np.array([7], np.int32), "int32")])
def test_a_block_of_a_truth_is_of_truths(number, expected):
    """A comparison has the type of what was compared there, and Triton 3.9 takes no integers for a mask."""
    assert launch.INTERPRETED
    builder, integers = triton.runtime.interpreter.interpreter_builder, triton.language.int32
    handle = triton.runtime.interpreter.TensorHandle(number, integers)
    block = builder.create_splat(triton.language.block_type(integers, [4]), handle)
    assert block.data.tolist() == 4 * number.tolist()
    assert (block.data.dtype, str(block.dtype)) == (np.dtype(expected), {"bool": "int1"}.get(expected, expected))


class Kernel:
    """Notes what it is compiled for and launched with; its arguments are tensors, one integer and one constant."""

    __name__ = "stand_in"
    arg_names = ("mine", "passed", "never", "count", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple] = []
        self.launched: list[tuple] = []

    def warmup(self, *arguments: Any, grid: tuple, **constants: Any) -> SimpleNamespace:
        self.compiled.append(arguments)
        return SimpleNamespace(run=lambda *passed: self.launched.append(passed), function="f", packed_metadata="m")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One that nothing has compiled yet."""
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return Kernel()


def launches_of(kernel: Kernel, layout: Layout) -> Launches:
    """Two launches, on a tensor of a workspace, one that is passed and one that never is."""
    launches = Launches(layout, inputs=["passed", *({"never"} - layout.tensors.keys())])
    constants = {"BLOCK": 64, "num_warps": 2}
    launches.add(kernel, (5,), {"count": 1}, constants)
    launches.add(kernel, (6, 2), {"count": 2**30, "unused": 3}, constants)
    return launches


def test_addresses_are_those_of_the_call(kernel: Kernel) -> None:
    layout = Layout.of({"other": ((3,), "float32"), "mine": ((2, 2), "float32")})
    launches = launches_of(kernel, layout)
    for _ in range(3):
        workspace, x = Workspace.empty(layout, torch.zeros(1)), torch.zeros(8)
        kernel.launched.clear()
        launches.run({"passed": x, "never": None, "unused": None}, workspace)
        head = (STREAM, "f", "m", None, None, None, workspace["mine"].data_ptr(), x.data_ptr(), None)
        assert kernel.launched == [(5, 1, 1, *head, 1, 64), (6, 2, 1, *head, 2**30, 64)]
    assert len(kernel.compiled) == 1
    assert workspace["mine"].data_ptr() == workspace.buffer.data_ptr() + 256


def test_another_kind_of_tensors_is_compiled_anew(kernel: Kernel) -> None:
    layout = Layout.of({"mine": ((4,), "float32")})
    launches, workspace, x = launches_of(kernel, layout), Workspace.empty(layout, torch.zeros(1)), torch.zeros(8)
    tensors = [x, x[1:], x.to(torch.bfloat16), None, x[4:]]  # the last is aligned as the first
    for tensor in tensors:
        launches.run({"passed": tensor, "never": None}, workspace)
    assert len(kernel.compiled) == 4
    # What one list has compiled, another launches.
    launches_of(kernel, layout).run({"passed": x, "never": None}, workspace)
    assert len(kernel.compiled) == 4


def test_tensors_of_a_workspace_do_not_overlap() -> None:
    specs = {"bytes": ((3,), "int8"), "none": ((0, 4), "float32"), "numbers": ((5, 2), "int64")}
    layout = Layout.of(specs)
    workspace = Workspace.empty(layout, torch.zeros(1))
    for i, name in enumerate(specs):
        workspace[name].fill_(i + 1)
    for i, (name, (shape, dtype)) in enumerate(specs.items()):
        assert workspace[name].shape == shape
        assert workspace[name].dtype == getattr(torch, dtype)
        assert (workspace[name] == i + 1).all()
        assert layout.tensors[name].offset % 256 == 0
    assert layout.size == workspace.buffer.numel()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 10000))
def test_there_is_space_for_the_pieces_of_shorter_windows(longest: int, shorter: int, rows: int) -> None:
    pieces, per_piece = pieces_of(min(shorter, longest), rows)
    assert pieces <= most_pieces(longest, rows)
    assert (pieces - 1) * per_piece < min(shorter, longest) <= pieces * per_piece


def test_a_name_that_nobody_knows_is_told_before_anything_runs(kernel: Kernel) -> None:
    layout = Layout.of({"mine": ((4,), "float32")})
    constants = {"BLOCK": 64}
    with pytest.raises(TypeError, match=r"stand_in\(never=...\): never must be in one layout or input, is in none"):
        Launches(layout, inputs=["passed"]).add(kernel, (1,), {"count": 1}, constants)
    with pytest.raises(TypeError, match=r"stand_in\(count=...\): count must"):
        Launches(layout, inputs=["passed", "never"]).add(kernel, (1,), {"counts": 1}, constants)
    for unknown, buffers in (({"BLOKC": 64}, {}), ({}, {"givn": "mine"})):
        with pytest.raises(TypeError, match="stand_in has no parameter"):
            Launches(layout, inputs=["passed", "never"]).add(kernel, (1,), {"count": 1}, constants | unknown, **buffers)
    with pytest.raises(TypeError, match="in two"):
        Launches(layout, inputs=["mine", "passed", "never"]).add(kernel, (1,), {"count": 1}, constants)


def test_another_tensor_is_bound_where_that_is_said(kernel: Kernel) -> None:
    launches = Launches(inputs=["mine", "other", "never"])
    launches.add(kernel, (1,), {"count": 1}, {"BLOCK": 64}, passed="other")
    assert [name for name, *_ in launches.sources] == ["mine", "other", "never"]


def test_what_a_layout_lacks_is_absent(kernel: Kernel) -> None:
    layout = Layout.of({"never": None, "mine": ((4,), "float32")})
    workspace = Workspace.empty(layout, torch.zeros(1))
    launches_of(kernel, layout).run({"passed": None}, workspace)
    assert [launched[9:] for launched in kernel.launched] == [
        (workspace.buffer.data_ptr(), None, None, n, 64) for n in (1, 2**30)
    ]


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_every_tensor_of_every_kernel_is_bound_by_its_own_name(scope: str, clip: float | None) -> None:
    """All launches of reading, writing, their backward and decoding; one kernel sums tensors of several names."""
    cfg = FwPKMConfig(**SMALL, memory_scope=scope, grad_clip=clip)
    plan, memories = windows.plan(cfg, 0, 11, 2, True), {"batch": 1, "sequence": 2}[scope]
    lists = []
    for overlaid in (False, True):
        for save in (False, True):
            of_forward = windows.Call(cfg, plan, torch.float32, memories, save, overlaid)
            forward = call.forward_launches(of_forward, None)
            lists += forward.prepare, forward.address, forward.write
        backward = call.backward_launches(of_forward, True, True, forward.residuals)
        lists += backward.through_values, backward.through_keys
    many = dataclasses.replace(cfg, num_heads=3)  # more slots a token than a thread takes
    lists.append(call.forward_launches(windows.Call(many, plan, torch.float32, memories, True), None).address)
    step = decoding.decode_call(cfg, 2, memories)
    lists.append(decoding.decode_launches(step))
    lists += (
        left_align.left_align_launches(cfg, 2, 11, 11, 22),
        left_align.left_over_launches(cfg, 2, 11),
        left_align.rows_launches(22, (16,)),
    )
    factors, kernels = set(), set()
    for launches in lists:
        names = [name for name, *_ in launches.sources]
        for bound in launches.kernels:
            kernels.add(bound.kernel.__name__)
            tensors = dict(zip(bound.kernel.arg_names, [names[i] for i in bound.tensors]))
            if "factors" in tensors:
                factors.add(tensors.pop("factors"))
            assert list(tensors) == list(tensors.values())
    assert factors == {"coefficients", "d_slopes", "d_ranks"}
    modules = [
        importlib.import_module(f"fwpkm.kernels.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    assert kernels == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_where_keys_are_at_rest_all_windows_are_addressed_at_once(boundary: str) -> None:
    """As many launches for any number of windows, and one copy of the keys, whatever a backward needs."""

    def counts(length: int, **fields) -> tuple[int, ...]:
        cfg = FwPKMConfig(**SMALL, boundary=boundary, **fields)
        made = windows.Call(cfg, windows.plan(cfg, 0, length, 2, True), torch.float32, 2, True)
        forward = call.forward_launches(made, None)
        backward = call.backward_launches(made, boundary == "wait", True, forward.residuals).through_keys
        names = [forward.address.kernels[number].kernel.__name__ for number, *_ in forward.address.launches]
        copies, _, _, _ = forward.residuals.spec("keys").shape
        return len(names), names.count("keys_kernel"), len(backward.launches), copies

    of_short, of_long = (counts(4 * chunks + 3, addressing_weight=0.0) for chunks in (3, 9))
    assert of_short == of_long
    assert of_long[1::2] == (0, 2)
    of_short, of_long = (counts(4 * chunks + 3) for chunks in (3, 9))
    assert [b - a for a, b in zip(of_short, of_long)] == [6 * 5, 6, 6 * 4, 6 * 2]
