"""Data parallel in PyTorch: initial memories that all ranks share, and checkpoints of states that any number loads.

DDP and FSDP2 take the layer as it is (docs/distributed.md). Here is what they do not do: DDP would send the tables of
every layer in every forward pass, and a rank's states are unknown to torch.distributed.checkpoint. Both functions are
collective: every rank of the group calls them, and what is wrong on one is raised on all.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fwpkm import validation
from fwpkm.backends.torch import FwPKM
from fwpkm.backends.torch.windows import SELF
from fwpkm.config import FwPKMConfig
from fwpkm.containers import State

__all__ = ["ShardedStates", "share_initial_memory"]


def share_initial_memory(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the initial tables of the group's first rank, once, and keep DDP from sending them ever again.

    Call it after weights are drawn or loaded, before ``DistributedDataParallel(model)``; under FSDP2 at any time before
    the first step. Where each rank draws tables for itself, after ``to_empty`` on the meta device for example, they
    would differ, and rows would be read from other memories without a word. Tables of ``learn_memory=True`` are
    parameters, which DDP and FSDP2 look after, so they stay as they are.

    Args:
        model: holds ``fwpkm.backends.torch.FwPKM`` layers, the same on every rank; for DDP the very module that it
            wraps, compiled or not.
        group: the ranks; None for all. Where tables lie in columns, those that hold the same columns.

    Raises:
        ValueError: on every rank, if one has other layers, other tables, or tables on the meta device; or if ``model``
            is wrapped by DDP already. On the rank that makes the call, if ``group`` is not its own.
    """
    _check_member(group)
    # By name: ranks may have put the same layers into the model in another order.
    layers = dict(sorted((name, layer) for name, layer in model.named_modules() if isinstance(layer, FwPKM)))
    specs = {name: _form_of_layer(layer) for name, layer in layers.items()}
    everyone = _agreed(group, _problem_of(model, layers, group), specs)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            name = next(name for name in {**other, **everyone[0]} if other.get(name) != everyone[0].get(name))
            raise ValueError(
                f"model must hold the same FwPKM layers on every rank. Received: {name or 'the model'} is "
                f"{everyone[0].get(name, 'no layer')} on rank 0, {other.get(name, 'no layer')} on rank {rank}"
            )
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in layers.items():
        for field, table in layer.memory.named_buffers():
            dist.broadcast(_own(table), group=group, group_src=0)
            ignored.add(f"{name}.memory.{field}" if name else f"memory.{field}")
    # What DDP asks a model before it wraps it; its own switch would also leave out the buffers of other modules.
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def _form_of_layer(layer: FwPKM) -> str:
    """What of a layer must be equal on all ranks, the forms of what is sent too: bytes are read as the receiver's."""
    tables = {name: (tuple(own.shape), str(own.dtype)) for name, x in layer.memory.named_buffers() for own in [_own(x)]}
    return f"{layer.spec()}, learn_memory={layer.learn_memory}, tables {tables}"


def _own(table: Tensor) -> Tensor:
    """Of a table in columns, this rank's."""
    return table.to_local() if hasattr(table, "to_local") else table


def _problem_of(model: nn.Module, layers: Mapping[str, FwPKM], group: dist.ProcessGroup | None) -> str | None:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        return "model must not be wrapped by DistributedDataParallel yet. Received: one that is"
    unfilled = [name for name, layer in layers.items() if layer.memory.keys.is_meta]
    if unfilled:
        return (
            "model must hold memory: call model.to_empty(device=...), then reset_parameters() of each module. "
            f"Received: {', '.join(name or 'the model' for name in unfilled)} on the meta device"
        )
    ranks = set(dist.get_process_group_ranks(group))
    for name, layer in layers.items():
        # Trained tables are in shards under FSDP2, which looks after them.
        mesh = None if layer.learn_memory else getattr(layer.memory.values, "device_mesh", None)
        if mesh is not None and len(together := sorted(ranks & set(mesh.mesh.flatten().tolist()))) > 1:
            return (
                "group must be that of ranks which hold the same columns, such as mesh['rows'].get_group(). "
                f"Received: one with ranks {together}, which hold other columns of {name or 'the model'}"
            )
    return None


