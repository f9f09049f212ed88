"""The kernels as operators of torch, and decoding: beside eager torch, in Triton's interpreter without a GPU."""

import functools

import pytest
import torch
from interpreter import DEVICE, SMALL, same_or_close
from torch import Tensor

from fwpkm import FwPKMConfig, kernels
from fwpkm.agreement import BOUNDS
from fwpkm.backends import torch as be
from fwpkm.backends.torch import engine
from fwpkm.backends.torch.flat import flatten
from fwpkm.containers import Memory, State

CONFIGS = {
    "plain": {},
    "wait, clipped, one table": {
        "boundary": "wait", "lookahead": 2, "grad_clip": 0.02, "memory_scope": "batch", "num_heads": 2,
    },
    "no lookahead": {"lookahead": 0, "score": "dot_product", "write_scale": "normalized"},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # what torch's own compiler uses
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",  # as it does while it traces
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # the compiler looks at a state's tables
)


def tokens_of(cfg: FwPKMConfig, length: int, batch: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((batch, length, cfg.num_heads * cfg.key_dim), (batch, length, cfg.value_dim), (batch, length))
    query, value, gate = (torch.rand(shape, generator=draw).to(DEVICE) for shape in shapes)
    return [query - 0.5, value - 0.5, gate]


def state_of(cfg: FwPKMConfig, batch: int = 2) -> State:
    return be.init_state(cfg, Memory(*(x.to(DEVICE) for x in be.init_memory(cfg, seed=1))), batch_size=batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_without_a_break_it_gives_the_same(name: str) -> None:
    """Two calls that cut a chunk, one that only reads; and the gradients of all that they return."""
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])

    def read(implementation: str, state: State, query: Tensor, value: Tensor, gate: Tensor) -> tuple:
        options = {"implementation": implementation}
        first = [x[:, :6] for x in (query, value, gate)]
        second = [x[:, 6:] for x in (query, value, gate)]
        output, state, _ = be.apply(cfg, state, *first, **options)
        more, state, trace = be.apply(cfg, state, *second, **options)
        again, same, _ = be.apply(cfg, state, query, value, gate, update=False, **options)
        assert same.memory is state.memory
        trace = trace._replace(writes=trace.writes.to(DEVICE))
        return torch.cat([output, more, again], 1), *state.arrays().values(), *trace

    results = []
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for implementation, function in (("eager", read), ("triton", compiled)):
        inputs = [x.requires_grad_() for x in tokens_of(cfg, 9)]
        tables = [x.requires_grad_() for x in be.init_memory(cfg, seed=1)]
        state = be.init_state(cfg, Memory(*(x.to(DEVICE) for x in tables)), batch_size=2)
        found = function(implementation, state, *inputs)
        live = [x for x in found if x.requires_grad]
        total = sum((x * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum() for x in live)
        results.append([*found, *torch.autograd.grad(total, [*inputs, *tables])])
    for expected, received in zip(*results, strict=True):
        assert received.dtype == expected.dtype
        same_or_close(received, expected)


RAGGED = {
    "rows at different positions": (2, 5, None, None),
    "padding left, right and between": (2, 6, [[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], None),
    "packed, with an empty sequence, one of a token, and a tail": (1, 9, [[1, 1, 0, 1, 1, 1, 1, 1, 1]], [0, 6, 6, 7]),
}


@pytest.mark.parametrize("where", ["kernels", "one graph"])
@pytest.mark.parametrize(("kind", "name"), [*((kind, "plain") for kind in RAGGED), (list(RAGGED)[1], list(CONFIGS)[1])])
def test_ragged_rows_are_read_as_eagerly(kind: str, name: str, where: str) -> None:
    """Rows that began with 0, 1 and 3 tokens, in two calls: outputs, traces, states, and gradients of all of them."""
    cfg = FwPKMConfig(**SMALL | {"chunk_size": 3} | CONFIGS[name])
    rows, length, mask, ends = RAGGED[kind]
    batch = rows if ends is None else len(ends) - 1
    mask = None if mask is None else torch.tensor(mask, device=DEVICE).bool()
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    begun = None
    if cfg.memory_scope == "sequence":
        begun = (torch.arange(3) < torch.tensor([0, 1, 3])[:batch, None]).to(DEVICE)

    def read(implementation: str, state: State, query: Tensor, value: Tensor, gate: Tensor) -> tuple:
        call = {"mask": mask, "cu_seqlens": ends, "implementation": implementation}
        output, state, trace = be.apply(cfg, state, query, value, gate, **call)
        more, state, after = be.apply(cfg, state, query, value, gate, **call)
        return output, more, state, trace, after

    results = []
    for implementation, function in (("eager", read), ("triton", read)):
        inputs = [x.requires_grad_() for x in tokens_of(cfg, length, rows)]
        with torch.no_grad():
            inputs[0][0, 1, 0] = torch.inf
            if mask is not None:
                inputs[1][~mask] = torch.nan
        tables = [x.requires_grad_() for x in be.init_memory(cfg, seed=1)]
        state = be.init_state(cfg, Memory(*(x.to(DEVICE) for x in tables)), batch)
        _, state, _ = be.apply(cfg, state, *tokens_of(cfg, 3, batch), begun, implementation="eager")
        if implementation == "triton" and where == "one graph":
            function = torch.compile(read, fullgraph=True, backend="aot_eager")
        output, more, state, *traces = function(implementation, state, *inputs)
        live = [output, more, *state.memory, state.pending_query, state.pending_value]
        total = sum((x.nan_to_num() * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum() for x in live)
        records = [x.float() for trace in traces for x in trace._replace(slots=trace.slots * trace.weights.isfinite())]
        results.append([*live, *state.arrays().values(), *records, *torch.autograd.grad(total, [*inputs, *tables])])
    for expected, received in zip(*results, strict=True):
        same_or_close(received, expected)


def test_what_is_padded_too_far_is_read_eagerly() -> None:
    """One long sequence beside many short ones, with a state: the reason names both. Without one nothing is padded."""
    cfg = FwPKMConfig(**SMALL)
    memory = Memory(*(x.to(DEVICE) for x in be.init_memory(cfg)))
    query, value, _ = tokens_of(cfg, 15, 1)
    ends = torch.tensor([0, 9, *range(10, 16)], dtype=torch.int32)
    assert kernels.why_unsupported(cfg, memory, query, ends[:3]) is None
    assert "7 sequences of up to 9 tokens, 15 in all" in str(kernels.why_unsupported(cfg, memory, query, ends))
    state = be.init_state(cfg, memory, 7)
    with pytest.raises(ValueError, match="at most 4 times their tokens"):
        be.apply(cfg, state, query, value, cu_seqlens=ends, implementation="triton")
    expected, _, _ = be.apply(cfg, state, query, value, cu_seqlens=ends)
    output, state, _ = be.apply(cfg, memory, query, value, cu_seqlens=ends, implementation="triton")
    same_or_close(output, expected)
    assert state is None


def test_what_a_compiled_layer_reads_packed_and_masked(monkeypatch) -> None:
    """From no state and in one graph; with a state, and without one that nobody asked for."""
    layer = be.FwPKM(8, **SMALL).to(DEVICE).requires_grad_(False)
    x, ends = torch.rand(1, 8, 8, device=DEVICE), torch.tensor([0, 5, 7], dtype=torch.int32)
    mask = torch.ones(1, 8, dtype=torch.bool, device=DEVICE)
    mask[0, 2] = False
    expected, state = layer(x, mask=mask, cu_seqlens=ends)
    choose = engine.choose_engine
    monkeypatch.setattr(engine, "choose_engine", lambda _, *rest: choose("triton", *rest))
    for keep in (True, False):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        received, after = compiled(x, mask=mask, cu_seqlens=ends, return_state=keep)
        same_or_close(received, expected)
        assert (after is None) == (not keep)
        for a, b in zip(after.arrays().values() if keep else [], state.arrays().values()):
            same_or_close(a, b)


def test_a_graph_shows_a_cu_seqlens_that_is_not_legal(monkeypatch) -> None:
    """Nobody can raise there: tokens read NaN, those behind the last sequence too, and nothing is written."""
    layer = be.FwPKM(8, **SMALL | {"chunk_size": 3}).to(DEVICE).requires_grad_(False)
    x, offsets = torch.rand(1, 8, 8, device=DEVICE), torch.tensor([0, 5, 7], dtype=torch.int32)
    mask = (torch.arange(8, device=DEVICE) != 2)[None]
    _, state = layer(torch.rand(2, 2, 8, device=DEVICE))
    expected = layer(x, state, mask, offsets)
    choose = engine.choose_engine
    monkeypatch.setattr(engine, "choose_engine", lambda _, *rest: choose("triton", *rest))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, state, mask, offsets)[1].arrays().values(), expected[1].arrays().values(), strict=True):
        same_or_close(a, b)
    for ends in ([1, 3, 7], [0, 5, 2], [0, 5, 9], [0, -1, 7]):
        y, after, trace = compiled(x, state, mask, torch.tensor(ends, dtype=torch.int32), return_trace=True)
        for found in (y, trace.weights):
            assert found[mask].isnan().all()
            assert not found[~mask].any()
        assert not trace.writes.any()
        for a, b in zip(after.arrays().values(), state.arrays().values(), strict=True):
            assert torch.equal(a, b)
    y, _ = compiled(x, None, None, torch.tensor([0, 5, 2], dtype=torch.int32), return_state=False)
    assert y.isnan().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_lengths_may_vary(name: str) -> None:
    """The second length becomes a symbol, of which nothing may be remembered."""
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])
    state = state_of(cfg)

    def read(implementation: str, *inputs: Tensor) -> Tensor:
        return be.apply(cfg, state, *inputs, implementation=implementation)[0].square().sum()

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for length in (5, 7, 9):
        results = []
        for implementation, function in (("eager", read), ("triton", compiled)):
            inputs = [x.requires_grad_() for x in tokens_of(cfg, length)]
            loss = function(implementation, *inputs)
            results.append([loss, *torch.autograd.grad(loss, inputs, materialize_grads=True)])
        for expected, received in zip(*results, strict=True):
            same_or_close(received, expected)


