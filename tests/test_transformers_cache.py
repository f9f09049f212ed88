"""The cache of models with memory: pieces, crops, rows, copies and gradients, against one pass."""

import copy
import pickle

import pytest
import torch
from asserting import assert_close, assert_same_bits
from tiny_models import (
    cache_name,
    cache_of,
    full_pass,
    left_padded,
    prompt,
    read,
    with_memory,
)
from transformers import (
    DynamicCache,
)

import fwpkm
from fwpkm.integrations.transformers.cache import with_states

IDS = prompt(30)


USES = {"usage_weight": 0.25}


@pytest.fixture(scope="module", params=[{}, USES], ids=str)
def model(request):
    return with_memory("llama", **request.param)


def test_pieces_equal_one_pass(model):
    batch = left_padded([prompt(30), prompt(17)])
    expected = full_pass_of(model, batch)
    for sizes in ([1] * 30, [13, 1, 16], [8, 8, 8, 6]):
        cache, parts, start = None, [], 0
        for size in sizes:
            stop = start + size
            logits, cache = read(
                model, batch["input_ids"][:, start:stop], cache, attention_mask=batch["attention_mask"][:, :stop]
            )
            parts.append(logits)
            start = stop
        assert_close(torch.cat(parts, dim=1)[:, 13:].numpy(), expected[:, 13:].numpy(), "float64")


