"""A case of torch_ranks.py: what one rank does wrong is raised on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

from fwpkm.backends.torch import FwPKM, concat
from fwpkm.integrations.distributed import ShardedStates, share_initial_memory


def refused(attempt: Callable[[], Any], *words: str) -> None:
    """The attempt raises on this rank, and says these words."""
    with pytest.raises((ValueError, dcp.api.CheckpointException)) as caught:
        attempt()
    assert all(word in str(caught.value) for word in words), caught.value


def bad_input(rank: int, ranks: int, make: Callable[..., Any], settings: dict[str, Any], folder: Path) -> float:
    """What is wrong on one rank is said on every one; ``make`` gives models with a layer ``memory``."""
    model = make()
    cfg, state = model.memory.config, model.memory.init_state(2)
    other = make(learn_memory=rank == 1)
    refused(lambda: share_initial_memory(other), "memory is", "on rank 0", "learn_memory=True")
    other = make() if rank == 0 else nn.Linear(2, 2)
    refused(lambda: share_initial_memory(other), "memory is {'hidden_size'", "no layer on rank 1")
    unfilled = make().to("meta") if rank == 1 else make()
    refused(lambda: share_initial_memory(unfilled), "rank 1: model must hold memory", "to_empty")
    other = make(dtype=torch.float32 if rank == 1 else torch.float64)
    refused(lambda: share_initial_memory(other), "torch.float64", "on rank 0", "torch.float32", "on rank 1")
    first = dist.new_group([0])
    if rank > 0:
        refused(lambda: share_initial_memory(model, first), f"group without rank {rank}")
        refused(lambda: ShardedStates({"a": state}, cfg, first), f"group without rank {rank}")
    both = {name: make(seed=i + 2 * rank).memory for i, name in enumerate("ab")}
    share_initial_memory(nn.ModuleDict(dict(sorted(both.items(), reverse=rank == 1))))
    for i, name in enumerate("ab"):
        assert torch.equal(both[name].memory.values, make(seed=i).memory.memory.values), name
    share_initial_memory(model)
    wrapped = DistributedDataParallel(model)
    refused(lambda: share_initial_memory(wrapped), "must not be wrapped")

    def states(state: Any, cfg: Any = cfg, name: str = "memory") -> ShardedStates:
        return ShardedStates({name: state}, cfg)

    shared = FwPKM(model.memory.hidden_size, memory_scope="batch", **settings)
    refused(lambda: states(shared.init_state(2), shared.config), "rank 0: ", "in 'batch' scope each rank has a memory")
    few = ["Those are 3 parts: take another number of ranks"] if ranks == 4 else []  # nine rows
    uneven = model.memory.init_state(3 if rank == ranks - 1 else 2)
    refused(lambda: states(uneven), f"states must hold {2 * ranks + 1} rows", "Received: [2, ", *few)
    narrow = state._replace(memory=type(state.memory)(*(x.float() for x in state.memory)))
    refused(lambda: states(narrow if rank == 0 else state), "rank 0: states['memory']: ")
    refused(lambda: states(state, name=f"layer{min(rank, 1)}"), "one set of names", "on rank 1")
    refused(lambda: ShardedStates({}, cfg), "must hold one at least")
    refused(lambda: ShardedStates(state if rank else {"a": state}, cfg), "rank 1: states must be given by the names")
    refused(lambda: ShardedStates({"a": state}, None), "cfg must be given by the names", "NoneType")
    refused(lambda: ShardedStates({"a": state}, {"b": cfg}), "must name the states ['a']")
    refused(lambda: ShardedStates({0: state}, cfg), "by names that are str", "[0]")
    learned = FwPKM(model.memory.hidden_size, learn_memory=True, **settings).init_state(2)
    refused(lambda: states(learned), "detach(state)")

    folder = folder / f"bad-{ranks}"
    dcp.save({"states": states(state)}, checkpoint_id=folder)
    more = concat(cfg, [state, model.memory.init_state(1)])
    refused(lambda: dcp.load({"states": states(more)}, checkpoint_id=folder), "Size mismatch", "states.memory.keys")
    half = states(FwPKM(model.memory.hidden_size, **settings).init_state(2))
    refused(lambda: dcp.load({"states": half}, checkpoint_id=folder), "states must have the dtypes", "torch.float32")
    slower = FwPKM(model.memory.hidden_size, learning_rate=0.5, dtype=torch.float64, **settings)
    fresh = states(slower.init_state(2), slower.config)
    refused(lambda: dcp.load({"states": fresh}, checkpoint_id=folder), "cfg must be", '"learning_rate": 0.5')
    return 0.0
