"""Cases of torch_columns.py: what is refused, on every rank, and files of tables in columns."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from column_ranks import FOLDER, RANK, RANKS, SMALL, case, draw, layer_of, leaves, mesh, worst
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fwpkm
from fwpkm import FwPKMConfig
from fwpkm.backends import torch as be
from fwpkm.backends.torch import FwPKM, columns
from fwpkm.containers import State

# Refusals: what was raised, on this rank


@contextlib.contextmanager
def refused(found: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    else:
        found.append("nothing was raised")


def call(values: Any = None, query: Any = None, value: Any = None, **options: Any) -> Any:
    cfg = FwPKMConfig(**SMALL)
    memory = columns.shard(be.init_memory(cfg), mesh())
    memory = memory if values is None else memory._replace(values=values)
    query, value = (draw(2, 5, 8, dtype=torch.float32) if x is None else x for x in (query, value))
    return be.apply(cfg, be.init_state(cfg, memory, 2), query, value, **options)


def with_nan(x: Any) -> Any:
    x[1, 3, 2] = torch.nan if RANK else 0
    return x


def pending_of_one(name: str, change: Callable[[Any], Any]) -> Any:
    """A call that goes on from a state of which the ranks but the first hold other pending tokens."""
    cfg, state = half_read(lambda x: columns.shard(x, mesh()))
    if RANK:
        state = state._replace(**{name: change(getattr(state, name))})
    return be.apply(cfg, state, draw(2, 5, 8, dtype=torch.float32), draw(2, 5, 8, dtype=torch.float32))


def decode_of_one() -> Any:
    layer = columns.shard(layer_of(seed=0), mesh())
    state = be.start_decoding(be.detach(layer(draw(2, 5, 8))[1]))
    with torch.no_grad():
        layer.output_proj.bias.add_(RANK)
    return layer.decode(draw(2, 1, 8), state)


def layer_of_one(name: str, factor: float) -> Any:
    """A call of a layer of which the ranks but the first hold another weight."""
    layer = columns.shard(layer_of(), mesh())
    with torch.no_grad():
        layer.get_parameter(name).mul_(factor if RANK else 1)
    return layer(draw(2, 5, 8))


def rows_of_layer() -> Any:
    layer = layer_of()
    layer.memory.values = nn.Parameter(distribute_tensor(layer.memory.values.detach(), mesh(), [Shard(0)]))
    return layer(draw(2, 5, 8))


@case
def refusals() -> list[str]:
    """Each on every rank, and the ranks go on together."""
    found: list[str] = []
    cfg = FwPKMConfig(**SMALL)
    memory, wide = be.init_memory(cfg), FwPKMConfig(**SMALL | {"key_dim": 16, "value_dim": 16})
    dealt = columns.shard(memory, mesh())
    state = be.init_state(cfg, dealt, 1)
    odd, used = be.init_memory(FwPKMConfig(**SMALL | {"value_dim": 7})), FwPKMConfig(**SMALL, usage_weight=0.5)
    by_hand = state._replace(uses=torch.zeros(1, used.num_slots))
    attempts: dict[str, Callable[[], Any]] = {
        "rows": lambda: call(distribute_tensor(memory.values, mesh(), [Shard(1)])),
        "rows of a layer": lambda: rows_of_layer(),
        "replicated": lambda: call(distribute_tensor(memory.values, mesh(), [Replicate()])),
        "odd": lambda: columns.shard(odd, mesh()),
        "odd, by torch": lambda: be.lookup(
            FwPKMConfig(**SMALL | {"value_dim": 7}),
            odd._replace(values=distribute_tensor(odd.values, mesh(), [Shard(2)])),
            draw(1, 2, 8, dtype=torch.float32),
        ),
        "few columns for kernels": lambda: be.lookup(
            wide, columns.shard(be.init_memory(wide), mesh()), draw(1, 2, 16).float(), implementation="triton"
        ),
        "mesh": lambda: columns.shard(memory, init_device_mesh("cpu", (1, RANKS))),
        "other tokens": lambda: call(value=draw(2, 5, 8, seed=RANK, dtype=torch.float32)),
        "wider tokens": lambda: call(value=draw(2, 5, 8, dtype=torch.float32) * (1 + RANK)),
        "no number on one": lambda: call(value=with_nan(draw(2, 5, 8, dtype=torch.float32))),
        "other pending tokens": lambda: pending_of_one("pending_value", lambda x: x.roll(1, 0)),
        "wider pending tokens": lambda: pending_of_one("pending_query", lambda x: x * 3),
        "other pending mask": lambda: pending_of_one("pending_mask", torch.zeros_like),
        "wider weights": lambda: layer_of_one("value_proj.weight", 3),
        "other norm": lambda: layer_of_one("output_norm.weight", 3),
        "other readout": lambda: layer_of_one("output_proj.weight", -1),
        "other readout in decode": lambda: decode_of_one(),
        "other shape": lambda: call(query=draw(2, 5 + RANK, 8), value=draw(2, 5 + RANK, 8)),
        "other mask": lambda: call(mask=draw(2, 5, seed=RANK) > 0),
        "bad on one rank": lambda: call(query=draw(2, 5, 8 if RANK else 9, dtype=torch.float32)),
        "bad x on one rank": lambda: columns.shard(layer_of(), mesh())(draw(2, 5, 8 if RANK else 9)),
        "other weights": lambda: columns.shard(layer_of(seed=RANK), mesh())(draw(2, 5, 8)),
        "whole meets columns": lambda: be.put(cfg, state, [0], be.init_state(cfg, memory, 1)),
        "whole file": lambda: fwpkm.save_state(FOLDER / f"whole-{RANK}", state, cfg),
        "pack": lambda: be.pack(cfg, state, dealt),
        "to device": lambda: be.to_device(state, "cpu"),
        "twice": lambda: columns.shard(state, mesh()),
        "a state with uses": lambda: columns.shard(be.init_state(used, memory, 1), mesh()),
        "uses from columns": lambda: be.init_state(used, dealt, 1),
        "uses by hand": lambda: be.apply(used, by_hand, draw(1, 5, 8).float(), draw(1, 5, 8).float()),
        "uses by hand in a flush": lambda: be.flush(used, by_hand),
        "uses by hand in a file": lambda: columns.save_state(FOLDER, by_hand, used),
        "a file of uses": lambda: columns.load_state(FOLDER, used, mesh()),
        "a layer that weighs them": lambda: columns.shard(be.FwPKM(8, used), mesh()),
        "gather": lambda: columns.gather(memory),
        "nothing": lambda: columns.shard(nn.Linear(2, 2), mesh()),
        "mesh of others": lambda: columns.shard(memory, DeviceMesh("cpu", [1 - min(RANK, 1)], _init_backend=False)),
    }
    for name, attempt in attempts.items():
        with refused(found):
            attempt()
        found[-1] = f"{name}: {found[-1]}"
        call()  # which would hang, were the ranks apart
    return found


@case
def late() -> str:
    """The last rank does not make the call; the others hear of it when the group's timeout has passed."""
    done = FOLDER / "heard"
    if RANK == RANKS - 1:
        while not done.exists():
            time.sleep(0.1)
        return "absent"
    found: list[str] = []
    with refused(found):
        call()
    done.touch()
    return found[0]


