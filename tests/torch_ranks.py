"""Run by test_distributed.py: on processes with gloo, what data parallel gives is what one process gives (SPEC.md §6).

Prints by case and number of ranks the worst error of any rank over its bound, or what was raised. Ranks are forked from
one process, so that torch is imported once.
"""

import copy
import datetime
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from rank_refusals import bad_input, refused
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import fwpkm
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends.torch import FwPKM, detach, init_memory, init_state, select
from fwpkm.containers import Memory
from fwpkm.integrations.distributed import ShardedStates, share_initial_memory

sys.path.append(str(Path(__file__).parents[1]))  # behind everything, since it holds folders of common names
from examples.language_model.settings import Experiment
from examples.language_model.training import Batch, Trainer

ROWS, PIECE, STEPS, WORDS, WIDTH = 8, 9, 3, 16, 8
SETTINGS = {"key_dim": 8, "value_dim": 8, "num_subkeys": 6, "top_k": 2, "chunk_size": 4}
ROUNDS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
TIMEOUT = datetime.timedelta(seconds=60)


class Model(nn.Module):
    """Words, a memory beside a residual, words."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(WORDS, WIDTH, dtype=dtype)
        self.memory = FwPKM(WIDTH, dtype=dtype, **SETTINGS, **options)
        self.readout = nn.Linear(WIDTH, WORDS, dtype=dtype)

    def forward(self, words: Tensor, state: Any = None, mask: Any = None) -> tuple[Tensor, Any]:
        x = self.embed(words)
        y, state = self.memory(x, state, mask)
        return self.readout(x + y), state


GENERATOR = torch.Generator().manual_seed(1)
TEXT = torch.randint(WORDS, (ROWS, STEPS * PIECE + 1), generator=GENERATOR)
THERE = torch.rand(ROWS, STEPS * PIECE, generator=GENERATOR) > 0.3  # so that ranks stand at other positions
THERE[0, :PIECE] = False  # a row that rests


def loss_of(logits: Tensor, targets: Tensor, there: Tensor) -> Tensor:
    """A sum over a constant, so that the mean over ranks is that of all rows."""
    losses = F.cross_entropy(logits.mT.double(), targets, reduction="none")
    return (losses * there).sum() / there.numel()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def train(
    call: Callable, optimizer: Any, rows: slice, state: Any = None, steps: Any = range(STEPS), carry: bool = True
) -> dict[str, Any]:
    """Read a piece in each step, the state going along if ``carry``: what came out, and the state."""
    outputs = []
    for step in steps:
        here = slice(step * PIECE, (step + 1) * PIECE)
        words, there = TEXT[rows, step * PIECE : (step + 1) * PIECE + 1], THERE[rows, here]
        optimizer.zero_grad()
        logits, state = call(words[:, :-1], state if carry else None, there)
        loss_of(logits, words[:, 1:], there).backward()
        optimizer.step()
        state = detach(state)
        outputs.append(logits.detach())
    return {"outputs": torch.cat(outputs, 1), "state": state}


def alone(model: nn.Module, **options: Any) -> dict[str, Any]:
    return train(model, optimizer_of(model), slice(None), **options)


def dealt(rank: int, ranks: int) -> slice:
    """The rows of a rank."""
    part = torch.arange(ROWS).chunk(ranks)[rank]
    return slice(int(part[0]), int(part[-1]) + 1)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def over_bounds(found: dict, expected: dict, rows: slice, model: nn.Module, single: nn.Module, kind: str) -> float:
    """The worst error of outputs, states, gradients and weights, over its bound."""
    bounds = BOUNDS[kind]
    worst = [relative_error(found["outputs"], expected["outputs"][rows]) / bounds.forward]
    own = select(single.memory.config, expected["state"], torch.arange(ROWS)[rows])
    for received, wanted in zip([*found["state"].memory, *found["state"]][:2], own.memory):
        worst.append(relative_error(received, wanted) / bounds.forward)
    for received, wanted in zip((*found["state"].pending, found["state"].position), (*own.pending, own.position)):
        worst.append(relative_error(received, wanted) / bounds.forward)
    for (name, received), wanted in zip(model.named_parameters(), single.parameters(), strict=True):
        # Where a step goes on from a state, the initial tables have no part in it.
        assert (received.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            worst.append(relative_error(whole(received.grad), wanted.grad) / bounds.gradient)
        worst.append(relative_error(whole(received), wanted.detach()) / bounds.gradient)
    return max(worst)


# --- Cases: each takes (rank, ranks) and returns an error over its bound ---


def ddp(rank: int, ranks: int, learn: bool = False, carry: bool = True, compiled: bool = False) -> float:
    """DDP of ranks that drew other weights and tables; the graph changes only where a learned memory is left out."""
    single, rows = Model(learn_memory=learn), dealt(rank, ranks)
    model = Model(seed=rank, learn_memory=learn)
    share_initial_memory(model)
    changes = learn and carry
    call: Callable = DistributedDataParallel(model, static_graph=not changes, find_unused_parameters=changes)
    if compiled:
        call = torch.compile(call, backend="aot_eager")
    found = train(call, optimizer_of(model), rows, carry=carry)
    return over_bounds(found, alone(single, carry=carry), rows, model, single, "float64")


def ddp_no_sync(rank: int, ranks: int) -> float:
    """Gradients of two pieces, of which only the second is reduced."""
    single, rows, model = Model(), dealt(rank, ranks), Model(seed=rank)
    share_initial_memory(model)
    wrapped = DistributedDataParallel(model)

    def gradients(call: Callable, first: Any, rows: slice) -> None:
        words, there = TEXT[rows], THERE[rows]
        with first:
            logits, state = call(words[:, :PIECE], None, there[:, :PIECE])
            loss_of(logits, words[:, 1 : PIECE + 1], there[:, :PIECE]).backward()
        logits, _ = call(words[:, PIECE:-1], detach(state), there[:, PIECE:])
        loss_of(logits, words[:, PIECE + 1 :], there[:, PIECE:]).backward()

    gradients(wrapped, wrapped.no_sync(), rows)
    gradients(single, torch.enable_grad(), slice(None))
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return max(relative_error(p.grad, q.grad) for p, q in pairs) / BOUNDS["float64"].gradient


def ddp_traffic(rank: int, ranks: int) -> float:
    """A step sends the gradients, once, and nothing else; without share_initial_memory the tables too."""

    def sent(share: bool) -> list[tuple[str, int]]:
        model = Model()
        if share:
            share_initial_memory(model)
        wrapped, rows = DistributedDataParallel(model), dealt(rank, ranks)
        for _ in range(2):  # DDP measures its buckets at first
            wrapped(TEXT[rows])[0].sum().backward()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            wrapped(TEXT[rows])[0].sum().backward()
        found = [(e.name.removeprefix("gloo:"), e.input_shapes) for e in profiler.events() if e.name[:5] == "gloo:"]
        return sorted((name, int(torch.tensor(shapes[0]).prod())) for name, shapes in found)

    model = Model()
    weights = sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() for b in model.buffers())
    assert sent(share=False) == [("all_reduce", weights), ("broadcast", tables)], sent(share=False)
    assert sent(share=True) == [("all_reduce", weights)], sent(share=True)
    return 0.0


def columns(rank: int, ranks: int) -> float:
    """Tables in columns over pairs of ranks: those with the same columns share them, and others are refused."""
    mesh, layer = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("rows", "columns")), Model(seed=rank).memory
    first = Model(seed=rank % 2).memory.memory.values.chunk(2, 1)[rank % 2]
    local = layer.memory.values.chunk(2, 1)[rank % 2].contiguous()
    layer.memory.values = DTensor.from_local(local, mesh["columns"], [Shard(1)])
    refused(lambda: share_initial_memory(layer), "rank 1: group must be", "ranks [0, 1], which hold other columns")
    share_initial_memory(layer, mesh["rows"].get_group())
    assert torch.equal(local, first)
    state = FwPKM(WIDTH, **SETTINGS).init_state(2)
    state = state._replace(
        memory=state.memory._replace(values=DTensor.from_local(state.memory.values, mesh["columns"]))
    )
    refused(lambda: ShardedStates({"a": state}, layer.config), "must hold whole tables")
    return 0.0


def sharded(model: Model, policy: MixedPrecisionPolicy | None = None) -> Model:
    """As docs/distributed.md says."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if model.memory.learn_memory:
        fully_shard(model.memory.memory, mesh=mesh)
    for module in (model.memory, model):
        fully_shard(module, mesh=mesh, **({} if policy is None else {"mp_policy": policy}))
    return model


