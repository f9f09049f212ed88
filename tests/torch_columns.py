"""Run by test_torch_columns.py in n processes: prints, by case, the largest relative error, true, or what was raised.

Each case does with tables in columns over n ranks (gloo) what one process does with tables that lie whole.
"""

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch_column_files  # noqa: F401  whose cases are among them
from column_ranks import CASES, FOLDER, RANK, RANKS, SMALL, both, case, draw, layer_of, leaves, mesh, whole, worst
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fwpkm import FwPKMConfig
from fwpkm.backends import torch as be
from fwpkm.backends.torch import FwPKM, columns
from fwpkm.containers import Memory

CONFIGS = {
    "plain": {},
    "wait, one table": {"boundary": "wait", "lookahead": 2, "memory_scope": "batch"},
    "dot product, clipped": {"score": "dot_product", "num_heads": 2, "grad_clip": 0.02, "weight_decay": 0.1},
    "normalized": {"write_scale": "normalized", "temperature": 0.5, "lookahead": 0},
}


def tables(cfg: FwPKMConfig, deal: Callable[[Any], Any], dtype: Any = torch.float64) -> Memory:
    memory = deal(Memory(*(x.to(dtype) for x in be.init_memory(cfg, seed=1))))
    return Memory(*(x.detach().requires_grad_() for x in memory))