def test_compiled_a_table_is_overwritten_in_place_and_else_never() -> None:
    cfg = FwPKMConfig(**SMALL)

    def read(implementation: str, state: State, inplace: bool, *inputs: Tensor) -> tuple[Tensor, Memory]:
        output, after, _ = be.apply(cfg, state, *inputs, inplace=inplace, implementation=implementation)
        return output * 2 + 1, after.memory

    results, compiled = [], functools.partial(torch.compile(read, backend="aot_eager"), "triton")
    for function, inplace in ((functools.partial(read, "eager"), False), (compiled, True), (compiled, False)):
        inputs, state = [x.requires_grad_() for x in tokens_of(cfg, 5, batch=1)], state_of(cfg, batch=1)
        before = state.memory.values.clone()
        output, after = function(state, inplace, *inputs)
        assert torch.equal(state.memory.values, after.values if inplace else before)
        assert not torch.equal(after.values, before)
        results.append([output, *after, *torch.autograd.grad(output.square().sum(), inputs)])
    for expected, *received in zip(*results, strict=True):
        for x in received:
            same_or_close(x, expected)


@pytest.mark.parametrize("served", [False, True], ids=["eager", "triton"])
def test_a_compiled_layer_overwrites_a_state_in_place_and_never_its_own_tables(monkeypatch, served: bool) -> None:
    choose = engine.choose_engine
    forced = "triton" if served else "eager"
    monkeypatch.setattr(engine, "choose_engine", lambda _, *rest: choose(forced, *rest))
    layer = be.FwPKM(8, **SMALL).to(DEVICE).requires_grad_(False)
    x, initial = torch.rand(1, 8, 8, device=DEVICE), layer.memory.values.clone()
    expected, between = layer(x[:, :5])
    more, last = layer(x[:, 5:], between)
    compiled = torch.compile(layer, backend="aot_eager")
    received, state = compiled(x[:, :5], inplace=True)  # without a state there is nothing to give up
    same_or_close(received, expected)
    same_or_close(state.memory.values, between.memory.values)
    assert torch.equal(layer.memory.values, initial)
    for inplace in (False, True):
        before = state.memory.values.clone()
        received, after = compiled(x[:, 5:], state, inplace=inplace)
        same_or_close(received, more)
        same_or_close(after.memory.values, last.memory.values)
        assert torch.equal(state.memory.values, after.memory.values if inplace else before)
        assert not torch.equal(after.memory.values, before)


