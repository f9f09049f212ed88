"""What a layer is made of: projections, norms and the initial memory (SPEC.md §7), and what tools may do to them."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fwpkm import rules
from fwpkm.backends.torch.column_parallel import by_columns, fill_normal
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, memory_specs


class Projection(nn.Linear):
    """W·x + b whose weights are drawn as SPEC.md §7 says, by whatever calls ``reset_parameters`` of each module."""

    def __init__(self, width: int, size: int, *, std: float = 0.02, **factory: Any):
        """``[B, T, width]`` to ``[B, T, size]``; ``std`` of the weights."""
        self.std = std  # nn.Linear draws while it is made
        super().__init__(width, size, **factory)

    def reset_parameters(self) -> None:
        """Draw weights (normal; biases 0) from torch's generator."""
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class InitialMemory(nn.Module):
    """The tables that a new sequence starts from; float32 or float64, whatever the rest of a model is cast to.

    Attributes:
        keys: ``[H, 2, S, Dk/2]``, uniform in ±1/√Dk.
        values: ``[N, Dv]``, normal with std 1/√Dv.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, config: FwPKMConfig, *, learn: bool, device: Any = None, dtype: Any = None):
        """Parameters if ``learn``, else buffers."""
        super().__init__()
        wide = (torch.get_default_dtype() if dtype is None else dtype) == torch.float64
        for name, spec in memory_specs(config, None)._asdict().items():
            table = torch.empty(spec.shape[1:], device=device, dtype=torch.float64 if wide else torch.float32)
            if learn:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        self._bounds = config.key_dim**-0.5, config.value_dim**-0.5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new tables from torch's generator."""
        with torch.no_grad():
            self.keys.uniform_(-self._bounds[0], self._bounds[0])
            fill_normal(self.values, self._bounds[1])

    def forward(self) -> Memory[Tensor]:
        """The tables with M = 1.

        Raises:
            RuntimeError: the tables are trained and sharded, and this is outside of what gathers them.
        """
        if any(placement.is_shard() for placement in getattr(self.keys, "placements", ())):
            raise RuntimeError(
                "the initial memory is sharded by FSDP2, which gathers it only while the module that it sharded runs: "
                "fully_shard(layer.memory) as a group of its own, or begin with a call without a state. "
                f"Received: keys with placements {self.keys.placements}"  # type: ignore[attr-defined]
            )
        memory = Memory(*map(by_columns(lambda x: x[None]), (self.keys, self.values)))
        # FSDP2 frees what it gathered as soon as this returns.
        return Memory(*map(torch.clone, memory)) if hasattr(self, "reshard") else memory

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InitialMemory":
        def keep_precision(table: Tensor) -> Tensor:
            moved = fn(table)
            if moved.is_floating_point() and moved.element_size() < 4:
                return table.to(moved.device, torch.float32)
            return moved

        return super()._apply(keep_precision, recurse)

    def __delattr__(self, name: str) -> None:
        """Refuse torch's parametrizations: these take a table out, and only then find that they cannot name it."""
        if sys._getframe(1).f_code is parametrize.register_parametrization.__code__:
            raise ValueError(
                f"memory.{name} takes no parametrization: torch keeps the names keys and values for itself. One with a "
                "right_inverse, such as orthogonal, has changed its numbers already: load them again. Change the table "
                "itself, under torch.no_grad(), or parametrize a projection or a norm"
            )
        super().__delattr__(name)


def dtype_of(layer: nn.Module, x: Tensor) -> torch.dtype:
    """Of the first part that has a weight: a norm may be made without, or stand for nothing; of x where none has."""
    for part in layer.children():
        weight = getattr(part, "weight", None)
        if weight is not None and weight.is_floating_point():
            return weight.dtype
    return x.dtype


def check_with_weights(x: Tensor, part: nn.Module) -> None:
    """Raise a ValueError unless x lies where a part's weight does, which no hook brings when the part is called."""
    weight = getattr(part, "weight", None)
    if weight is None or weight.device == x.device:
        return
    if not (part._forward_pre_hooks or "forward" in vars(part)):  # as of FSDP2, and of accelerate
        raise ValueError(
            f"x must be on the layer's device, {weight.device}: x.to({str(weight.device)!r}), or layer.to(x.device). "
            f"Received: x on {x.device}"
        )


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """What a part computes with, under its canonical name (SPEC.md §8): of a parametrized part the effective weight.

    Raises:
        ValueError: the part was replaced or wrapped, so that a weight alone does not say what it computes; or it is on
            the meta device.
    """
    part, field = _part(layer, name)
    if not parametrize.is_parametrized(part, field) and field not in {*part._parameters, *part._buffers}:
        raise ValueError(
            f"{name} is computed by a hook of the {type(part).__name__}, such as torch.nn.utils.weight_norm's or "
            "prune's: remove it first (remove_weight_norm, prune.remove), or keep the layer's state_dict"
        )
    weight: Tensor | None = getattr(part, field)
    if weight is None:
        raise ValueError(
            f"{name} must be there, since a file holds it: make the {type(part).__name__} with it, or keep the layer's "
            "state_dict. Received: a part that was made without it"
        )
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, where it holds no numbers: call layer.to_empty(device=...)")
    return weight


def plain_weight_of(layer: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a part that a file can fill.

    Raises:
        ValueError: as of ``weight_of``, and where the part is parametrized.
    """
    part, field = _part(layer, name)
    if parametrize.is_parametrized(part, field):
        raise ValueError(
            f"{name} has a parametrization, through which a file cannot be filled in: load first and parametrize then, "
            "or call torch.nn.utils.parametrize.remove_parametrizations"
        )
    return weight_of(layer, name)


def check_tied(own: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> None:
    """Raise where one weight has two names, for which a file holds different tensors: it can hold one of them."""
    first: dict[Any, str] = {}
    for name, x in own.items():
        # Of a table in shards the object itself: where its numbers lie is not told.
        place = id(x) if hasattr(x, "placements") else (x.device, x.data_ptr())
        other = first.setdefault(place, name)
        if other != name and not np.array_equal(tensors[other], tensors[name], equal_nan=True):
            raise ValueError(
                f"{other} and {name} are one weight here, and two in the file: load first and tie then. "
                "Received: a file in which they differ"
            )


def _part(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a canonical name belongs to, and the name of its weight there."""
    owner, _, field = name.rpartition(".")
    part = getattr(layer, owner)
    kinds: dict[str, Any] = {"norm": nn.RMSNorm, "proj": nn.Linear, "memory": InitialMemory}
    kind = kinds[owner.rpartition("_")[2]]
    # Not by the class: parametrizations and sharding put classes of their own over it, whose forward is the same.
    if getattr(type(part), "forward", None) is not kind.forward or "forward" in vars(part):
        raise ValueError(
            f"{owner} must be a {kind.__name__}, whose weights alone say what it computes: merge or remove adapters "
            f"and quantization first (peft: merge_and_unload), or keep the layer's state_dict. Received: a "
            f"{type(part).__name__}{' whose forward was replaced' * ('forward' in vars(part))}"
        )
    if kind is nn.RMSNorm and part.eps != rules.RMS_EPS:
        raise ValueError(
            f"{owner}.eps must be {rules.RMS_EPS}, as files do not hold it: set it back, or keep the layer's "
            f"state_dict. Received: {part.eps}"
        )
    return part, field