def reading(cfg: FwPKMConfig, deal: Callable[[Any], Any], engine: str, dtype: Any, holes: bool) -> list[Tensor]:
    """Everything that a sequence gives, read in pieces, and the gradients of all of it."""
    cuts = [2, 9, 10] if engine == "eager" else [2, 7]  # the interpreter is slow
    length = cuts[-1]
    shapes = (2, length, cfg.num_heads * cfg.key_dim), (2, length, cfg.value_dim), (2, length)
    query, value, gate = (draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    mask = draw(2, length, seed=3) > -0.3 if holes else None
    if holes:
        query[0, 4, 1], value[1, 5, 0], value[0, 6, -1] = torch.inf, torch.nan, torch.nan
    inputs = [x.requires_grad_() for x in (query, value, gate + 0.5)]
    memory, outputs, traces, start = tables(cfg, deal, dtype), [], [], 0
    state = be.init_state(cfg, memory, batch_size=2)
    for stop in cuts:
        masked = None if mask is None else mask[:, start:stop]
        output, state, trace = be.apply(cfg, state, *(x[:, start:stop] for x in inputs), masked, implementation=engine)
        outputs.append(output)
        traces.append(trace)
        start = stop
    read, _, _ = be.apply(cfg, state, *inputs, update=False, implementation=engine)
    state, trace = be.flush(cfg, state, implementation=engine)
    seen = be.lookup(cfg, state.memory, inputs[0], implementation=engine)
    pair = draw(2, length, seed=5) > -0.2
    after, losses = be.chunk_update(cfg, state.memory, *inputs, pair=pair, implementation=engine)
    live = [torch.cat(outputs, 1), read, *leaves(state.memory), seen.output, seen.weights, *leaves(after)]
    cotangents = [draw(*x.shape, seed=i, dtype=dtype) for i, x in enumerate(live)]
    total = sum((x.nan_to_num() * c.masked_fill(x.isnan(), 0)).sum() for x, c in zip(live, cotangents))
    gradients = torch.autograd.grad(total, [*inputs, *memory])
    return [x.detach() for x in leaves(live, traces, trace, list(losses), list(gradients))]


def reads(engine: str, dtype: Any, changes: dict[str, Any], holes: bool) -> float:
    cfg = FwPKMConfig(**SMALL | changes)
    return both(lambda deal: reading(cfg, deal, engine, dtype, holes))


for _name, _changes in CONFIGS.items():
    _wide = {"key_dim": 16, "value_dim": 16 * RANKS, **_changes}
    CASES[f"eager, {_name}"] = functools.partial(reads, "eager", torch.float64, _changes, holes=bool(_changes))
    CASES[f"kernels, {_name}"] = functools.partial(reads, "triton", torch.float32, _wide, holes=True)


@case
def packed_rows() -> float:
    """And the functions of rows, of states whose rows stand at different positions."""
    cfg = FwPKMConfig(**SMALL)

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        memory, ends = tables(cfg, deal), torch.tensor([0, 7, 7, 16], dtype=torch.int32)
        mask = draw(1, 18, seed=3) > -0.4
        begun = be.init_state(cfg, Memory(*(x.detach() for x in memory)), 3)
        output, state, trace = be.apply(cfg, begun, draw(1, 18, 8), draw(1, 18, 8, seed=1), None, mask, ends)
        state = be.put(cfg, be.flush(cfg, state, [0])[0], [1], be.select(cfg, state, [2]))
        state = be.reset(cfg, be.concat(cfg, [state, be.select(cfg, state, [2, 0])]), memory, [3])
        beams = be.select(cfg, be.select(cfg, state, [4]), [0, 0])
        state = be.put(cfg, be.detach(state), [0, 1], be.detach(beams), inplace=True)
        again, state, _ = be.apply(cfg, state, draw(5, 6, 8, seed=2), draw(5, 6, 8, seed=4))
        return [x.detach() for x in leaves(output, trace, again, state, be.pending(cfg, state))]

    return both(run)


@case
def overlaid() -> float:
    """Rows that begin from one memory and keep nothing; and a call in place, which returns the same table."""
    cfg = FwPKMConfig(**SMALL)

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        memory = Memory(*(x.detach() for x in tables(cfg, deal)))
        output, _, _ = be.apply(cfg, memory, draw(2, 9, 8), draw(2, 9, 8, seed=1))
        short, _, _ = be.apply(cfg, memory, draw(2, 3, 8), draw(2, 3, 8, seed=1))
        begun = be.init_state(cfg, memory, 2)
        inplace, state, _ = be.apply(cfg, begun, draw(2, 9, 8), draw(2, 9, 8, seed=1), inplace=True)
        assert state.memory.values is begun.memory.values
        assert be.nbytes(state) * (RANKS if isinstance(memory.values, DTensor) else 1) > state.memory.values.nbytes
        return leaves(output, short, inplace, state)

    return both(run)


@case
def a_row_that_overflows_in_one_column_keeps_its_bits_in_all() -> float:
    cfg = FwPKMConfig(**SMALL)

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        memory, value = tables(cfg, deal), draw(1, 8, 8, seed=1)
        value[0, 2, 1] = 1.7e308
        output, state, _ = be.apply(
            cfg, be.init_state(cfg, memory, 1), draw(1, 8, 8), value, torch.full((1, 8), 50.0).double()
        )
        assert (whole(state.memory.values)[0] == whole(memory.values)[0]).all(1).sum() > 0
        return [x.detach() for x in leaves(output, state.memory)]

    return both(run)


@case
def in_place_on_the_kernels() -> float:
    """Gradients pass through the table that a call has overwritten."""
    cfg = FwPKMConfig(**SMALL | {"key_dim": 16, "value_dim": 16 * RANKS})

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        state = be.init_state(cfg, deal(be.init_memory(cfg)), 1)
        query, value = draw(1, 4, 16).float().requires_grad_(), draw(1, 4, 16 * RANKS).float().requires_grad_()
        output, state, _ = be.apply(cfg, state, query, value, inplace=True, implementation="triton")
        gradients = torch.autograd.grad(whole(state.memory.values).square().sum() + output.sum(), [query, value])
        return [x.detach() for x in leaves(output, state, gradients)]

    return both(run)


@case
def overflow_on_the_kernels_gives_nan() -> bool:
    """They do not ask each other between launches, and say so."""
    cfg = FwPKMConfig(**SMALL | {"key_dim": 16, "value_dim": 16 * RANKS})
    memory, value = columns.shard(be.init_memory(cfg), mesh()), draw(1, 8, 16 * RANKS, seed=1, dtype=torch.float32)
    value[0, 2, 1] = 3e38
    output, _, _ = be.apply(
        cfg, be.init_state(cfg, memory, 1), draw(1, 8, 16, dtype=torch.float32), value, torch.full((1, 8), 50.0),
        implementation="triton",
    )  # fmt: skip
    return bool(output.isnan().all())


@case
def the_layer() -> float:
    """Two steps of training on a carried state, gradients by name; then decoding, token by token."""

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        layer = deal(layer_of())
        x, state, found = draw(2, 14, 8), None, []
        groups = [[x for n, x in layer.named_parameters() if (n == "memory.values") is own] for own in (False, True)]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.01)
        for piece in (x[:, :7], x[:, 7:]):
            y, state = layer(piece, state)
            optimizer.zero_grad()
            y.square().mean().backward()
            found += [p.grad for p in layer.parameters() if p.grad is not None]
            optimizer.step()
            state = be.detach(state)
        state = be.start_decoding(state)
        table = state.memory.values
        found += [layer.decode(x[:, i : i + 1], state) for i in range(6)]
        assert state.memory.values is table
        return [x.detach() for x in leaves(found, state, list(layer.parameters()))]

    return both(run)