# Files


def half_read(deal: Callable[[Any], Any]) -> tuple[FwPKMConfig, State]:
    cfg = FwPKMConfig(**SMALL)
    state = be.init_state(cfg, deal(be.init_memory(cfg)), 2)
    tokens = draw(2, 7, 8, dtype=torch.float32)
    return cfg, be.apply(cfg, state, tokens, tokens)[1]


@case
def save() -> float:
    """Into folders that ``load`` reads on another number of ranks."""
    from torch.distributed import checkpoint

    cfg, state = half_read(lambda x: columns.shard(x, mesh()))
    layer = columns.shard(layer_of(), mesh())
    for name in ("state", "layer"):
        (FOLDER / name).mkdir(exist_ok=True)
    for _ in range(2):  # the second replaces the first
        columns.save_state(FOLDER / "state", state, cfg)
        columns.save(FOLDER / "layer", layer)
    assert len(list((FOLDER / "state").iterdir())) == RANKS + 1
    checkpoint.save({"layer": layer.state_dict(), "state": state.arrays()}, checkpoint_id=FOLDER / f"dcp-{RANKS}")
    if RANK == 0:
        columns.join(FOLDER / "state", FOLDER / "state.safetensors")
        columns.join(FOLDER / "layer", FOLDER / "layer.safetensors")
    return 0.0


