"""Memories before decoder layers of a causal language model: how they are put there and what a pass tells them."""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fwpkm import validation
from fwpkm.backends.torch import FwPKM
from fwpkm.config import FwPKMConfig
from fwpkm.integrations.transformers.cache import MemoryCache, cache_in, with_states
from fwpkm.integrations.transformers.settings import DEFAULT_LAYERS, NAME, Settings, has_memory

_CALL = "fwpkm_call"
_CACHES = {"cache", "past_key_values"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class MemoryLayer(FwPKM):
    """A memory before a decoder layer; with its first weights it adds nothing to the hidden states."""

    layer_idx: int

    _output_std = 0.0

    def draw_missing(self) -> None:
        """Draw the weights and tables that transformers has not marked as loaded."""
        tensors = self.state_dict(keep_vars=True)
        loaded = {name: x for name, x in tensors.items() if getattr(x, "_is_hf_initialized", False)}
        if len(loaded) == len(tensors) or any(x.is_meta for x in tensors.values()):
            return
        kept = {name: x.detach().clone() for name, x in loaded.items()}
        self.reset_parameters()
        with torch.no_grad():
            for name, x in loaded.items():
                x.copy_(kept[name])


class Call(NamedTuple):
    """What one pass through the decoder tells the memories."""

    mask: Tensor | None
    """``[B, T]`` bool, False for padding; None for True. With a cache it lies on the CPU."""
    cu_seqlens: Tensor | None
    """``[sequences + 1]`` int32: where the packed sequences of the rows, one after the other, end."""
    cache: MemoryCache | None


def insert_memory(
    model: PreTrainedModel,
    layers: tuple[int, ...] = DEFAULT_LAYERS,
    config: FwPKMConfig | None = None,
    *,
    gated: bool = True,
    value_norm: str | None = "zscore",
    learn_memory: bool = False,
    undo: int | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Put a memory, with a residual, before chosen decoder layers of a causal language model.

    The model then computes what it computed before, to the bit, until the memories are trained: their ``output_proj``
    is zero. Its config, a copy of the one it had, remembers them, so ``save_pretrained`` and ``from_pretrained`` work.
    ``generate`` keeps their states in its cache, with beams, sampling, left-padded batches and assisted decoding.

    Args:
        model: a model of transformers whose decoder layers take hidden states, such as of the Llama and Qwen3
            families; it is changed in place. Weights of the memories are in its dtype, tables in float32, or float64
            in a float64 model.
        layers: indices of decoder layers, counted from 0, before each of which a memory is put.
        config: the memories' configuration, with ``memory_scope="sequence"``; ``fields`` override it or stand alone.
        gated: as in :class:`fwpkm.backends.torch.FwPKM`.
        value_norm: as in :class:`fwpkm.backends.torch.FwPKM`.
        learn_memory: as in :class:`fwpkm.backends.torch.FwPKM`.
        undo: how many chunks of each sequence assisted decoding can take back; None for ceil((draft + 1) / chunk_size).
        fields: fields of :class:`fwpkm.FwPKMConfig`.

    Returns:
        The model.

    Raises:
        ValueError: the model's family does not fit, it has memories already, ``layers`` are not distinct indices of
            its decoder layers, or a field breaks its rule.
        TypeError: an unknown field.
    """
    decoder = decoder_of(model)
    if has_memory(model):
        raise ValueError(
            f"model has memories already, before decoder layers {list(Settings.of(model.config).layers)}: "
            "insert_memory can be called once for a model"
        )
    config = validation.layer_config(
        model.config.hidden_size, config, value_norm, fields, gated=gated, learn_memory=learn_memory
    )
    if config.memory_scope != "sequence":
        raise ValueError(
            "memory_scope must be 'sequence', so that no row of a batch reads what another wrote. "
            f"Received: memory_scope={config.memory_scope!r}"
        )
    if undo is not None:
        validation.check_count("undo", undo)
    settings = Settings(_indices(layers), config, gated, value_norm, learn_memory, undo)
    settings.check_layers(len(decoder.layers))
    _check_loaded(decoder.layers[i] for i in settings.layers)
    own = copy.deepcopy(model.config)  # models may share one
    settings.store(own)
    before: Any = model.config
    parts: Any = model.modules()
    for part in parts:
        if getattr(part, "config", None) is before:
            part.config = own
    attach(decoder)
    return model


def decoder_of(model: Any) -> Any:
    """The part of a model that holds its decoder layers.

    Raises:
        ValueError: not a model of transformers, or one whose parts do not fit.
    """
    if not isinstance(model, PreTrainedModel):
        base = " (of peft's: insert into the base model first)" if hasattr(model, "get_base_model") else ""
        raise ValueError(f"model must be a PreTrainedModel of transformers{base}. Received: {type(model).__name__}")
    decoder = model.base_model
    why = _unfit(model, decoder)
    if why:
        raise ValueError(
            f"memory cannot be put into a {type(model).__name__}: {why}. It fits models of text alone whose decoder "
            "layers take hidden states and a cache, such as LlamaForCausalLM and Qwen3ForCausalLM"
        )
    return decoder


def _unfit(model: Any, decoder: Any) -> str:
    """Why memory does not fit, or ""."""
    layers = getattr(decoder, "layers", None)
    if model.config.is_encoder_decoder or not isinstance(layers, nn.ModuleList) or not len(layers):
        return "it has no list of decoder layers named layers"
    if decoder.config is not model.config or len(layers) != model.config.num_hidden_layers:
        return "its decoder is only a part of it"
    kinds = set(getattr(model.config, "layer_types", None) or _ATTENTION)
    if not kinds <= _ATTENTION:
        return f"it has layers of {', '.join(sorted(kinds - _ATTENTION))}"
    for layer in layers:
        names = _names(layer.forward)
        if names[:1] != ["hidden_states"] or not _CACHES & set(names):
            return f"its {type(layer).__name__} takes {', '.join(names)}"
    kinds = {parameter.kind for parameter in inspect.signature(decoder.forward).parameters.values()}
    if not _CACHES & set(_names(decoder.forward)) or inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"its {type(decoder).__name__} does not pass further arguments on to its layers"
    return ""


def _names(forward: Callable[..., Any]) -> list[str]:
    """The parameters of a module's forward."""
    return list(inspect.signature(forward).parameters)


def _indices(layers: Any) -> tuple[Any, ...]:
    """What was given for layers, which may be any iterable."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a tuple of integers, such as (1, 4). Received: layers={layers!r}")
    return tuple(layers)


def _check_loaded(layers: Iterable[nn.Module]) -> None:
    """Raise if accelerate has taken weights of these decoder layers away, to bring them when a part is called."""
    for part in (part for layer in layers for part in layer.modules()):
        if hasattr(part, "_hf_hook") and any(p.is_meta for p in part.parameters(recurse=False)):
            raise ValueError(
                "model must hold its weights: accelerate has offloaded some, and would not know those of a memory. "
                "Load the model without offloading, insert the memory, save_pretrained, and load that with device_map. "
                f"Received: the weights of a {type(part).__name__} on the meta device"
            )


def attach(decoder: Any) -> None:
    """Put the memories that the decoder's config remembers before its layers."""
    settings = Settings.of(decoder.config)
    settings.check_layers(len(decoder.layers))
    for layer_idx, layer in enumerate(decoder.layers):
        if layer_idx in settings.layers:
            like = next((p for p in layer.parameters() if p.is_floating_point()), None)
            memory = MemoryLayer(
                decoder.config.hidden_size,
                settings.config,
                gated=settings.gated,
                value_norm=settings.value_norm,
                learn_memory=settings.learn_memory,
                device=None if like is None else like.device,
                dtype=None if like is None else like.dtype,
            )
            memory.layer_idx = layer_idx
            memory.train(layer.training)
            layer.add_module(NAME, memory)
        layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
    decoder.fwpkm_arguments = _names(decoder.forward)
    decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)


def _before_decoder(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the mask, packed sequences and the cache from a call's arguments, for the layers."""
    names = decoder.fwpkm_arguments
    inputs = {**dict(zip(names, args)), **kwargs}
    tokens = inputs.get("inputs_embeds")
    tokens = inputs.get("input_ids") if tokens is None else tokens
    if tokens is None:
        return None  # the model will say so
    batch, length = tokens.shape[:2]
    cache, mask, cu_seqlens = cache_in(inputs), inputs.get("attention_mask"), None
    if cache is not None:
        cache = with_states(cache, decoder, batch)
        if inputs.get("cu_seq_lens_q") is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) keep no cache: leave it out, and pass use_cache=False")
        if _checkpoints(decoder):
            raise ValueError(
                "gradient checkpointing reads tokens twice, so it cannot carry a cache: leave the cache out, switch "
                "checkpointing off, or call model.eval()"
            )
    else:
        cu_seqlens = _cu_seqlens(inputs, batch, length)
        if cu_seqlens is None and _uses_cache(decoder, inputs):
            cache = with_states(DynamicCache(config=decoder.config), decoder)
        if cu_seqlens is not None:  # with a cache attention would look across the sequences
            inputs["use_cache"] = False
    positions = inputs.get("position_ids")
    inputs[_CALL] = Call(_mask(mask, batch, length, cache, positions), cu_seqlens, cache)
    if cache is not None and length > 1:  # a step of generate needs no wait for the device
        _check_goes_on(positions, cache, mask)
    for name in _CACHES:
        inputs.pop(name, None)
    inputs["cache" if "cache" in names else "past_key_values"] = cache
    return (), inputs


def _checkpoints(decoder: Any) -> bool:
    return bool(getattr(decoder, "gradient_checkpointing", False)) and decoder.training and torch.is_grad_enabled()


def _uses_cache(decoder: Any, inputs: dict[str, Any]) -> bool:
    """Whether the model will make a cache."""
    use_cache = inputs.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    return bool(use_cache) and not _checkpoints(decoder)


def _mask(mask: Any, batch: int, length: int, cache: MemoryCache | None, positions: Any) -> Tensor | None:
    """``[B, T]`` bool of the call's own tokens; with a cache on the host, None where all are there."""
    past = 0 if cache is None else cache.get_seq_length()
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, past + length)):
        if cache is not None:  # generate with drafts makes one of the whole prompt, in transformers 5.17
            _check_goes_on(positions, cache, None)
        received = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be 2-D, [{batch}, {past + length}] with the {past} tokens of the cache, because the "
            f"memory must know which tokens are padding. Received: {received}"
        )
    if cache is None:
        return None if mask is None else mask.bool()
    if mask is not None:  # all of it at once: the host waits for the device a single time
        mask = mask.bool().cpu()
    cache.check_seen(None if mask is None else mask[:, :past])
    return None if mask is None or mask[:, past:].all() else mask[:, past:]


