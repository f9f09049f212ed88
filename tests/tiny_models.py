"""Tiny causal language models of transformers with memories, in float64, and what is known of them without a cache."""

import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fwpkm.integrations.transformers import insert_memory

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
MEMORY = {"key_dim": 8, "value_dim": 8, "num_subkeys": 8, "top_k": 4, "chunk_size": 8, "lookahead": 1}
MODELS = [("llama", {}), ("qwen3", {"usage_weight": 0.25})]
"""What ``with_memory`` takes: each family, and each way that a slot's uses count."""
LAYERS = (0, 2)
VOCABULARY = 40
PAD = 0


def bare(family, seed=0, dtype=torch.float64, **fields):
    """A model without memory."""
    config, model = FAMILIES[family]
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
    return model(config(**sizes, **heads, **tokens, **fields)).to(dtype).eval()


def with_memory(family, seed=0, dtype=torch.float64, **fields):
    """One whose memories speak: their outputs are large enough that they decide about tokens."""
    model = insert_memory(bare(family, seed, dtype), LAYERS, **{**MEMORY, **fields})
    for memory in memories(model):
        torch.nn.init.normal_(memory.output_proj.weight, std=1.0)
    return model


def noisy(model, scale, **fields):
    """A model that drafts what the other says, more or less."""
    draft = with_memory(model.config.model_type, **fields)
    torch.manual_seed(1)
    with torch.no_grad():
        draft.lm_head.weight += scale * torch.randn_like(draft.lm_head.weight)
    draft.generation_config.num_assistant_tokens = 20
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def memories(model):
    return [layer.fwpkm for layer in model.base_model.layers if hasattr(layer, "fwpkm")]


def prompt(length, seed=0):
    """``[1, length]``, without the token of padding."""
    return torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts):
    """``input_ids`` and ``attention_mask`` of several prompts."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.cat([(torch.arange(longest) >= longest - p.shape[1]).long()[None] for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def cache_name(model):
    """The name that this release of transformers gives the argument."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output):
    """The cache that a call or generate returns."""
    return output["cache"] if "cache" in output else output["past_key_values"]


@torch.no_grad()
def full_pass(model, ids):
    """Logits of every token, in one pass that keeps no cache."""
    return model(ids, use_cache=False).logits


def read(model, ids, cache=None, **arguments):
    """Logits and the cache; no gradient."""
    with torch.no_grad():
        output = model(ids, **{cache_name(model): cache}, use_cache=True, **arguments)
    return output.logits, cache_of(output)