def fsdp(rank: int, ranks: int, learn: bool = False, carry: bool = True, compiled: bool = False) -> float:
    """FSDP2: weights in shards, the tables of a fixed initial memory whole, those of a learned one in shards too."""
    single, rows, model = Model(learn_memory=learn), dealt(rank, ranks), sharded(Model(learn_memory=learn))
    share_initial_memory(model)
    call: Callable = torch.compile(model, backend="aot_eager") if compiled else model
    found = train(call, optimizer_of(model), rows, carry=carry)
    return over_bounds(found, alone(single, carry=carry), rows, model, single, "float64")


def fsdp_one_group(rank: int, ranks: int) -> float:
    """A learned memory in the group of its model, which is float32 throughout."""
    mesh, rows = init_device_mesh("cpu", (ranks,)), dealt(rank, ranks)
    single, model = Model(learn_memory=True), fully_shard(Model(learn_memory=True), mesh=mesh)
    found = train(model, optimizer_of(model), rows)
    with pytest.raises(RuntimeError, match="begin with a call without a state"):
        model.memory.init_state(2)
    with pytest.raises(ValueError, match="layer must hold whole tensors"):
        fwpkm.save(Path(FOLDER) / "shards.safetensors", model.memory)
    return over_bounds(found, alone(single), rows, model, single, "float64")