def full_pass_of(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("sizes", [[30], [17, 1, 12], [25, 5]])
@pytest.mark.parametrize("removed", [0, 3, 6, 7, 15, 21])
def test_cropped_tokens_were_never_read(model, sizes, removed):
    """Rows of different lengths, with padding in between too; 6 tokens are pending, 15 reach over two chunks' ends."""
    batch = left_padded([prompt(30), prompt(26)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[1, 26:29] = 0
    cache = DynamicCache()
    cache = with_recording(model, cache)
    start = 0
    for size in sizes:
        read(model, ids[:, start : start + size], cache, attention_mask=mask[:, : start + size])
        start += size
    cache.crop(-removed)
    _, fresh = read(model, ids[:, : 30 - removed], attention_mask=mask[:, : 30 - removed])
    for kept, expected in zip(cache.states, fresh.states):
        assert kept.columns == expected.columns == 30 - removed
        assert torch.equal(kept.rows.position, expected.rows.position)
        assert torch.equal(kept.rows.pending.mask, expected.rows.pending.mask)
        for a, b in zip(arrays(kept), arrays(expected)):
            assert_close(a, b, "float64")
    again = torch.cat([ids[:, : 30 - removed], torch.cat([prompt(25, 9), prompt(25, 8)])], dim=1)
    mask = torch.nn.functional.pad(mask[:, : 30 - removed], (0, 25), value=1)
    logits, _ = read(model, again[:, 30 - removed :], cache, attention_mask=mask)
    expected = full_pass_of(model, {"input_ids": again, "attention_mask": mask})
    assert_close(logits.numpy(), expected[:, 30 - removed :].numpy(), "float64")


def with_recording(model, cache):
    """As assisted decoding does it: the states are there before the past is recorded."""
    cache = with_states(cache, model.base_model)
    cache.activate_past_recording()
    return cache


@pytest.mark.parametrize("fields", [{}, USES, USES | {"learning_rate": 0.0}], ids=str)
def test_a_crop_takes_back_the_very_bits(fields):
    """In float32: rows, uses, keys and pending tokens are those that a write replaced."""
    model = with_memory("llama", dtype=torch.float32, **fields)
    cache = with_recording(model, DynamicCache())
    read(model, IDS[:, :21], cache)
    before = copy.deepcopy(cache)
    read(model, IDS[:, 21:], cache)
    cache.crop(-9)
    for kept, expected in zip(cache.states, before.states):
        assert_same_bits(arrays(kept), arrays(expected))


def arrays(states):
    return as_numpy(states.rows.state())


def as_numpy(state):
    return tuple(x.numpy() for x in state.arrays().values())


@pytest.mark.parametrize(("recorded", "undo", "removed"), [(False, None, 7), (True, 1, 15), (True, None, 33)])
def test_a_crop_that_reaches_too_far_changes_nothing(recorded, undo, removed):
    model = with_memory("llama", undo=undo)
    cache = DynamicCache()
    if recorded:
        cache = with_recording(model, cache)
    ids = prompt(46)
    _, cache = read(model, ids, cache)
    before = copy.deepcopy(cache)
    with pytest.raises(RuntimeError, match=r"Nothing was changed.*undo="):
        cache.crop(-removed)
    assert cache.get_seq_length() == 46
    for kept, expected in zip(cache.states, before.states):
        assert_same_bits(arrays(kept), arrays(expected))
    if recorded:
        cache.crop(-(14 if undo else 24))


def test_rows_are_chosen_repeated_and_reset(model):
    parts = [prompt(30), prompt(17), prompt(23)]
    batch = left_padded(parts)
    _, cache = read(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(rows)
    cache.batch_select_indices(torch.tensor([0, 2, 3]))  # 2, 0, 1
    cache.batch_repeat_interleave(2)
    order = [2, 2, 0, 0, 1, 1]
    new = torch.cat([prompt(20, seed) for seed in range(6)])
    mask = torch.cat([batch["attention_mask"][order], torch.ones(6, 20, dtype=torch.long)], dim=1)
    logits, _ = read(model, new, cache, attention_mask=mask)
    expected = full_pass_of(
        model, {"input_ids": torch.cat([batch["input_ids"][order], new], dim=1), "attention_mask": mask}
    )
    assert_close(logits.numpy(), expected[:, 30:].numpy(), "float64")
    cache.reset()
    logits, _ = read(model, IDS, cache)
    assert_close(logits.numpy(), full_pass(model, IDS).numpy(), "float64")


def test_beams_share_a_table_until_a_chunk_is_written(model):
    _, cache = read(model, prompt(16))
    cache.batch_repeat_interleave(4)
    states = cache.states[0]
    for step in range(7):
        read(model, torch.cat([prompt(1, seed) for seed in range(4)]), cache)
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        assert len(states.rows.tables.values) == 1, step
    read(model, torch.cat([prompt(1, seed) for seed in range(4)]), cache)
    assert len(states.rows.tables.values) == 4


def test_the_states_go_into_the_files_of_the_library(model, tmp_path):
    cache = with_states(DynamicCache(), model.base_model)
    assert cache.states[0].state is None
    read(model, torch.cat([IDS[:, :20], prompt(20, 3)]), cache)
    kept = {f"layers.{states.layer_idx}": states.state for states in cache.states}
    fwpkm.save_states(tmp_path / "states", kept, cache.states[0].config)
    before = [state.clone() for state in kept.values()]
    loaded = fwpkm.load_states(tmp_path / "states", cache.states[0].config, backend="torch")
    read(model, prompt(20, 5).repeat(2, 1), cache)  # the copies stay
    for state, old, new in zip(kept.values(), before, loaded.values()):
        for received in (state, new):
            assert_same_bits(as_numpy(received), as_numpy(old))


def test_a_cache_is_copied_and_pickled(model):
    _, cache = read(model, IDS[:, :20])
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected, _ = read(model, IDS[:, 20:], cache)
    for twin in twins:
        assert torch.equal(read(model, IDS[:, 20:], twin)[0], expected)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_the_argument_has_two_names(model):
    """Releases before 5.24 know the cache as past_key_values; so may callers."""
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS[:, :20], past_key_values=cache)
        logits = model.base_model(IDS[:, 20:], past_key_values=cache).last_hidden_state
    assert cache.states[0].columns == 30
    assert_close(model.lm_head(logits).detach().numpy(), full_pass(model, IDS)[:, 20:].numpy(), "float64")
    assert [keys is None for keys, *_ in cache] == [False] * 3 + [True] * 2


def test_a_compiled_model_reads_the_same(model):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = cache_of(compiled(IDS[:, :20], use_cache=True))
        logits = compiled(IDS[:, 20:], **{cache_name(model): cache}).logits
        assert_close(logits.numpy(), full_pass(model, IDS)[:, 20:].numpy(), "float64")
        assert_close(compiled(IDS, use_cache=False).logits.numpy(), full_pass(model, IDS).numpy(), "float64")
    torch._dynamo.reset()


def test_states_made_for_inference_are_read_on_outside(model):
    with torch.inference_mode():
        cache = cache_of(model(IDS[:, :20], use_cache=True))
    with torch.no_grad():
        logits = model(IDS[:, 20:], **{cache_name(model): cache}).logits
    assert_close(logits.numpy(), full_pass(model, IDS)[:, 20:].numpy(), "float64")


def test_gradients_through_a_cache_are_those_of_one_pass(model):
    model.zero_grad()
    first = model(IDS[:, :20], use_cache=True)
    second = model(IDS[:, 20:], **{cache_name(model): cache_of(first)})
    (first.logits.square().sum() + second.logits.square().sum()).backward()
    received = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(received[name], parameter.grad.numpy(), "float64", "gradient", name)