@case
def through_a_state_that_was_made_for_the_call() -> float:
    """A fixed initial memory is copied and overwritten; gradients pass through its writes into the first piece."""

    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        layer, x = deal(layer_of(learn=False)), draw(2, 14, 8).requires_grad_()
        y, state = layer(x[:, :7])
        y, state = layer(x[:, 7:], state)
        (y.square().mean() + whole(state.memory.values).square().sum()).backward()
        with torch.inference_mode():
            read, after = layer(x, be.select(layer.config, be.detach(state), [1, 1]))
        return [z.detach() for z in leaves(y, x.grad, [p.grad for p in layer.parameters()], read, after)]

    return both(run)


@case
def beside_data_parallel() -> float:
    """Two pairs of ranks, each pair with a batch of its own and with columns of one table."""
    mesh = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("rows", "columns"))
    batches, mine = draw(4, 9, 8).split(2), mesh["rows"].get_local_rank()
    layer, whole_layer = columns.shard(layer_of(learn=False), mesh["columns"]), layer_of(learn=False)
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(layer, ["memory.keys", "memory.values"])
    parallel = ddp(layer, process_group=mesh["rows"].get_group())
    y, state = parallel(batches[mine])
    y.square().mean().backward()
    outputs, end = whole_layer(torch.cat(batches))
    outputs.square().mean().backward()
    expected = [outputs.split(2)[mine], whole(end.memory.values).split(2)[mine]]
    received = [y, whole(state.memory.values)]
    for x, wanted in zip(layer.parameters(), whole_layer.parameters(), strict=True):
        received.append(x.grad)
        expected.append(wanted.grad)
    return worst([x.detach() for x in received], [x.detach() for x in expected])


@case
def compiled() -> float:
    def run(deal: Callable[[Any], Any]) -> list[Tensor]:
        layer = deal(layer_of(learn=False))
        with warnings.catch_warnings():  # the compiler looks at tensors between its graphs
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            warnings.filterwarnings("ignore", "To construct DTensor from torch.Tensor")
            y, state = torch.compile(layer, backend="eager")(draw(2, 9, 8))
        y.square().mean().backward()
        return [x.detach() for x in leaves(y, state, [p.grad for p in layer.parameters()])]

    return both(run)


@case
def by_distribute_tensor() -> float:
    """A DTensor that torch makes, in a mesh of two dimensions, is a table in columns."""
    cfg = FwPKMConfig(**SMALL)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("rows", "columns"))
    memory = Memory(*(x.double() for x in be.init_memory(cfg)))
    dealt = memory._replace(values=distribute_tensor(memory.values, mesh, [Replicate(), Shard(-1)]))
    results = [be.apply(cfg, be.init_state(cfg, x, 2), draw(2, 9, 8), draw(2, 9, 8)) for x in (dealt, memory)]
    assert results[0][1].memory.values.to_local().shape[-1] == 8 // RANKS
    named = columns.shard(memory, mesh["columns"])
    return max(worst(leaves(results[0]), leaves(results[1])), worst(leaves(named.values), [memory.values]))


@case
def drawn_in_columns() -> bool:
    """A layer made on the meta device holds no more than its columns, which differ between ranks."""
    layer = FwPKM(8, **SMALL | {"value_dim": 64, "num_subkeys": 80}, device="meta")
    layer = columns.shard(layer, mesh()).to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    values = whole(layer.memory.values)
    assert layer.memory.values.to_local().shape == (6400, 64 // RANKS)
    assert abs(float(values.std()) * 8 - 1) < 0.02
    return len(values[:, :: 64 // RANKS].unique()) > 6400 * (RANKS - 1)


def main() -> None:
    """Join the group and run the cases that are named, in order."""
    names = sys.argv[4:]
    store = f"file://{FOLDER}/{names[0]}-{RANKS}"
    distributed.init_process_group(
        "gloo",
        init_method=store,
        rank=RANK,
        world_size=RANKS,
        timeout=timedelta(seconds=10 if "late" in names else 120),
    )
    if any("kernels" in name for name in names):
        import triton.runtime.interpreter
        from quick_interpreter import quicken

        quicken(triton.runtime.interpreter)
        warnings.filterwarnings("ignore", ".* encountered in", RuntimeWarning)  # numbers that overflow on purpose
    for name in names:
        print(json.dumps([name, CASES[name]()]), flush=True)
    os._exit(0)  # a group that has lost a rank takes long to end


if __name__ == "__main__":
    main()