def test_the_operators_are_what_they_say() -> None:
    """Schemas, shapes without data, and gradients, by torch's own checks."""
    cfg = FwPKMConfig(**SMALL)
    state, (query, value, gate) = state_of(cfg), tokens_of(cfg, 5)
    for overlaid, values in ((False, state.memory.values), (True, state.memory.values[:1])):
        tokens = query, value, gate, None
        arguments = (
            cfg.to_json(), state.memory.keys, values, None, *tokens, torch.float32, True, False, None, overlaid,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fwpkm.apply.default, arguments, test_utils=("test_schema", "test_faketensor"))
    started = be.start_decoding(state)
    one = [x[:, :1].contiguous() for x in (query, value, gate)]
    arguments = (cfg.to_json(), *flatten(started), *one, None)
    torch.library.opcheck(torch.ops.fwpkm.decode.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_narrow_inputs_in_the_middle_of_a_chunk(backend: str) -> None:
    """SPEC.md §6: outputs in the query's dtype. A compiler believes what the operator says of its results."""
    cfg = FwPKMConfig(**SMALL)
    state, inputs = state_of(cfg), [x.bfloat16() for x in tokens_of(cfg, 6)]
    _, state, _ = be.apply(cfg, state, *(x[:, :2] for x in inputs), implementation="triton")
    inputs = [x[:, 2:] for x in inputs]

    def read(state: State, *inputs: Tensor) -> Tensor:
        return be.apply(cfg, state, *inputs, implementation="triton")[0] * 2 + 1

    expected = be.apply(cfg, state, *inputs, implementation="eager")[0] * 2 + 1
    for function in (read, torch.compile(read, fullgraph=True, backend=backend)):
        received = function(state, *inputs)
        assert received.dtype == torch.bfloat16
        assert (received.float() - expected.float()).norm() < BOUNDS["bfloat16"].forward * expected.float().norm()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("value", lambda x: x[..., :8], "value must have shape"),
        ("gate", lambda x: x[:, :3], "gate must have shape"),
        ("query", lambda x: x[0], "query must have shape"),
        ("mask", lambda x: x.long(), "mask must"),
    ],
)
def test_compiled_calls_are_checked(name: str, change, message: str) -> None:
    cfg = FwPKMConfig(**SMALL)
    arguments = dict(zip(("query", "value", "gate"), tokens_of(cfg, 6)))
    arguments["mask"] = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    arguments[name] = change(arguments[name])
    compiled = torch.compile(
        lambda state, arguments: be.apply(cfg, state, **arguments, implementation="triton")[0],
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=message):
        compiled(state_of(cfg), arguments)


