"""Turns of a chat in one cache: rows that have ended rest, and masks of later calls agree with what was read."""

import copy

import pytest
import torch
from asserting import assert_close, assert_same_bits
from tiny_models import MODELS, PAD, cache_name, full_pass, left_padded, memories, prompt, read, with_memory
from transformers import DynamicCache

PROMPTS = [prompt(length, seed) for seed, length in enumerate((19, 8, 14))]
NEW, QUESTION = 20, torch.cat([prompt(6, seed) for seed in (7, 8, 9)])


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    family, fields = request.param
    return with_memory(family, **fields)


def first_turn(model, rows=3, **arguments):
    """A batch in which the first row ends at its fourth new token and another draws all; the cache; which are there."""
    batch = {name: x[:rows] for name, x in left_padded(PROMPTS).items()}
    cache, plain = DynamicCache(), {"do_sample": False, "max_new_tokens": NEW}
    drawn = model.generate(**batch, **plain)[:, -NEW:]
    eos = next(int(token) for token in drawn[0, 3:] if any(token not in row for row in drawn[1:]))
    arguments = {"pad_token_id": PAD, **plain, **arguments}
    ids = model.generate(**batch, **{cache_name(model): cache}, eos_token_id=eos, **arguments)
    ended = (ids[:, -NEW:] == eos).long()
    mask = torch.cat([batch["attention_mask"], (ended.cumsum(1) - ended == 0).long()], dim=1)
    assert ids.shape[1] == batch["input_ids"].shape[1] + NEW
    assert mask[0, -10:].sum() < 10
    assert mask[:, -1].any()
    return ids, mask, cache


def alone(model, ids, mask):
    """What a model says of one row without padding, in one pass that keeps no cache."""
    return full_pass(model, ids[mask.bool()][None])[0]


@pytest.mark.parametrize("pad", [PAD, "eos"])
def test_rows_that_have_ended_rest(model, pad):
    """The next turn says what a fresh call says, and the states are those of a text without the padding."""
    padding = {} if pad == PAD else {"pad_token_id": None}  # transformers then pads with the end of text
    ids, mask, cache = first_turn(model, **padding)
    assert cache.ended is None
    assert torch.equal(cache.seen, mask[:, :-1].bool())
    for row, states in ((row, states) for states in cache.states for row in range(3)):
        _, fresh = read(model, ids[row, :-1][mask[row, :-1].bool()][None])
        expected = fresh.states[cache.states.index(states)].rows.state()
        received = states.rows.state()
        assert int(received.position[row]) == int(expected.position)
        assert_close(received.memory.values[row].numpy(), expected.memory.values[0].numpy(), "float64")
        assert_close(received.memory.keys[row].numpy(), expected.memory.keys[0].numpy(), "float64")
        assert expected.maybe_uses is None or torch.equal(received.uses[row], expected.uses[0])
    asked, known = torch.cat([ids, QUESTION], dim=1), torch.nn.functional.pad(mask, (0, 6), value=1)
    plain = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": known}
    answers = model.generate(asked, **plain, **{cache_name(model): cache})
    assert torch.equal(answers, model.generate(asked, **plain))
    for row in range(3):
        said = alone(model, answers[row], torch.nn.functional.pad(known[row], (0, NEW), value=1))[-NEW - 1 : -1]
        assert torch.equal(said.argmax(-1), answers[row, -NEW:])


def test_rows_rest_without_a_mask_in_the_call(model):
    """transformers drops a mask that hides nothing, so that one must be made when the first row ends."""
    rows = torch.cat([PROMPTS[0], prompt(19, 5)])
    drawn = model.generate(rows, do_sample=False, max_new_tokens=NEW)[:, -NEW:]
    eos = next(int(token) for token in drawn[0, 2:] if token not in drawn[1])
    cache, answer = DynamicCache(), {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos}
    ids = model.generate(rows, **{cache_name(model): cache}, **answer)
    length = 19 + int((drawn[0] == eos).nonzero()[0]) + 1
    assert cache.seen.sum(1).tolist() == [length, 19 + NEW - 1]
    assert torch.equal(ids, model.generate(rows, use_cache=False, **answer))


