"""The PyTorch module (SPEC.md §7)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from fwpkm import rules, validation
from fwpkm.backends.torch import decoding, ops, parts, ranks
from fwpkm.backends.torch.checks import check_device, check_dtype, check_present
from fwpkm.backends.torch.column_parallel import fill
from fwpkm.backends.torch.context import check_transforms
from fwpkm.backends.torch.parts import InitialMemory, Projection
from fwpkm.backends.torch.streams import is_legal
from fwpkm.backends.torch.tokens import finite_rows, maybe_any
from fwpkm.config import FwPKMConfig
from fwpkm.containers import LayerTrace, State, memory_specs
from fwpkm.files import layer_spec
from fwpkm.rules import mix, traced_gate
from fwpkm.tokens import Tokens


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """x / √(mean of x² + 1e-5) · weight (§7), by the module, whose call hooks and sharding must see."""
    return norm(x)


def zscore(z: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-6) over the last axis (§7), in float32 at least; a constant row gives 0 and gradient 0."""
    return rules.zscore(torch, z.float() if z.element_size() < 4 else z)


def _without_tail(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """The mask of a packed row, in which no token behind the last sequence is there."""
    validation.check_packed("x", x, cu_seqlens, Tensor)
    check_device(x, cu_seqlens=cu_seqlens)
    there = (torch.arange(x.shape[1], device=cu_seqlens.device) < cu_seqlens[-1:])[None]
    if torch.compiler.is_compiling():  # where nobody can raise, tokens show what is not legal
        there = there | ~is_legal(cu_seqlens, x.shape[1])
    if mask is None:
        return there if maybe_any(~there) else None
    device = mask.device if mask.device == there.device else x.device
    return mask.to(device) & there.to(device)


class FwPKM(nn.Module):
    """A fast-weight product-key memory between two projections (SPEC.md §7); no residual inside.

    ``y, state = layer(x)`` starts from the layer's initial memory, so nothing leaks between calls;
    ``y, state = layer(x, state)`` reads on. Training on a carried state needs ``state.detach()``
    between steps, as truncated backpropagation always does.

    Args:
        hidden_size: width of x and y.
        config: the memory's configuration; ``config_fields`` (key_dim, num_subkeys, ...) override it or stand alone.
        gated: weigh reads and writes by a learned gate; without it, reads and values are added.
        value_norm: "zscore" standardises each value over its features, None leaves it.
        learn_memory: train the initial tables; by default they are buffers that optimizers do not see.
        device: of parameters and tables.
        dtype: of the slow weights; the tables are float32, or float64 if this is.
        config_fields: fields of :class:`fwpkm.FwPKMConfig`.

    Raises:
        ValueError: a field breaks its rule; names the field, the rule and the value.
        TypeError: an argument that the layer does not have; says which one was probably meant.
    """

    query_norm: nn.RMSNorm
    query_proj: nn.Linear
    value_norm: nn.RMSNorm
    value_proj: nn.Linear
    gate_norm: nn.RMSNorm
    gate_proj: nn.Linear
    output_norm: nn.RMSNorm
    output_proj: nn.Linear
    memory: InitialMemory
    learn_memory = validation.Fixed(
        "which takes this one's state_dict; layer.memory.requires_grad_(False) freezes tables that are trained"
    )
    _output_std = 0.02

    def __init__(
        self,
        hidden_size: int,
        config: FwPKMConfig | None = None,
        *,
        gated: bool = True,
        value_norm: str | None = "zscore",
        learn_memory: bool = False,
        device: Any = None,
        dtype: Any = None,
        **config_fields: Any,
    ):
        """Build the projections and draw all weights."""
        super().__init__()
        config = validation.layer_config(
            hidden_size, config, value_norm, config_fields, gated=gated, learn_memory=learn_memory
        )
        self.hidden_size, self.config, self.gated = hidden_size, config, gated
        self.value_normalization = value_norm
        self._learn_memory = learn_memory
        check_present(device)
        check_dtype(dtype)
        factory = {"device": device, "dtype": dtype}
        for name, (width, size) in self._projections().items():
            std = {"std": self._output_std} if name == "output" else {}
            self.add_module(f"{name}_norm", nn.RMSNorm(width, eps=rules.RMS_EPS, **factory))
            self.add_module(f"{name}_proj", Projection(width, size, **std, **factory))
        self.memory = InitialMemory(config, learn=learn_memory, **factory)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse None for a part, which a call would meet much later."""
        if value is None and name in self.__dict__.get("_modules", ()):
            without = "; torch.nn.Identity() leaves its input as it is" * name.endswith("_norm")
            without += ", and FwPKM(..., value_norm=None) the values as they are projected" * (name == "value_norm")
            raise ValueError(f"{name} must be a module{without}. Received: None")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw weights (normal, std 0.02; biases 0, norms 1) and initial tables from torch's generator.

        What calls ``reset_parameters`` of each part instead, in their order, draws the same.
        """
        parts_in_order: Any = self.children()
        for part in parts_in_order:
            part.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: State[Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        update: bool = True,
        return_state: bool = True,
        *,
        inplace: bool = False,
        return_trace: bool = False,
    ) -> tuple[Any, ...]:
        """Read T tokens, writing every chunk that they complete.

        Args:
            x: ``[B, T, hidden_size]``, or packed ``[1, T, hidden_size]``.
            state: where the sequences stand; None starts from the initial memory.
            mask: ``[B, T]`` bool, False for tokens that are not there (padding, at any place); None for True.
            cu_seqlens: ``[B+1]`` int32: sequence i is the tokens [cu_i, cu_{i+1}) of the packed row.
            update: False only reads and leaves the state as it is.
            return_state: False where nobody reads on: without a state nothing is kept that only a later call would
                read.
            inplace: the tables of ``state`` may be overwritten, which saves one copy of them. Of a compiled layer the
                memory then runs between two graphs.
            return_trace: return a third thing, what the call did, as a :class:`fwpkm.LayerTrace`.

        Returns:
            y in the shape of x, in the projections' dtype: NaN for tokens that are not finite, 0 for masked ones; and
            the next state, or None without ``return_state``; with ``return_trace`` the trace behind them.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
            RuntimeError: ``inplace`` on a table that autograd still needs.
        """
        validation.check_flag("return_state", return_state)
        validation.check_flag("return_trace", return_trace)
        whole = state is None and hasattr(self.memory, "reshard")  # FSDP2 gathers these tables when they are read
        begins = None if whole else self.memory if state is None else state
        tokens, dtype = ranks.told(begins, self._project, x, mask, cu_seqlens, state if update else None)
        if state is None:
            counted = mask if cu_seqlens is None else cu_seqlens
            device = None if counted is None else counted.device
            read, state, trace = ops.begin(
                self.config, self.memory(), tokens, cu_seqlens, update, return_state, device, layer=self
            )
        else:
            initial = self.memory().values if self.config.initial_decay else None
            read, state, trace = ops.read_on(
                self.config, state, tokens, cu_seqlens, update, inplace, layer=self, initial_values=initial
            )
        y, state = self._output(read, tokens, dtype), state if return_state else None
        if not return_trace:
            return y, state
        gate = None if tokens.gate is None else tokens.gate.detach()
        return y, state, LayerTrace(*trace, gate=traced_gate(torch, gate, trace.weights))

    if TYPE_CHECKING:  # of a module they know that it can be called with anything

        @overload
        def __call__(
            self, x: Tensor, state: State[Tensor] | None = None, mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None, update: bool = True, return_state: Literal[True] = True,
            *, inplace: bool = False, return_trace: Literal[False] = False,
        ) -> tuple[Tensor, State[Tensor]]: ...  # fmt: skip
        @overload
        def __call__(
            self, x: Tensor, state: State[Tensor] | None = None, mask: Tensor | None = None,
            cu_seqlens: Tensor | None = None, update: bool = True, return_state: bool = True,
            *, inplace: bool = False, return_trace: bool = False,
        ) -> tuple[Any, ...]: ...  # fmt: skip
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """``forward``, and the hooks of the module."""

    @torch.no_grad()
    def decode(self, x: Tensor, state: State[Tensor], mask: Tensor | None = None) -> Tensor:
        """Read one token of each sequence, overwriting ``state``; on a GPU a CUDA graph can hold a step. No gradient.

        Args:
            x: ``[B, 1, hidden_size]``.
            state: of ``fwpkm.backends.torch.start_decoding``; any state without gradients is overwritten.
            mask: ``[B, 1]`` bool, or None for True.

        Returns:
            y ``[B, 1, hidden_size]``.

        Raises:
            ValueError: an argument does not fit; names it, what was expected and what was received.
        """
        tokens, dtype = ranks.told(state, self._project_one, x, mask, state)
        return self._output(decoding.decode_tokens(self.config, state, tokens, layer=self), tokens, dtype)

    def _project(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, written: State | None
    ) -> tuple[Tokens, torch.dtype]:
        """What the tokens bring to the memory, and the projections' dtype; ``written`` is a state to be written."""
        check_transforms()
        validation.check_x(x, None, self.hidden_size, Tensor)
        parts.check_with_weights(x, self.query_norm)
        if mask is not None:
            validation.check_array("mask", mask, [("B", x.shape[0]), ("T", x.shape[1])], "bool", Tensor)
            check_device(x, mask=mask)
        if cu_seqlens is not None:
            mask = _without_tail(x, mask, cu_seqlens)
        # Under autocast x may be narrower than the norms' weights, which the fused kernel refuses.
        x = x.to(parts.dtype_of(self, x))
        # A token that is not finite must not reach the projections: their weights' gradients would be 0 · NaN. Nor
        # must one that is not there.
        dead = ~finite_rows(x.flatten(0, 1)).view(x.shape[:2])
        if mask is not None:
            gone = ~mask.to(x.device)
            x, dead = x.masked_fill(gone[..., None], 0), dead & ~gone
        if maybe_any(dead):
            x = x.masked_fill(dead[..., None], 0)
        query = self.query_proj(rms_norm(self.query_norm, x))
        value = self.value_proj(rms_norm(self.value_norm, x))
        if self.value_normalization == "zscore":
            value = zscore(value)
        if maybe_any(dead):  # so that the memory sees it: such a token takes its position
            value = value.masked_fill(dead[..., None], torch.nan)
        gate = self.gate_proj(rms_norm(self.gate_norm, x)).squeeze(-1).sigmoid() if self.gated else None
        validation.check_not_rounded(written, validation.dtype_name(query))
        return Tokens(query, value, gate, mask), x.dtype

    def _project_one(self, x: Tensor, mask: Tensor | None, state: State) -> tuple[Tokens, torch.dtype]:
        validation.check_x(x, 1, self.hidden_size, Tensor)
        return self._project(x, mask, None, state)

    def _output(self, read: Tensor, tokens: Tokens, dtype: torch.dtype) -> Tensor:
        """y from v̂: the mixture with the values, normalised and projected; NaN for dead tokens, 0 for masked ones."""
        value, dead = tokens.value, ~finite_rows(read.flatten(0, 1)).view(read.shape[:2])
        if maybe_any(dead):
            read, value = (z.masked_fill(dead[..., None], 0) for z in (read, value))
        y = self.output_proj(rms_norm(self.output_norm, mix(tokens.gate, read, value).to(dtype)))
        y = y.masked_fill(dead[..., None], torch.nan) if maybe_any(dead) else y
        return y if tokens.mask is None else y.masked_fill(~tokens.mask.to(y.device)[..., None], 0)

    def init_state(self, batch_size: int, position_device: Any = None) -> State[Tensor]:
        """The state that a call without one starts from: the initial memory for each row, at position 0."""
        return ops.init_state(self.config, self.memory(), batch_size, position_device)

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        shown = {"gated": self.gated, "value_norm": self.value_normalization, "learn_memory": self.learn_memory}
        return ", ".join(
            [f"hidden_size={self.hidden_size}", *(f"{k}={v!r}" for k, v in shown.items()), str(self.config)]
        )

    def spec(self) -> dict[str, Any]:
        """What a file of this layer's weights must have been saved from."""
        return layer_spec(self.hidden_size, self.gated, self.value_normalization, self.config)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names (SPEC.md §8) and their shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (width, size) in self._projections().items():
            shapes |= {
                f"{name}_norm.weight": (width,),
                f"{name}_proj.weight": (size, width),
                f"{name}_proj.bias": (size,),
            }
        specs = memory_specs(self.config, None)._asdict()
        return shapes | {f"memory.{name}": tuple(spec.shape[1:]) for name, spec in specs.items()}

    def table_dtype(self) -> str:
        """Of the initial tables: "float32" or "float64"."""
        return validation.dtype_name(self.memory.values)

    def export_tensors(self, variables: None = None) -> dict[str, np.ndarray]:
        """Weights and initial tables by canonical name; bfloat16 and float16 as float32.

        Raises:
            ValueError: weights are sharded, so that this rank has only a part of them; or a part was replaced or
                wrapped, so that its weights do not say what it computes.
        """
        self._refuse_sharded()
        tensors = {name: ops.to_numpy(parts.weight_of(self, name)) for name in self.tensor_shapes()}
        return {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in tensors.items()}

    def import_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Fill weights and initial tables; names and shapes are those of :meth:`tensor_shapes`.

        Raises:
            ValueError: the layer is on the meta device, where nothing can be stored, its weights are sharded, a part
                was replaced, wrapped or parametrized, or tied to one that the file has otherwise; nothing is filled.
        """
        self._refuse_sharded()
        own = {name: parts.plain_weight_of(self, name) for name in self.tensor_shapes()}
        parts.check_tied(own, tensors)
        with torch.no_grad():
            for name, x in own.items():
                fill(x, torch.from_numpy(tensors[name]))

    def _refuse_sharded(self) -> None:
        """Files of a layer hold whole tensors, and gathering them would hang unless every rank took part."""
        placed = {name: getattr(x, "placements", ()) for name, x in self.state_dict(keep_vars=True).items()}
        sharded = [name for name, where in placed.items() if any(placement.is_shard(0) for placement in where)]
        if sharded:
            raise ValueError(
                "layer must hold whole tensors: take them on every rank with torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and load_state_dict them "
                f"into a layer that is not sharded. Received: {', '.join(sharded)} in shards"
            )

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Widths in and out of each projection."""
        cfg, width = self.config, self.hidden_size
        gate = {"gate": (width, 1)} if self.gated else {}
        query, value = (width, cfg.num_heads * cfg.key_dim), (width, cfg.value_dim)
        return {"query": query, "value": value, **gate, "output": (cfg.value_dim, width)}