def test_what_the_kernels_do_not_serve_is_compiled_around_them() -> None:
    cfg = FwPKMConfig(**SMALL | {"key_dim": 24})
    state, inputs = state_of(cfg), tokens_of(cfg, 5)
    compiled = torch.compile(lambda state, *inputs: be.apply(cfg, state, *inputs)[0], backend="aot_eager")
    same_or_close(compiled(state, *inputs), be.apply(cfg, state, *inputs)[0])


@pytest.mark.parametrize("implementation", ["triton", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_reading(name: str, implementation: str) -> None:
    """Every output and every field of the state, token by token, over chunk boundaries, masked and dead tokens."""
    cfg = FwPKMConfig(**SMALL | CONFIGS[name])
    query, value, gate = tokens_of(cfg, 11)
    query[0, 2, 1], value[1, 5, 0] = torch.inf, torch.nan
    mask = torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    mask[1, 3] = False
    state = state_of(cfg)
    decoding = be.start_decoding(state)
    fields = [*decoding.arrays().values()]
    with torch.no_grad():
        for t in range(11):
            one = [x[:, t : t + 1] for x in (query, value, gate, mask)]
            expected, state, _ = be.apply(cfg, state, *one, implementation="eager")
            received = be.decode(cfg, decoding, *one, implementation=implementation)
            same_or_close(received, expected)
            for field, wanted in zip(fields, state.arrays().values(), strict=True):
                same_or_close(field, wanted)


@pytest.mark.parametrize("boundary", ["drop", "wait"])
def test_decoding_rows_at_different_positions_and_rows_that_rest(boundary: str) -> None:
    """Each row writes when its own chunk is complete; a masked one keeps every bit, its table too."""
    cfg = FwPKMConfig(**SMALL | {"boundary": boundary, "chunk_size": 3})
    begun = torch.arange(2, device=DEVICE) < torch.arange(3, device=DEVICE)[:, None]
    _, state, _ = be.apply(cfg, state_of(cfg, 3), *tokens_of(cfg, 2, 3), begun, implementation="eager")
    inputs = tokens_of(cfg, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 1, 1, 1, 1]], device=DEVICE).bool()
    inputs[1][~mask] = torch.nan
    decoding = be.start_decoding(state)
    for t in range(5):
        one = [x[:, t : t + 1] for x in (*inputs, mask)]
        before = decoding.map(torch.clone)
        expected, state, _ = be.apply(cfg, state, *one, implementation="eager")
        same_or_close(be.decode(cfg, decoding, *one, implementation="triton"), expected)
        for field, old, wanted in zip(*(x.arrays().values() for x in (decoding, before, state)), strict=True):
            same_or_close(field, wanted)
            assert torch.equal(field[~mask[:, t]], old[~mask[:, t]])