def _check_goes_on(positions: Any, cache: MemoryCache, mask: Any) -> None:
    """Raise if positions begin before what the cache has read, which the memories would read again."""
    past = cache.get_seq_length()
    if not past or positions is None or positions.ndim != 2:
        return
    seen = torch.tensor([past]) if cache.seen is None else cache.seen.sum(1)
    first = positions[:, 0].cpu()
    again = first < seen
    if mask is not None:
        again &= mask[:, past].bool().cpu()  # padding has any position
    if again.any():
        raise ValueError(
            "position_ids must go on after the tokens that the cache has read, or the memories read them again: pass "
            "the new tokens alone. In transformers, generate with drafts (assistant_model, prompt_lookup_num_tokens) "
            "passes all of a prompt: begin with an empty cache, or leave drafts out where a cache goes on. Received: "
            f"position_ids that begin at {first.tolist()}, a cache of {seen.tolist()} tokens"
        )


def _cu_seqlens(inputs: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Where packed sequences end, as told, or as positions that begin anew show it (without a mask)."""
    told, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if told is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q packs sequences into one row. Received: {batch} rows")
        _check_positions(told, positions, length)
        return told.int()
    if positions is None or inputs.get("attention_mask") is not None or positions.ndim != 2:
        return None
    begins = positions.diff(dim=1) != 1
    if positions.shape[1] != length or not begins.any():
        return None
    begins = torch.cat([begins.new_ones(len(begins), 1), begins], dim=1).expand(batch, -1)
    starts = begins.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([batch * length])]).int()


def _check_positions(ends: Tensor, positions: Any, length: int) -> None:
    """Raise unless positions begin anew with each packed sequence: most of transformers' attention goes by them."""
    starts = ends[ends < length].unique().tolist()
    begins = [0]
    if positions is not None and positions.ndim == 2:
        begins += ((positions.expand(1, length)[0].diff() != 1).nonzero().squeeze(1) + 1).tolist()
    if starts != begins:
        raise ValueError(
            f"position_ids must begin anew at each sequence of cu_seq_lens_q, at {starts}, or attention looks from one "
            "sequence into another: pass both, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes "
            f"them. Received: {'none' if positions is None else f'positions that begin anew at {begins}'}"
        )


def _before_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add what the memory before this layer reads to the hidden states."""
    kwargs = dict(kwargs)
    call = kwargs.pop(_CALL, None)
    memory = getattr(layer, NAME, None)
    if memory is None:
        return args, kwargs
    if call is None:
        raise RuntimeError(
            f"decoder layer {memory.layer_idx} has a memory, which must know the mask and the cache of the call: call "
            "the model, not the layer. If you did, this family does not pass further arguments on to its layers, and "
            "memory does not fit it"
        )
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = hidden + _read(memory, hidden, call)
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _read(memory: MemoryLayer, hidden: Tensor, call: Call) -> Tensor:
    """What the memory adds, in the dtype and on the device of the hidden states."""
    x = hidden.to(_device(memory, hidden.device))
    if call.cache is not None:
        return call.cache.states_of(memory.layer_idx).read(memory, x, call.mask).to(hidden)
    if call.cu_seqlens is None:
        return memory(x, mask=call.mask, return_state=False)[0].to(hidden)
    row = x.reshape(1, -1, x.shape[-1])
    mask = None if call.mask is None else call.mask.reshape(1, -1)
    y, _ = memory(row, mask=mask, cu_seqlens=call.cu_seqlens, return_state=False)
    return y.reshape(x.shape).to(hidden)


def _device(memory: MemoryLayer, default: torch.device) -> torch.device:
    """Where the memory computes; weights that accelerate has offloaded lie on the meta device until they are called."""
    found = (x.device for x in (memory.query_norm.weight, memory.memory.values) if not x.is_meta)
    return next(found, default)
