"""``generate`` of models with memory: batches, beams, sampling, caches and drafts, against passes without a cache."""

import numpy as np
import pytest
import torch
from asserting import assert_close
from tiny_models import (
    MEMORY,
    MODELS,
    VOCABULARY,
    cache_name,
    cache_of,
    full_pass,
    left_padded,
    memories,
    noisy,
    prompt,
    with_memory,
)
from transformers import DynamicCache

from fwpkm.integrations.transformers import MemoryCache

CHUNK = MEMORY["chunk_size"]
PROMPTS = [prompt(length, seed) for seed, length in enumerate((3, 19, 8, 1, 14))]
NEW = 30  # three chunks' ends and more for each prompt, whatever its length


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    family, fields = request.param
    return with_memory(family, **fields)


def generate(model, *, new=NEW, **arguments):
    """New tokens ``[B, new]``; greedy unless told."""
    arguments = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **arguments}
    return model.generate(**arguments)[:, -new:]


def test_a_left_padded_batch_equals_each_prompt_alone_and_the_full_pass(model):
    together = generate(model, **left_padded(PROMPTS))
    for row, ids in zip(together, PROMPTS):
        assert torch.equal(generate(model, input_ids=ids)[0], row)
        logits = full_pass(model, torch.cat([ids, row[None]], dim=1))
        assert torch.equal(logits[0, ids.shape[1] - 1 : -1].argmax(-1), row)


def test_four_beams_equal_each_prompt_alone_and_full_passes(model):
    together = generate(model, **left_padded(PROMPTS), num_beams=4)
    assert torch.equal(generate(model, **left_padded(PROMPTS), num_beams=4, use_cache=False), together)
    differing = 0
    for row, ids in zip(together, PROMPTS):
        assert torch.equal(generate(model, input_ids=ids, num_beams=4)[0], row)
        differing += not torch.equal(generate(model, input_ids=ids)[0], row)
    assert differing  # else beams prove no more than greedy


def test_the_memory_decides(model):
    """Without writes the tokens are others."""
    family = model.config.model_type
    frozen = with_memory(family, learning_rate=0.0)
    assert not torch.equal(generate(frozen, **left_padded(PROMPTS)), generate(model, **left_padded(PROMPTS)))


def test_sampling_with_several_sequences_of_a_prompt(model):
    def drawn(**arguments):
        torch.manual_seed(5)
        return generate(model, do_sample=True, num_return_sequences=3, **arguments)

    batch = left_padded(PROMPTS[:2])
    answers = drawn(**batch)
    assert answers.shape == (6, NEW)
    assert len({tuple(row.tolist()) for row in answers}) == 6
    assert torch.equal(drawn(**batch, use_cache=False), answers)


@pytest.mark.parametrize("given", [None, "with a config", "without"])
def test_a_cache_goes_on_in_a_second_call(model, given):
    """Made by generate, or passed in empty; left padding of the first call stays in mind."""
    batch = left_padded(PROMPTS)
    cache = DynamicCache() if given == "without" else DynamicCache(config=model.config)
    passed = {} if given is None else {cache_name(model): cache}
    first = model.generate(
        **batch, **passed, do_sample=False, max_new_tokens=11, min_new_tokens=11, return_dict_in_generate=True
    )
    kept = cache_of(first)
    assert given is None or kept is cache
    assert isinstance(kept, MemoryCache)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 11), value=1)
    rest = generate(model, new=NEW - 11, input_ids=first.sequences, attention_mask=mask, **{cache_name(model): kept})
    assert torch.equal(torch.cat([first.sequences[:, -11:], rest], dim=1), generate(model, **batch))


@pytest.mark.parametrize("size", [5, 8, 64])
def test_a_prompt_read_in_pieces(model, size):
    batch = left_padded(PROMPTS)
    assert torch.equal(generate(model, **batch, prefill_chunk_size=size), generate(model, **batch))


# Drafts


class Watch:
    """What the passes of an assisted generate read, and what was taken back."""

    def __init__(self, model, monkeypatch):
        self.logits, self.crops, self.length = {}, [], 0
        crop = MemoryCache.crop

        def counted(cache, tokens):
            if cache.get_seq_length() == self.length:  # the model's own, not an assistant's
                self.crops.append((-tokens, self.draft))
            crop(cache, tokens)

        monkeypatch.setattr(MemoryCache, "crop", counted)
        self.handle = model.register_forward_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs, output):
        cache, rows = cache_of(output), output.logits[0]
        self.length = cache.get_seq_length()
        self.draft = len(rows) - 1
        for i, row in enumerate(rows):
            self.logits[self.length - len(rows) + i] = row


def test_assisted_equals_unassisted(model, monkeypatch):
    """Drafts of 20, over two chunks and more, of which all, some or none is accepted."""
    watch, ids = Watch(model, monkeypatch), prompt(13, seed=7)
    answer = generate(model, new=36, input_ids=ids, assistant_model=noisy(model, 0.02))
    watch.handle.remove()
    assert torch.equal(answer, generate(model, new=36, input_ids=ids))
    whole = torch.cat([ids, answer], dim=1)
    expected = full_pass(model, whole)[0]
    read = [i for i in sorted(watch.logits) if i < whole.shape[1] - 1]
    assert read == list(range(12, 48))
    assert_close(torch.stack([watch.logits[i] for i in read]).numpy(), expected[read].numpy(), "float64")
    seen = watch.crops
    assert max(draft for _, draft in seen) == 20
    over_a_chunk = sum(removed > CHUNK for removed, _ in seen)
    partly = sum(0 < removed < draft for removed, draft in seen)
    wholly = sum(removed == draft > 0 for removed, draft in seen)
    print(f"crops over a chunk {over_a_chunk}, partly accepted {partly}, wholly rejected {wholly}")
    assert min(over_a_chunk, partly, wholly) > 0


def test_a_first_draft_that_is_longer_than_most_can_be_rejected(model):
    """No number of chunks is named anywhere: the assistant's drafts are of 40 tokens, over five chunks."""
    assistant = noisy(model, 5.0)
    assistant.generation_config.num_assistant_tokens = 40
    ids = prompt(13, seed=7)
    arguments = {"do_sample": False, "max_new_tokens": 45}
    answer = model.generate(ids, assistant_model=assistant, stopping_criteria=[after(3)], **arguments)
    assert torch.equal(answer, model.generate(ids, stopping_criteria=[after(3)], **arguments)[:, : answer.shape[1]])


def after(new):
    """Stops once there are so many new tokens of 13."""
    return lambda ids, scores, **kwargs: torch.full((len(ids),), ids.shape[1] >= 13 + new)


def test_prompt_lookup_equals_unassisted(model):
    ids = prompt(7, seed=3).repeat(1, 4)
    expected = generate(model, input_ids=ids)
    assert torch.equal(generate(model, input_ids=ids, prompt_lookup_num_tokens=12), expected)


def test_sampled_drafts(model):
    """Drafts are judged at random, from distributions that come from the same states."""
    torch.manual_seed(0)
    ids = prompt(13, seed=7)
    answer = generate(model, input_ids=ids, assistant_model=noisy(model, 0.01), do_sample=True, new=16)
    assert answer.shape == (1, 16)
    assert np.unique(answer).size > 1
    assert answer.max() < VOCABULARY


def test_two_models_keep_to_themselves(model):
    """A draft's cache and the model's are two, and both memories are as before."""
    before = [memory.memory.values.clone() for memory in memories(model)]
    generate(model, input_ids=PROMPTS[1], num_beams=2)
    for memory, values in zip(memories(model), before):
        assert torch.equal(memory.memory.values, values)