def test_tokens_that_were_read_are_not_read_again(model):
    """transformers passes all of a prompt where it drafts, also to a cache that has read the start of it."""
    plain = {"do_sample": False, "max_new_tokens": 6}
    cache = DynamicCache()
    ids = model.generate(PROMPTS[0], **{cache_name(model): cache}, **plain)
    asked, states = torch.cat([ids, prompt(4, 5)], dim=1), cache.named_states()
    with pytest.raises(ValueError, match=r"the new tokens alone.*begin at \[0\], a cache of \[24\] tokens"):
        model.generate(asked, **{cache_name(model): cache}, prompt_lookup_num_tokens=5, **plain)
    with pytest.raises(ValueError, match=r"the new tokens alone.*begin at \[0\], a cache of \[24\] tokens"):
        read(model, asked, cache, attention_mask=torch.ones_like(asked), position_ids=torch.arange(34)[None])
    positions = torch.arange(2, 6).expand(3, -1)
    batch = left_padded(PROMPTS)
    _, of_three = read(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    with pytest.raises(ValueError, match=r"begin at \[2, 2, 2\], a cache of \[19, 8, 14\] tokens"):
        read(model, QUESTION[:, :4], of_three, attention_mask=mask, position_ids=positions)
    for name, state in cache.named_states().items():
        assert_same_bits(tuple(x.numpy() for x in state.memory), tuple(x.numpy() for x in states[name].memory))
    answer = model.generate(asked, **{cache_name(model): cache}, **plain)
    assert torch.equal(answer, model.generate(asked, **plain))


def test_rows_that_ended_otherwise_go_on(model):
    """Without an end of text transformers draws tokens for all rows until the last has ended: they are no padding."""
    cache, ids = DynamicCache(), torch.cat([PROMPTS[0], prompt(19, 5)])
    done = [lambda ids, scores, **kwargs: torch.tensor([True, ids.shape[1] >= 30])]
    plain = {"do_sample": False, "max_new_tokens": NEW, "stopping_criteria": done}
    ids = model.generate(ids, **{cache_name(model): cache}, **plain)
    assert ids.shape[1] == 30
    assert cache.seen is None
    assert all(states.rows.position.tolist() == [29, 29] for states in cache.states)


def test_a_failed_call_forgets_who_had_ended(model):
    def fail(ids, scores, **kwargs):
        raise ArithmeticError

    cache = DynamicCache()
    with pytest.raises(ArithmeticError):
        model.generate(
            PROMPTS[0], **{cache_name(model): cache}, eos_token_id=1, max_new_tokens=2, stopping_criteria=[fail]
        )
    assert cache.ended is None


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([(0, 10, 20, 0)], r"hides 10 tokens of row 0, from column 10 on, which the memories have read"),
        ([(1, 0, 2, 1)], r"shows 2 tokens of row 1, from column 0 on, which the memories have not read"),
        ([(0, 3, 4, 0), (1, 0, 2, 1)], r"hides 1 tokens of row 0, from column 3 on"),
    ],
)
def test_a_mask_that_contradicts_what_was_read(model, columns, said):
    batch = left_padded([prompt(30), prompt(17)])
    _, cache = read(model, **_named(batch))
    before = copy.deepcopy(cache)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 6), value=1)
    good = mask.clone()
    for row, start, stop, value in columns:
        mask[row, start:stop] = value
    with pytest.raises(ValueError, match=said + r".*cache\.seen.*begin with an empty cache"):
        read(model, QUESTION[:2], cache, attention_mask=mask)
    for kept, expected in zip(cache.states, before.states):
        assert kept.columns == 30
        assert_same_bits(
            tuple(x.numpy() for x in kept.rows.state().memory), tuple(x.numpy() for x in expected.rows.state().memory)
        )
    logits, _ = read(model, QUESTION[:2], cache, attention_mask=good)
    assert logits.isfinite().all()


def _named(batch):
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_no_mask_contradicts_padding_and_hiding_contradicts_none(model):
    batch = left_padded([prompt(30), prompt(17)])
    _, cache = read(model, **_named(batch))
    with pytest.raises(ValueError, match="shows 13 tokens of row 1, from column 0 on"):
        read(model, QUESTION[:2], cache)
    _, cache = read(model, prompt(30))
    mask = torch.ones(1, 36, dtype=torch.long)
    read(model, QUESTION[:1], copy.deepcopy(cache), attention_mask=mask)
    mask[0, 10:20] = 0
    with pytest.raises(ValueError, match="hides 10 tokens of row 0, from column 10 on"):
        read(model, QUESTION[:1], cache, attention_mask=mask)
    asked = torch.cat([prompt(30), QUESTION[:1]], dim=1)
    with pytest.raises(ValueError, match="hides 10 tokens of row 0"):
        model.generate(asked, attention_mask=mask, max_new_tokens=2, **{cache_name(model): cache})


def test_early_exit_is_refused_before_anything_changes(model):
    """It drafts with the first layers alone, which transformers does by changing the model's config."""
    before, layers = full_pass(model, PROMPTS[0]), model.config.num_hidden_layers
    with pytest.raises(ValueError, match=r"does not serve it: pass assistant_model=.*Received: assistant_early_exit=2"):
        model.generate(PROMPTS[0], assistant_early_exit=2, max_new_tokens=NEW, do_sample=False)
    assert model.config.num_hidden_layers == layers
    assert torch.equal(full_pass(model, PROMPTS[0]), before)
    assert len(memories(model)) == 2
