"""States that are put back into a cache: ``generate`` from them, against passes that begin from them without one."""

import copy

import pytest
import torch
from asserting import assert_close, assert_same_bits
from tiny_models import (
    LAYERS,
    MEMORY,
    bare,
    cache_name,
    full_pass,
    left_padded,
    memories,
    noisy,
    prompt,
    read,
    with_memory,
)
from transformers import DynamicCache

import fwpkm
from fwpkm.backends.torch import concat, flush, pack, pending, select, unpack
from fwpkm.integrations.transformers import MemoryCache, cache_from_states

TODAY = [prompt(length, 20 + length) for length in (45, 21, 34)]
"""What three conversations have said before; none ends with a chunk."""
NEXT = [prompt(length, 50 + length) for length in (3, 19, 8)]
"""How they go on a week later."""
NEW = 26  # three chunks' ends and more
NAMES = [f"layers.{layer_idx}.fwpkm" for layer_idx in LAYERS]


@pytest.fixture(
    scope="module",
    params=[("llama", {}), ("qwen3", {"boundary": "wait", "lookahead": 3, "usage_weight": 0.25})],
    ids=str,
)
def model(request):
    family, fields = request.param
    return with_memory(family, **fields)


def config(model):
    return memories(model)[0].config


def said(model, rows=(0, 1, 2)):
    """The states of conversations of today, each read alone, as rows of a batch."""
    found = [read(model, TODAY[row])[1].named_states() for row in rows]
    return {name: concat(config(model), [states[name] for states in found]) for name in NAMES}


def bits(states):
    return tuple(x.numpy() for state in states.values() for x in state.arrays().values())