def fsdp_bf16(rank: int, ranks: int, **options: Any) -> float:
    """Weights rounded for each call, tables and states never: what one process with rounded weights gives."""
    model = sharded(Model(dtype=torch.float32, **options), ROUNDS)
    rounded = Model(dtype=torch.float32, **options).to(torch.bfloat16)
    rows, worst = dealt(rank, ranks), []
    words, there = TEXT[rows, :PIECE], THERE[rows, :PIECE]
    loss_of(model(words, None, there)[0], TEXT[rows, 1 : PIECE + 1], there).backward()
    parts = [copy.deepcopy(rounded) for _ in range(ranks)]
    for r, part in enumerate(parts):
        its = dealt(r, ranks)
        logits = part(TEXT[its, :PIECE], None, THERE[its, :PIECE])[0]
        loss_of(logits, TEXT[its, 1 : PIECE + 1], THERE[its, :PIECE]).backward()
    for p, *of_ranks in zip(model.parameters(), *(part.parameters() for part in parts), strict=True):
        wanted = sum(q.grad.float() for q in of_ranks) / ranks
        worst.append(relative_error(whole(p.grad), wanted) / BOUNDS["float32"].gradient)
    with torch.no_grad():  # and token by token, the state going in and out of the sharded model
        state = expected = None
        for t in range(2 * PIECE):
            y, state = model(TEXT[rows, t : t + 1], state, THERE[rows, t : t + 1])
            z, expected = rounded(TEXT[rows, t : t + 1], expected, THERE[rows, t : t + 1])
            assert y.dtype == torch.bfloat16, y.dtype
            worst.append(relative_error(y.float(), z.float()) / BOUNDS["bfloat16"].forward)
        for received, wanted in zip(state.memory, expected.memory):
            assert received.dtype == torch.float32, received.dtype
            worst.append(relative_error(received, wanted) / BOUNDS["float32"].forward)
    return max(worst)


