"""What transformers must do otherwise for models with memory, and nothing for others.

Seven of its methods are wrapped, once, when the integration is imported: a model whose config remembers memories is
built with them, weights that a checkpoint lacks are drawn rightly, ``generate`` begins with a cache that holds their
states and knows how long drafts are, masks the padding that it feeds to rows that have ended, and what cannot be served
is refused before anything changes. All but ``post_init`` and ``init_continuous_batching`` are private; if a release
lacks one, the import says so.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerationMixin
from transformers.initialization import guard_torch_init_functions

from fwpkm.integrations.transformers.cache import MemoryCache, cache_in, with_states
from fwpkm.integrations.transformers.model import MemoryLayer, attach, decoder_of
from fwpkm.integrations.transformers.settings import has_memory

_WRAPPED = "_fwpkm_wrapped"


def _post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        if has_memory(self) and isinstance(getattr(self, "layers", None), nn.ModuleList):
            decoder_of(self)  # a family that does not fit is refused here as in insert_memory
            attach(self)
        original(self)

    return post_init


def _initialize_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        drawn = getattr(module, "_is_hf_initialized", False)
        original(self, module, *args, **kwargs)
        if isinstance(module, MemoryLayer) and not drawn:
            with guard_torch_init_functions():
                module.draw_missing()

    return initialize_weights


def _prepare_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_cache(
        self: Any, generation_config: Any, model_kwargs: Any, mode: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        if has_memory(self) and generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit drafts with the first decoder layers alone, without the cache of all memories, "
                "so a model with memory does not serve it: pass assistant_model= or prompt_lookup_num_tokens=. "
                f"Received: assistant_early_exit={generation_config.assistant_early_exit}"
            )
        if has_memory(self) and generation_config.use_cache is False and cache_in(model_kwargs) is not None:
            raise ValueError(
                "use_cache=False reads the whole text anew at each step, which a cache would hold once more each time: "
                "leave one of the two out. Received: use_cache=False and a cache"
            )
        result = original(self, generation_config, model_kwargs, mode, batch_size, *args, **kwargs)
        cache = cache_in(model_kwargs)
        if has_memory(self) and cache is not None:
            times = max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = _with_repeated_states(cache, decoder_of(self), batch_size, times)
            _expect_draft(cache, generation_config.prompt_lookup_num_tokens)
            if generation_config.is_assistant:  # its answer is a draft, some of which will be taken back
                _expect_draft(cache, generation_config.max_new_tokens)
                cache.activate_past_recording()
        return result

    return prepare_cache


def _candidate_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        generator = original(self, *args, **kwargs)
        if has_memory(self):
            _expect_draft(cache_in(kwargs["model_kwargs"]), getattr(generator, "num_assistant_tokens", None))
        return generator

    return candidate_generator


class _Ends(StoppingCriteriaList):
    """Stopping criteria that tell a cache which rows have ended."""

    def __init__(self, criteria: Iterable[Any], cache: MemoryCache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = super().__call__(*args, **kwargs)
        self.cache.ended = done if self.cache.ended is None else self.cache.ended | done
        return done


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(
        self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        cache = cache_in(kwargs)
        # As transformers decides it: without such a criterion rows that have ended go on with tokens of their own.
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if not isinstance(cache, MemoryCache) or not pads:
            return original(self, input_ids, logits_processor, stopping_criteria, *args, **kwargs)
        try:
            return original(self, input_ids, logits_processor, _Ends(stopping_criteria, cache), *args, **kwargs)
        finally:
            cache.ended = None

    return sample


def _update_kwargs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_kwargs(self: Any, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        model_kwargs = original(self, outputs, model_kwargs, *args, **kwargs)
        cache = cache_in(model_kwargs)
        if not isinstance(cache, MemoryCache) or cache.ended is None:
            return model_kwargs
        if cache.ended.any():  # the host has waited for it already, to learn whether all have
            mask = model_kwargs.get("attention_mask")
            if mask is None:  # transformers drops one that hides nothing
                mask = cache.ended.new_ones((len(cache.ended), cache.get_seq_length() + 1), dtype=torch.long)
            model_kwargs["attention_mask"] = torch.cat([mask[:, :-1], (~cache.ended)[:, None].to(mask)], dim=1)
        return model_kwargs

    return update_kwargs


def _continuous_batching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_memory(self):
            raise ValueError(
                "continuous batching (generate_batch) keeps a paged cache, which holds no states of memories: call "
                "generate on a left-padded batch, or serve as examples/serve.py does"
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _with_repeated_states(cache: Any, decoder: Any, batch_size: int, times: int) -> MemoryCache:
    """The same cache for ``times`` sequences of each row, whose states are repeated if it has read nothing."""
    cache = with_states(cache, decoder)
    rows = cache.states[0].rows
    if rows is not None and rows.columns == 0:
        with_states(cache, decoder, batch_size)  # which refuses other rows than those of the prompts
        for states in cache.states:
            states.batch_repeat_interleave(times)
    return with_states(cache, decoder, batch_size * times)


def _expect_draft(cache: Any, tokens: Any) -> None:
    """Let a cache record as much as a draft of so many tokens can have to give back."""
    for states in cache.states:
        states.draft = max(states.draft, int(tokens or 0))


_WRAPPERS = (
    (PreTrainedModel, "post_init", ("self",), _post_init),
    (PreTrainedModel, "_initialize_weights", ("self", "module"), _initialize_weights),
    (
        GenerationMixin,
        "_prepare_cache_for_generation",
        ("self", "generation_config", "model_kwargs", "generation_mode", "batch_size"),
        _prepare_cache,
    ),
    (GenerationMixin, "_sample", ("self", "input_ids", "logits_processor", "stopping_criteria"), _sample),
    (GenerationMixin, "_update_model_kwargs_for_generation", ("self", "outputs", "model_kwargs"), _update_kwargs),
    (GenerationMixin, "init_continuous_batching", ("self", "generation_config"), _continuous_batching),
    (GenerationMixin, "_get_candidate_generator", ("self", "generation_config"), _candidate_generator),
)


def install() -> None:
    """Wrap the methods, once.

    Raises:
        ImportError: this release of transformers has one of them no longer, or with other arguments.
    """
    for owner, name, arguments, _ in _WRAPPERS:
        method = getattr(owner, name, None)
        received = None if method is None else list(inspect.signature(method).parameters)
        if received is None or tuple(received[: len(arguments)]) != arguments:
            raise ImportError(
                f"fwpkm.integrations.transformers needs {owner.__name__}.{name}({', '.join(arguments)}, ...), as "
                f"transformers 5.17 to 5.24 have it. transformers {transformers.__version__} has "
                f"{'no such method' if received is None else 'it with ' + ', '.join(received)}"
            )
    for owner, name, _, wrap in _WRAPPERS:
        method = getattr(owner, name)
        if not hasattr(method, _WRAPPED):
            wrapper = wrap(method)
            setattr(wrapper, _WRAPPED, True)
            setattr(owner, name, wrapper)