class Reading:
    """The same weights without the integration: each pass reads all its tokens anew, from given states.

    Attributes:
        model: what answers; states are repeated as ``generate`` repeats the rows of a batch.
        after: the states after the last pass.
    """

    def __init__(self, model, states):
        self.model, self.states, self.after, self.mask = bare(model.config.model_type), states, {}, None
        weights = {name: x for name, x in model.state_dict().items() if ".fwpkm." not in name}
        self.model.load_state_dict(weights)
        self.model.model.register_forward_pre_hook(self.look, with_kwargs=True)
        for name, layer_idx, memory in zip(NAMES, LAYERS, memories(model)):
            layer = self.model.model.layers[layer_idx]
            layer.register_forward_pre_hook(lambda _, args, n=name, m=memory: self.add(n, m, *args))

    def look(self, decoder, args, kwargs):
        mask = kwargs.get("attention_mask")
        self.mask = None if mask is None else mask.bool()

    def add(self, name, memory, hidden):
        state = self.states[name]
        rows = torch.arange(len(state.position)).repeat_interleave(len(hidden) // len(state.position))
        y, self.after[name] = memory(hidden, select(memory.config, state, rows), self.mask)
        return (hidden + y,)

    def generate(self, **arguments):
        return generate(self.model, use_cache=False, **arguments)

    def logits(self, ids, **arguments):
        with torch.no_grad():
            return self.model(ids, use_cache=False, **arguments).logits


def generate(model, *, states=None, cache=None, new=NEW, **arguments):
    """The whole sequences; greedy unless told."""
    cache = cache_from_states(model, states) if states else cache
    given = {} if cache is None else {cache_name(model): cache}
    return model.generate(**{"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **given, **arguments})


def test_a_pass_from_states_equals_the_reading(model):
    """Logits, and the states after it; in pieces too, and with the pending tokens of today."""
    states, batch = said(model), left_padded(NEXT)
    assert (pending(config(model), states[NAMES[0]]) % config(model).chunk_size > 0).all()
    mask = batch["attention_mask"]
    reading = Reading(model, states)
    expected = reading.logits(**{"ids": batch["input_ids"], "attention_mask": mask})
    for sizes in ([19], [7, 1, 11]):
        cache, parts, stop = cache_from_states(model, states), [], 0
        for size in sizes:
            start, stop = stop, stop + size
            parts.append(read(model, batch["input_ids"][:, start:stop], cache, attention_mask=mask[:, :stop])[0])
        there = mask.bool()
        assert_close(torch.cat(parts, dim=1)[there].numpy(), expected[there].numpy(), "float64")
        assert cache.get_seq_length() == 19  # attention's tokens are counted anew, the memories' go on
        assert cache.states[0].rows.position.tolist() == [48, 40, 42]
        after = cache.named_states()
        assert list(after) == NAMES
        assert_close(bits(after), bits({name: x.detach() for name, x in reading.after.items()}), "float64")
    empty, _ = read(model, batch["input_ids"], attention_mask=mask)
    assert not torch.allclose(empty[there], expected[there], atol=1e-3)


def test_conversations_saved_and_put_together(model, tmp_path):
    """From files of states and of packed states, one for each conversation."""
    cfg, expected = config(model), bits(said(model))
    for row, ids in enumerate(TODAY):
        states = read(model, ids)[1].named_states()
        fwpkm.save_states(tmp_path / f"{row}", states, cfg)
        packed = {
            name: pack(cfg, state, model.base_model.get_submodule(name).memory()) for name, state in states.items()
        }
        fwpkm.save_packed(tmp_path / f"{row}.packed", packed)
    loaded = [fwpkm.load_states(tmp_path / f"{row}", cfg, backend="torch") for row in range(3)]
    found = [fwpkm.load_packed(tmp_path / f"{row}.packed") for row in range(3)]
    together = [
        {name: concat(cfg, [states[name] for states in loaded]) for name in NAMES},
        {
            name: unpack(cfg, [states[name] for states in found], model.base_model.get_submodule(name).memory())
            for name in NAMES
        },
    ]
    answer = Reading(model, said(model)).generate(**left_padded(NEXT))
    for states in together:
        assert_same_bits(bits(states), expected)
        assert_same_bits(bits(cache_from_states(model, states).named_states()), expected)
        assert torch.equal(generate(model, states=states, **left_padded(NEXT)), answer)
        assert_same_bits(bits(states), expected)  # what was written lies in the cache


BEAMS = {"num_beams": 4}
SAMPLED = {"do_sample": True, "temperature": 0.1}  # so that the memory decides, not chance alone


@pytest.mark.parametrize(
    "arguments",
    [{}, SAMPLED, SAMPLED | {"num_return_sequences": 3}, BEAMS, BEAMS | {"num_return_sequences": 2}],
    ids=["greedy", "sampling", "several sequences", "beams", "some of the beams"],
)
@pytest.mark.parametrize("rows", [(1,), (0, 1, 2)], ids=["one row", "left-padded rows"])
def test_generate_from_states_equals_the_reading(model, rows, arguments):
    states, batch, answers = said(model, rows), left_padded([NEXT[row] for row in rows]), []
    for said_by in (lambda **a: generate(model, states=states, **a), Reading(model, states).generate):
        torch.manual_seed(3)
        answers.append(said_by(**batch, **arguments))
    assert torch.equal(*answers)
    torch.manual_seed(3)
    assert not torch.equal(generate(model, **batch, **arguments), answers[1])  # nor does a memory of nothing say so


def test_a_text_that_has_ended_is_flushed_before(model):
    """Then what was pending is found from the first token on."""
    states = {name: flush(config(model), state)[0] for name, state in said(model).items()}
    assert not pending(config(model), states[NAMES[0]]).any()
    batch = left_padded(NEXT)
    assert torch.equal(generate(model, states=states, **batch), Reading(model, states).generate(**batch))


def test_turns_go_on_in_the_cache(model):
    """The second turn's prompt holds the first one; the memories have read both, and today's conversation before."""
    states, batch = said(model), left_padded(NEXT)
    reading, cache = Reading(model, states), cache_from_states(model, states)
    first = generate(model, cache=cache, new=11, **batch)
    assert torch.equal(first, reading.generate(new=11, **batch))
    asked = torch.cat([first, torch.cat([prompt(6, seed) for seed in (7, 8, 9)])], dim=1)
    known = torch.nn.functional.pad(batch["attention_mask"], (0, 17), value=1)
    second = generate(model, cache=cache, input_ids=asked, attention_mask=known, new=13)
    assert torch.equal(second, reading.generate(input_ids=asked, attention_mask=known, new=13))
    assert_close(bits(cache.named_states()), bits(reading.after), "float64")


def test_drafts_from_states(model):
    """Of which most are taken back, over chunks' ends, to what the states were before and not beyond."""
    states, ids = said(model, [0]), prompt(5, 7)
    expected = Reading(model, states).generate(input_ids=ids, new=36)
    for drafts in ({"assistant_model": noisy(model, 0.02)}, {"assistant_model": noisy(model, 5.0)}):
        assert torch.equal(generate(model, states=states, input_ids=ids, new=36, **drafts), expected)
    ids = ids.repeat(1, 4)
    expected = Reading(model, states).generate(input_ids=ids)
    assert torch.equal(generate(model, states=states, input_ids=ids, prompt_lookup_num_tokens=12), expected)


def test_a_crop_reaches_back_to_the_states(model):
    states = said(model)
    cache = cache_from_states(model, states)
    cache.activate_past_recording()
    read(model, torch.cat([prompt(6, seed) for seed in range(3)]), cache)
    cache.crop(-6)
    received = cache.named_states()
    for name, state in states.items():
        assert_same_bits(bits({name: received[name]}), bits({name: state}))


def test_a_cache_from_states_is_a_cache(model):
    """It is copied, its rows are chosen before a call, and it is emptied."""
    states = said(model)
    cache = cache_from_states(model, states)
    assert isinstance(cache, MemoryCache)
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = NEXT[2].repeat(3, 1)
    expected = Reading(model, said(model, [2, 0, 0])).logits(ids)
    assert_close(read(model, ids, cache)[0].numpy(), expected.numpy(), "float64")
    assert_same_bits(bits(twin.named_states()), bits(states))
    twin.reset()
    with pytest.raises(ValueError, match=r"no states yet.*Received: a cache before its first call"):
        twin.named_states()
    assert_close(read(model, NEXT[1], twin)[0].numpy(), full_pass(model, NEXT[1]).numpy(), "float64")


def test_gradients_pass_into_the_states(model):
    """As through a cache: what was read before can be trained."""
    states = said(model, [1])
    values = states[NAMES[1]].memory.values.requires_grad_()
    logits = model(NEXT[1], **{cache_name(model): cache_from_states(model, states)}).logits
    logits.square().sum().backward()
    received, values.grad = values.grad, None
    reading = Reading(model, states)
    reading.model(NEXT[1], use_cache=False).logits.square().sum().backward()
    assert values.grad.abs().sum() > 0
    assert_close(received.numpy(), values.grad.numpy(), "float64", "gradient")


# Refusals


@pytest.fixture(scope="module")
def llama():
    return with_memory("llama")


def with_first(states, change):
    return {**states, NAMES[0]: change(states[NAMES[0]])}


def of_another(**fields):
    return lambda s: read(with_memory("llama", **fields), TODAY[0])[1].named_states()[NAMES[0]]


def narrow(state):
    return state.map(lambda x: x.bfloat16() if x.dtype.is_floating_point else x)


FIRST = r"states\['layers.0.fwpkm'\]"
EACH = r"states must hold a state for each memory of the model, by name: layers.0.fwpkm, layers.2.fwpkm\. Received: "
MISTAKES = {
    "a list": (lambda s: list(s.values()), EACH + "list"),
    "one only": (lambda s: {NAMES[0]: s[NAMES[0]]}, EACH + r"layers\.0\.fwpkm$"),
    "none": (lambda s: {}, EACH + "none"),
    "other layers": (lambda s: dict(zip(["layers.0.fwpkm", "layers.1.fwpkm"], s.values())), EACH + ".*layers.1.fwpkm"),
    "an array": (lambda s: with_first(s, lambda x: x.position), FIRST + r".*fwpkm\.State.*Received: Tensor"),
    "packed": (
        lambda s: with_first(s, lambda x: pack(fwpkm.FwPKMConfig(**MEMORY), x, x.memory)),
        FIRST + r".*fwpkm\.State.*Received: PackedState",
    ),
    "of other slots": (lambda s: with_first(s, of_another(num_subkeys=16)), FIRST + r": memory\.keys.*16"),
    "of other chunks": (lambda s: with_first(s, of_another(chunk_size=16)), FIRST + r": state\.pending_query.*16"),
    "of other rows": (
        lambda s: with_first(s, lambda x: select(fwpkm.FwPKMConfig(**MEMORY), x, [0])),
        r"states must be of one batch.*Received: layers\.0\.fwpkm of 1 rows, layers\.2\.fwpkm of 3 rows",
    ),
    "in float32": (
        lambda s: with_first(s, lambda x: x.to(torch.float32)),
        FIRST + r" must have tables of the memory's dtype, float64: .*Received: float32",
    ),
    "rounded": (lambda s: with_first(s, narrow), FIRST + r": .*narrower ones have lost digits.*bfloat16"),
    "elsewhere": (
        lambda s: with_first(s, lambda x: x.map(lambda y: y.to("meta"))),
        FIRST + r" must lie where its memory lies, on cpu: .*to_device.*Received: meta",
    ),
    "of two readings": (
        lambda s: with_first(s, lambda x: x._replace(position=x.position + 1)),
        r"states must be of one reading.*Received: layers\.0\.fwpkm at \[",
    ),
    "before they began": (
        lambda s: with_first(s, lambda x: x._replace(position=-x.position)),
        FIRST + r": state\.position must hold numbers of at least 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_no_state_of_the_model_is_refused(llama, change, message):
    states = said(llama)
    wrong = change(states)
    with pytest.raises(ValueError, match=message):
        cache_from_states(llama, wrong)


def test_models_that_take_no_states(llama):
    with pytest.raises(ValueError, match=r"must have memories.*insert_memory.*Received: a LlamaForCausalLM without"):
        cache_from_states(bare("llama"), said(llama))
    with pytest.raises(ValueError, match=r"must be a PreTrainedModel.*Received: Linear"):
        cache_from_states(torch.nn.Linear(2, 2), said(llama))
    other = with_memory("llama", seed=1)
    with pytest.raises(ValueError, match="another model has read"):
        generate(other, cache=cache_from_states(llama, said(llama)), **left_padded(NEXT))


@pytest.mark.parametrize(
    ("prompts", "arguments"),
    [(2, {}), (2, {"num_beams": 4}), (1, {"num_beams": 3})],
    ids=["greedy", "beams", "as many beams as rows"],
)
def test_prompts_of_other_rows_change_nothing(llama, prompts, arguments):
    states = said(llama)
    cache = cache_from_states(llama, states)
    with pytest.raises(ValueError, match=r"must be of the rows of the call.*Received: a cache of 3 rows, a call of"):
        generate(llama, cache=cache, **left_padded(NEXT[:prompts]), **arguments)
    arguments = {} if prompts == 1 else arguments
    assert_same_bits(bits(cache.named_states()), bits(states))
    assert torch.equal(
        generate(llama, cache=cache, **left_padded(NEXT), **arguments),
        Reading(llama, states).generate(**left_padded(NEXT), **arguments),
    )


def test_a_cache_that_has_read_is_not_repeated(llama):
    """Its attention is of the rows that it was filled with."""
    cache = cache_from_states(llama, said(llama, [0]))
    generate(llama, cache=cache, input_ids=NEXT[0], new=3)
    asked = torch.cat([NEXT[0], prompt(9)], dim=1)
    with pytest.raises(ValueError, match="a cache of 1 rows, a call of 4"):
        generate(llama, cache=cache, input_ids=asked, num_beams=4)


@pytest.mark.parametrize(
    "begin", [lambda model: cache_from_states(model, said(model, [0])), lambda model: DynamicCache()]
)
def test_a_cache_that_is_not_to_be_used_is_refused(llama, begin):
    """transformers fills it with the whole text at each step, which the memories would read again."""
    cache = begin(llama)
    with pytest.raises(ValueError, match=r"use_cache=False reads the whole text anew.*leave one of the two out"):
        generate(llama, cache=cache, input_ids=NEXT[0], use_cache=False)
    assert cache.get_seq_length() == 0


def test_an_empty_cache_has_no_states_to_name(llama):
    cache = DynamicCache()
    generate(llama, cache=cache, input_ids=NEXT[0], new=3)
    assert list(cache.named_states()) == NAMES