def fsdp_meta(rank: int, ranks: int) -> float:
    """Made on the meta device, sharded, then filled module by module; ranks draw other tables until they share them."""
    with torch.device("meta"):
        model = Model()
    sharded(model).to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on random numbers of shards
        torch.manual_seed(rank)
        for module in model.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
    share_initial_memory(model)
    single = Model()
    with torch.no_grad():
        for own, drawn in zip(single.parameters(), model.parameters(), strict=True):
            own.copy_(whole(drawn))
        for own, drawn in zip(single.buffers(), model.buffers(), strict=True):
            own.copy_(drawn)
            mean = drawn.clone()
            dist.all_reduce(mean, dist.ReduceOp.MAX)
            assert torch.equal(mean, drawn)
    assert float(single.memory.memory.values.std()) > 0.1
    found, rows = train(model, optimizer_of(model), dealt(rank, ranks)), dealt(rank, ranks)
    return over_bounds(found, alone(single), rows, model, single, "float64")


def checkpoints(rank: int, ranks: int, savers: int, loaders: int) -> float:
    """Two steps on some ranks, the third on others from their checkpoint: what one process gives without a break."""
    folder, groups = (
        Path(FOLDER) / f"{savers}-to-{loaders}",
        {n: dist.new_group(list(range(n))) for n in (savers, loaders)},
    )

    def begin(number: int, seed: int) -> tuple[Model, Callable, Any, Callable]:
        """FSDP2 on all ranks, DDP on fewer; and what a checkpoint holds."""
        if number == ranks:
            model = call = sharded(Model(seed, learn_memory=True))
        else:
            model = Model(seed, learn_memory=True)
            call = DistributedDataParallel(model, process_group=groups[number], find_unused_parameters=True)
        optimizer = optimizer_of(model)

        def items(state: Any) -> dict[str, Any]:
            weights, moments = get_state_dict(model, optimizer)
            states = ShardedStates({"memory": state}, model.memory.config, groups[number])
            return {"weights": weights, "moments": moments, "states": states}

        return model, call, optimizer, items

    if rank < savers:
        model, call, optimizer, items = begin(savers, 0)
        state = train(call, optimizer, dealt(rank, savers), steps=range(STEPS - 1))["state"]
        dcp.save(items(state), checkpoint_id=folder, process_group=groups[savers])
    dist.barrier()
    if rank >= loaders:
        return 0.0
    model, call, optimizer, items = begin(loaders, 7)
    cfg, rows = model.memory.config, dealt(rank, loaders)
    tables = Memory(*(x.double() for x in init_memory(cfg)))
    state = init_state(cfg, tables, rows.stop - rows.start)
    loaded = items(state)
    dcp.load(loaded, checkpoint_id=folder, process_group=groups[loaders])
    set_state_dict(model, optimizer, model_state_dict=loaded["weights"], optim_state_dict=loaded["moments"])
    found = train(call, optimizer, rows, state, steps=[STEPS - 1])
    single = Model(learn_memory=True)
    expected = alone(single)
    expected["outputs"] = expected["outputs"][:, -PIECE:]
    return over_bounds(found, expected, rows, model, single, "float64")


def killed(rank: int, ranks: int) -> float:
    """The last rank is killed when it has written half a checkpoint: the one before is the newest that is whole."""
    model = Model()
    _, state = model(TEXT[dealt(rank, ranks)])
    items = {"weights": model.state_dict(), "states": ShardedStates({"memory": detach(state)}, model.memory.config)}
    dcp.save(items, checkpoint_id=Path(FOLDER) / "killed" / "step-1")
    sync = os.fsync
    if rank == ranks - 1:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    try:
        dcp.save(items, checkpoint_id=Path(FOLDER) / "killed" / "step-2")
    except (dcp.api.CheckpointException, RuntimeError) as error:
        print(f"rank {rank} noticed: {type(error).__name__}", file=sys.stderr)
    else:
        raise AssertionError("saved without the rank that was killed")
    finally:
        os.fsync = sync
    assert (Path(FOLDER) / "killed" / "step-2").exists()
    (newest,) = (path.parent for path in (Path(FOLDER) / "killed").glob("step-*/.metadata"))
    assert newest.name == "step-1", newest
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/alone-{rank}", rank=0, world_size=1)
    again, restored = Model(seed=5), Model(seed=6).memory.init_state(ROWS)
    items = {"weights": again.state_dict(), "states": ShardedStates({"memory": restored}, model.memory.config)}
    dcp.load(items, checkpoint_id=newest)
    rows = dealt(rank, ranks)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert all(torch.equal(x[rows], y) for x, y in zip(restored.memory, state.memory))
    assert all(torch.equal(x[rows], y) for x, y in zip(restored.pending, state.pending))
    assert torch.equal(restored.position[rows], state.position)
    return 0.0