class ShardedStates:
    """The states of all ranks as one item of a ``torch.distributed.checkpoint``: their rows, one rank after the other.

    ``dcp.save({"states": ShardedStates(states, cfg)}, checkpoint_id=folder)`` saves what each rank holds, and
    ``dcp.load`` of the same item overwrites the states that it was made of with those of the checkpoint, on any number
    of ranks. The rows are dealt as ``torch.chunk`` deals them: rank r has the r-th part of ``rows.chunk(ranks)``.

    Args:
        states: by name; each rank has all names, and its own rows. To load into, they are new ones, of
            ``layer.init_state``.
        cfg: the configuration of all, or of each by name.
        group: the ranks; None for all.

    Raises:
        ValueError: on every rank, if a state does not fit its configuration, ranks hold other names, configurations or
            dtypes, or rows that are not dealt as ``torch.chunk`` deals them; or with ``memory_scope="batch"``, where
            each rank has a memory of its own, which is no row that another rank could take. On the rank that makes the
            call, if ``group`` is not its own.
    """

    def __init__(
        self,
        states: Mapping[str, State],
        cfg: FwPKMConfig | Mapping[str, FwPKMConfig],
        group: dist.ProcessGroup | None = None,
    ):
        """Look at the states of all ranks."""
        from torch.distributed.device_mesh import DeviceMesh  # seconds that sharing tables need not wait

        _check_member(group)
        cfgs = dict.fromkeys(states, cfg) if isinstance(cfg, FwPKMConfig) and isinstance(states, Mapping) else cfg
        problem = _problem_of_states(states, cfgs)
        forms = None if problem else {name: _form(state, cfgs[name]) for name, state in states.items()}
        everyone = _agreed(group, problem, forms)
        self.states = dict(states)
        self._rows = _dealt(everyone)
        self._configs = {name: cfgs[name].to_json() for name in self.states}
        self._dtypes = {name: str(state.memory.values.dtype) for name, state in self.states.items()}
        self._device = next(iter(self.states.values())).memory.values.device
        whole = dist.group.WORLD if group is None else group
        assert whole is not None
        self._mesh = DeviceMesh.from_group(whole, self._device.type)

    def state_dict(self) -> dict[str, Any]:
        """Configurations and dtypes, and of each state its arrays by field name, as DTensors ``[all rows, ...]``."""
        tensors = {name: self._sharded(x) for name, x in self._local().items()}
        return {"configs": dict(self._configs), "dtypes": dict(self._dtypes), **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint brought.

        Raises:
            ValueError: it was saved of other configurations or dtypes; the states then hold that, and are of no use.
        """
        if state_dict["configs"] != self._configs:
            raise ValueError(
                f"cfg must be what the checkpoint was saved with, {state_dict['configs']}. Received: {self._configs}"
            )
        if state_dict["dtypes"] != self._dtypes:  # torch would have rounded without a word
            raise ValueError(
                f"states must have the dtypes that the checkpoint was saved with, {state_dict['dtypes']}: load into "
                f"states of such tables. Received: {self._dtypes}"
            )
        for name, own in self._local().items():
            loaded = state_dict[name].to_local()
            if loaded.data_ptr() != own.data_ptr():  # a position on the CPU
                own.copy_(loaded)

    def _local(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, state in self.states.items():
            found |= {f"{name}.{field.removeprefix('memory.')}": x for field, x in state.arrays().items()}
        return found

    def _sharded(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((self._rows, *x.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.to(self._device), self._mesh, [Shard(0)], shape=shape, stride=stride)


def _problem_of_states(states: Any, cfgs: Any) -> str | None:
    for argument, given in (("states", states), ("cfg", cfgs)):
        if not isinstance(given, Mapping):
            return f"{argument} must be given by the names of the states. Received: {type(given).__name__}"
    if not states:
        return "states must hold one at least. Received: {}"
    if others := [name for name in states if not isinstance(name, str)]:
        return f"states must be given by names that are str, under which a checkpoint finds them. Received: {others}"
    if states.keys() != cfgs.keys():
        return f"cfg must name the states {sorted(states)}. Received: {sorted(cfgs)}"
    for name, state in states.items():
        try:
            validation.check_state(cfgs[name], state, SELF)
        except ValueError as error:
            return f"states[{name!r}]: {error}"
        if hasattr(states[name].memory.values, "to_local"):
            return (
                f"states[{name!r}] must hold whole tables. Received: tables in columns, of which each rank has a part"
            )
        if any(x.requires_grad for x in (*state.memory, *state.pending)):
            return f"states[{name!r}] must have no history: pass fwpkm.backends.torch.detach(state). Received: one with"
        if cfgs[name].memory_scope != "sequence":
            return (
                f"states[{name!r}] must have memory_scope='sequence': in 'batch' scope each rank has a memory of its "
                "own, which another number of ranks cannot share; save it per rank with fwpkm.save_state. "
                f"Received: memory_scope={cfgs[name].memory_scope!r}"
            )
    return None


def _form(state: State, cfg: FwPKMConfig) -> tuple[int, str, str]:
    """What the ranks compare: rows, dtype, configuration."""
    return len(state.position), str(state.memory.values.dtype), cfg.to_json()


def _dealt(everyone: list[dict[str, tuple[int, str, str]]]) -> int:
    """All rows; raises unless the ranks' states have one form, and are dealt as a DTensor is."""
    for rank, forms in enumerate(everyone):
        if {name: form[1:] for name, form in forms.items()} != {name: form[1:] for name, form in everyone[0].items()}:
            raise ValueError(
                f"states must have one set of names, dtypes and configurations on every rank. "
                f"Received: {everyone[0]} on rank 0, {forms} on rank {rank}"
            )
    (*dealt,) = ({form[0] for form in forms.values()} for forms in everyone)
    if any(len(rows) > 1 for rows in dealt):
        raise ValueError(f"states must have one number of rows on a rank. Received, by rank: {dealt}")
    rows = [number for (number,) in dealt]
    total = sum(rows)
    expected = [len(part) for part in torch.arange(total).chunk(len(rows))]
    if rows != expected:
        few = f" Those are {len(expected)} parts: take another number of ranks." * (len(expected) < len(rows))
        raise ValueError(
            f"states must hold {total} rows dealt as torch.arange({total}).chunk({len(rows)}) deals them, {expected}, "
            f"one part for each rank.{few} Received: {rows}"
        )
    return total


def _check_member(group: dist.ProcessGroup | None) -> None:
    if dist.get_rank(group) < 0:
        raise ValueError(
            "group must be one that this rank belongs to: only its ranks make the call. Received: a group without "
            f"rank {dist.get_rank()}"
        )


def _agreed(group: dist.ProcessGroup | None, problem: str | None, facts: Any) -> list[Any]:
    """The facts of all ranks; a problem of one is raised on all, so that none waits for another."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (problem, facts), group)
    problems = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(everyone) if said is not None]
    if problems:
        raise ValueError("; ".join(problems))
    return [found for _, found in everyone]