@case
def load() -> float:
    """All that ``save`` wrote, bit for bit."""
    from torch.distributed import checkpoint

    cfg, expected = half_read(lambda x: x)
    found = columns.load_state(FOLDER / "state", cfg, mesh())
    assert found.memory.values.to_local().shape[-1] == 8 // RANKS
    joined = fwpkm.load_state(FOLDER / "state.safetensors", cfg, "torch")
    errors = [worst(leaves(x), leaves(expected)) for x in (found, joined, columns.gather(found))]
    for source in ("layer", "layer.safetensors", "dcp"):
        layer = columns.shard(FwPKM(8, **SMALL, learn_memory=True, dtype=torch.float64), mesh())
        if source == "dcp":
            fresh = columns.shard(be.init_state(cfg, be.init_memory(cfg), 2), mesh())
            held = {"layer": layer.state_dict(), "state": fresh.arrays()}
            checkpoint.load(held, checkpoint_id=FOLDER / f"dcp-{6 - RANKS}")  # two load what four saved, and four that
            errors.append(worst(leaves(fresh), leaves(expected)))
        else:
            (columns.load if source == "layer" else fwpkm.load)(FOLDER / source, layer)
        errors.append(worst(leaves(list(layer.state_dict().values())), list(layer_of().state_dict().values())))
    return max(errors)


@case
def bad_files() -> list[str]:
    """Refused on every rank; what was there stays."""
    found: list[str] = []
    cfg, state = half_read(lambda x: columns.shard(x, mesh()))
    folder, other = FOLDER / "bad", FwPKMConfig(**SMALL | {"temperature": 2.0})
    folder.mkdir(exist_ok=True)
    columns.save_state(folder, state, cfg)
    layer = columns.shard(layer_of(), mesh())
    wide, scaled = FOLDER / "wide", columns.shard(layer_of(), mesh())
    wide.mkdir(exist_ok=True)
    columns.save(wide, layer)
    scaled.query_proj.forward = lambda x: 2 * x  # type: ignore[method-assign]
    before = [x.detach().clone() for x in leaves(list(layer.state_dict().values()))]
    for attempt in (
        lambda: columns.load_state(folder, other, mesh()),
        lambda: columns.load(folder, layer),
        lambda: columns.load_state(FOLDER / "nowhere", cfg, mesh()),
        lambda: columns.save_state(folder / "nowhere", state, cfg),
        lambda: columns.save_state(folder if RANK else folder / "nowhere", state, cfg),
        lambda: columns.save_state(folder, columns.gather(state), cfg),
        lambda: columns.save_state(folder if RANK else None, state, cfg),  # type: ignore[arg-type]
        lambda: columns.load_state(folder, cfg if RANK else None, mesh()),  # type: ignore[arg-type]
        lambda: columns.load_state(folder, cfg if RANK else FwPKMConfig(**SMALL | {"value_dim": 7}), mesh()),
        lambda: columns.save_state(folder if RANK else wide, state, cfg),  # as on disks that ranks do not share
        lambda: columns.save(folder, scaled),
        lambda: columns.load(wide, columns.shard(FwPKM(8, **SMALL, learn_memory=True), mesh())),
    ):
        with refused(found):
            attempt()
    assert worst(leaves(columns.load_state(folder, cfg, mesh())), leaves(state)) == 0
    distributed.barrier()
    if RANK == 0:
        (save,) = re.findall(r'"save": "(\w+)"', (folder / "columns.json").read_text())
        (part,) = folder.glob(f"columns-{save}-1-of-*")
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    distributed.barrier()
    with refused(found):
        columns.load_state(folder, cfg, mesh())
    distributed.barrier()
    if RANK == 0:
        (folder / "columns.json").write_text("{}")
    distributed.barrier()
    with refused(found):
        columns.load_state(folder, cfg, mesh())
    assert worst(leaves(list(layer.state_dict().values())), before) == 0
    return found


@case
def killed() -> str:
    """The last rank is killed while it writes: the older save stays whole."""
    cfg, state = half_read(lambda x: columns.shard(x, mesh()))
    folder = FOLDER / "state"
    if RANK == RANKS - 1:
        os.replace = lambda *_: os._exit(0)  # as ``kill -9`` between writing and naming
    found: list[str] = []
    with refused(found):
        columns.save_state(folder, be.flush(cfg, state)[0], cfg)
    return found[0]