def trained(device: str = "cpu") -> dict[str, Tensor]:
    """The language model of examples/ after three steps, its memories going on; alone, or on all ranks under DDP."""
    model = {"width": 16, "layers": 2, "heads": 2, "window": 8, "hidden": 16, "memories": [1]}
    tables = {
        "model": {**model, "memory": {"num_subkeys": 16, "top_k": 2, "chunk_size": 16}},
        "training": {"steps": 3, "batch": 4, "length": 32, "warmup": 2, "facts": 0.0, "learning_rate": 0.01},
    }
    trainer, rng = Trainer(Experiment.of(tables, "test"), torch.device(device)), np.random.default_rng(0)
    for _ in range(3):
        tokens = rng.integers(97, 123, (4, 33)).astype(np.uint8)
        trainer.take(Batch(tokens, np.zeros((4, 32), bool), [False, False, True, False]))
    (state,) = trainer.reading.memories
    return {"table": state.memory.values, **{name: p.detach() for name, p in trainer.model.named_parameters()}}


def language_model(rank: int, ranks: int) -> float:
    """Its Trainer takes the rows of this rank, and trains what one process trains."""
    found, rows = trained(), slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    expected = {**ALONE, "table": ALONE["table"][rows]}
    return max(relative_error(found[name], x) for name, x in expected.items()) / BOUNDS["float32"].gradient


CASES: dict[str, Callable[[int, int], float]] = {
    "ddp": ddp,
    "ddp, learned": lambda *of: ddp(*of, learn=True, carry=False),
    "ddp, learned, carried": lambda *of: ddp(*of, learn=True),
    "ddp, no_sync": ddp_no_sync,
    "ddp, traffic": ddp_traffic,
    "fsdp": fsdp,
    "fsdp, learned": lambda *of: fsdp(*of, learn=True, carry=False),
    "fsdp, learned, carried": lambda *of: fsdp(*of, learn=True),
    "fsdp, one group": fsdp_one_group,
    "fsdp, bfloat16": fsdp_bf16,
    "fsdp, bfloat16, learned": lambda *of: fsdp_bf16(*of, learn_memory=True),
    "fsdp, meta": fsdp_meta,
    "to fewer": lambda rank, ranks: checkpoints(rank, ranks, ranks, ranks // 2),
    "to more": lambda rank, ranks: checkpoints(rank, ranks, ranks // 2, ranks),
    "language model": language_model,
    "bad input": lambda *of: bad_input(*of, make=Model, settings=SETTINGS, folder=Path(FOLDER)),
    "columns": columns,
    "ddp, compiled": lambda *of: ddp(*of, compiled=True),
    "fsdp, compiled": lambda *of: fsdp(*of, compiled=True, learn=True, carry=False),
    "killed": killed,
}
ONLY_TWO = ("killed", "ddp, compiled", "fsdp, compiled", "fsdp, one group", "ddp, no_sync")


def run(rank: int, ranks: int, store: str, cases: list[str]) -> None:
    """All cases as one rank; the first prints what they gave."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    for name in cases:
        found: Any
        try:
            found = CASES[name](rank, ranks)
        except Exception:
            found = f"rank {rank}: {traceback.format_exc()}"
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if rank == 0:
            texts = [x for x in everyone if isinstance(x, str)]
            print(json.dumps([f"{name}, {ranks} ranks", texts[0] if texts else max(everyone)]), flush=True)
    dist.destroy_process_group()


def start(ranks: int, cases: list[str]) -> None:
    fork = multiprocessing.get_context("fork")
    store = Path(FOLDER) / f"store-{ranks}"
    processes = [fork.Process(target=run, args=(rank, ranks, store, cases)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    ALONE = trained()
    chosen = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as FOLDER:
        start(2, chosen)
        start(4, [name for name in chosen if name not in ONLY_TWO])