def test_decoding_goes_on_as_reading() -> None:
    cfg = FwPKMConfig(**SMALL)
    inputs, state = tokens_of(cfg, 9), state_of(cfg)
    expected, _, _ = be.apply(cfg, state, *inputs)
    _, state, _ = be.apply(cfg, state, *(x[:, :5] for x in inputs))
    decoding = be.start_decoding(state)
    outputs = [be.decode(cfg, decoding, *(x[:, t : t + 1] for x in inputs)) for t in (5, 6)]
    state = decoding._replace(position=decoding.position.cpu())
    outputs.append(be.apply(cfg, state, *(x[:, 7:] for x in inputs))[0])
    same_or_close(torch.cat(outputs, 1), expected[:, 5:])


def test_the_layer_decodes_as_it_reads() -> None:
    layer = be.FwPKM(8, **SMALL).to(DEVICE)
    x = torch.rand(2, 6, 8, device=DEVICE)
    x[0, 3, 2] = torch.nan
    expected, _ = layer(x)
    state = be.start_decoding(layer.init_state(2))
    same_or_close(torch.cat([layer.decode(x[:, t : t + 1], state) for t in range(6)], 1), expected.detach())


def two_tokens(state: State, one: list[Tensor]) -> tuple[State, list[Tensor]]:
    return state, [torch.cat([x, x], 1) for x in one]


def trained_tables(state: State, one: list[Tensor]) -> tuple[State, list[Tensor]]:
    return state._replace(memory=Memory(*(x.requires_grad_() for x in state.memory))), one


def transposed(state: State, one: list[Tensor]) -> tuple[State, list[Tensor]]:
    return state._replace(pending_query=state.pending_query.mT.contiguous().mT), one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_tokens, r"\[B, 1, H\*Dk\].*Received: \(2, 2, 16\)"),
        (trained_tables, "keys of the state must be float32, contiguous"),
        (transposed, "pending_query of the state must be float32, contiguous"),
    ],
)
def test_decoding_says_what_is_wrong_and_changes_nothing(change, message: str) -> None:
    cfg = FwPKMConfig(**SMALL)
    started, one = be.start_decoding(state_of(cfg)), [x[:, :1] for x in tokens_of(cfg, 1)[:2]]
    state, one = change(started, one)
    with pytest.raises(ValueError, match=message):
        be.decode(cfg, state, *one)
    assert state.position.tolist() == [0, 0]
