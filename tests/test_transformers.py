"""Models with memory: insertion, saving, training and refusals (caches and ``generate`` have files of their own)."""

import copy
import dataclasses
import pickle

import cloudpickle
import pytest
import torch
from asserting import assert_close, assert_same_bits
from processes import python
from tiny_models import (
    FAMILIES,
    LAYERS,
    MEMORY,
    PAD,
    bare,
    cache_name,
    full_pass,
    left_padded,
    memories,
    prompt,
    read,
    with_memory,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from fwpkm import FwPKMConfig
from fwpkm.integrations.transformers import MemoryCache, insert_memory, loading

IDS = prompt(30)


@pytest.fixture(scope="module")
def model():
    return with_memory("llama")


# Insertion


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_memory_is_the_identity(family, dtype):
    model = bare(family, dtype=dtype)
    batch = left_padded([prompt(30), prompt(17)])
    before = [model(**batch, use_cache=use_cache).logits for use_cache in (True, False)]
    assert insert_memory(model, LAYERS, **MEMORY) is model
    after = [model(**batch, use_cache=use_cache).logits for use_cache in (True, False)]
    for a, b in zip(before, after):
        assert torch.equal(a, b)
    for memory in memories(model):
        assert memory.query_proj.weight.dtype == dtype
        assert memory.memory.values.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_models_that_share_a_config_do_not_share_memories():
    one = bare("llama")
    two = type(one)(one.config).double().eval()
    assert two.config is one.config
    insert_memory(one, LAYERS, **MEMORY)
    assert not memories(two)
    assert not hasattr(two.config, "fwpkm_memory")
    configs = {id(m.config) for m in one.modules() if isinstance(getattr(m, "config", None), LlamaConfig)}
    assert configs == {id(one.config)}
    three = type(one)(one.config)  # whose config remembers, so it is built with new memories
    assert len(memories(three)) == 2
    assert all((memory.output_proj.weight == 0).all() for memory in memories(three))


@pytest.mark.parametrize("make", [copy.deepcopy, *(lambda x, m=m: m.loads(m.dumps(x)) for m in (pickle, cloudpickle))])
def test_a_copy_is_whole_and_apart(model, make):
    twin = make(model)
    assert torch.equal(full_pass(twin, IDS), full_pass(model, IDS))
    with torch.no_grad():
        memories(twin)[0].output_proj.weight.zero_()
    assert not torch.equal(full_pass(twin, IDS), full_pass(model, IDS))
    answers = [
        twin.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded(tmp_path, dtype):
    saved = with_memory("qwen3", dtype=dtype, learning_rate=0.5, undo=7, learn_memory=True)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert_same_bits(tuple(map(bits, loaded.state_dict().values())), tuple(map(bits, saved.state_dict().values())))
    if dtype.itemsize > 2:  # a cast rounds transformers' rotary frequencies too, loading does not
        assert torch.equal(full_pass(loaded, IDS), full_pass(saved, IDS))
    for memory in memories(loaded):
        assert memory.config == dataclasses.replace(FwPKMConfig(**MEMORY), learning_rate=0.5)
        assert memory.learn_memory
        assert memory.memory.values.dtype == (dtype if dtype == torch.float64 else torch.float32)
    part = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert len(memories(part)) == 2


def test_cloudpickle_takes_a_cache(model):
    _, cache = read(model, IDS[:, :20])
    twin = cloudpickle.loads(cloudpickle.dumps(cache))
    assert torch.equal(read(model, IDS[:, 20:], twin)[0], read(model, IDS[:, 20:], cache)[0])


def bits(x):
    return x.view(torch.uint8).numpy()


def test_memories_that_a_checkpoint_lacks_are_new_ones(tmp_path):
    """A checkpoint of the bare model under a config that remembers memories: as insert_memory makes them."""
    model = bare("llama", initializer_range=0.3)
    model.save_pretrained(tmp_path)
    config = insert_memory(copy.deepcopy(model), LAYERS, **MEMORY).config
    torch.manual_seed(3)
    loaded = type(model).from_pretrained(tmp_path, config=config, dtype=torch.float64).eval()
    assert torch.equal(full_pass(loaded, IDS), full_pass(model, IDS))
    for memory in memories(loaded):
        assert 0.2 < memory.memory.values.std() * 8**0.5 < 1.5
        assert 0.01 < memory.query_proj.weight.std() < 0.03
        assert (memory.output_proj.weight == 0).all()


def test_importing_the_core_leaves_transformers_alone(tmp_path):
    done = python("-c", "import fwpkm, sys; print('transformers' in sys.modules)", cwd=tmp_path)
    assert done.stdout == "False\n"


def test_what_is_missing_is_named(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import fwpkm.integrations.transformers"
    done = python("-c", code, cwd=tmp_path)
    assert "pip install 'fwpkm[transformers]'" in done.stderr
    code = "from transformers import cache_utils; del cache_utils.LinearAttentionCacheLayerMixin"
    code += "; import fwpkm.integrations.transformers"
    done = python("-c", code, cwd=tmp_path)
    assert "cannot import name 'LinearAttentionCacheLayerMixin'" in done.stderr
    assert "needs transformers 5.17 to 5.24" in done.stderr


def test_another_release_is_told_by_what_it_lacks(monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "_initialize_weights")
    with pytest.raises(ImportError, match=r"needs PreTrainedModel._initialize_weights.*5.17 to 5.24.*no such method"):
        loading.install()
    monkeypatch.undo()
    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", lambda self: None)
    with pytest.raises(ImportError, match=r"_initialize_weights\(self, module, ...\).*has it with self$"):
        loading.install()


# Training


def gradients(model, **arguments):
    model.zero_grad()
    model.train()
    model(**arguments).logits.square().mean().backward()
    model.eval()
    return {name: p.grad.clone().numpy() for name, p in model.named_parameters() if p.grad is not None}


def test_the_memory_is_trained_while_the_base_is_frozen():
    model = insert_memory(bare("llama"), LAYERS, **MEMORY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".fwpkm." in name
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = prompt(24, seed=2).repeat(2, 2)
    base = {name: p.clone() for name, p in model.named_parameters() if ".fwpkm." not in name}
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".fwpkm." in name)


@pytest.mark.parametrize("told", ["cu_seq_lens_q", "position_ids"])
def test_packed_sequences_equal_separate_ones(model, told):
    parts = [prompt(length, seed) for seed, length in enumerate((21, 1, 17))]
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    packed = {"input_ids": torch.cat(parts, dim=1), "position_ids": positions, "use_cache": False}
    if told == "cu_seq_lens_q":  # attention goes by the positions here, the memory must by what it is told
        packed["cu_seq_lens_q"] = torch.tensor([0, 21, 22, 39])
    logits = model(**packed).logits
    alone = torch.cat([model(p, use_cache=False).logits for p in parts], dim=1)
    assert_close(logits.detach().numpy(), alone.detach().numpy(), "float64")
    model.zero_grad()
    alone.square().mean().backward()
    expected = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    received = gradients(model, **packed)
    for name, gradient in expected.items():
        assert_close(received[name], gradient, "float64", "gradient", name)


@pytest.mark.parametrize("positions", [None, [range(30)], [[*range(12), *range(18)]]], ids=["none", "go on", "other"])
def test_packed_sequences_need_positions_that_begin_anew_with_them(model, positions):
    """Attention goes by the positions, and would look from one sequence into the one before."""
    positions = None if positions is None else torch.tensor([list(row) for row in positions])
    with pytest.raises(ValueError, match=r"position_ids must begin anew .*, at \[0, 13\]"):
        model(IDS, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 13, 30]), use_cache=False)


@pytest.mark.parametrize("use_cache", [None, True])
def test_packed_sequences_stay_apart_whatever_use_cache_says(model, use_cache):
    """With a cache transformers' attention looks across them."""
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    alone = model(IDS[:, 13:], use_cache=False).logits
    packed = model(IDS, position_ids=positions, use_cache=use_cache).logits[:, 13:]
    assert_close(packed.detach().numpy(), alone.detach().numpy(), "float64")


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match=r"continuous batching .* call generate on a left-padded batch"):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, reentrant):
    batch = left_padded([prompt(30), prompt(17)])
    expected = gradients(model, **batch, use_cache=False)
    checkpointed = copy.deepcopy(model)
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    received = gradients(checkpointed, **batch)  # a cache by default, which transformers then leaves out
    assert received.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(received[name], gradient, "float64", "gradient", name)
    checkpointed.train()
    with pytest.raises(ValueError, match="gradient checkpointing reads tokens twice"):
        checkpointed(IDS, **{cache_name(model): DynamicCache()})


def test_masked_rows_equal_rows_alone(model):
    parts = [prompt(30), prompt(17)]
    batch = left_padded(parts)
    for use_cache in (True, False):
        logits = model(**batch, use_cache=use_cache).logits.detach()
        for row, part in zip(logits, parts):
            assert_close(row[-part.shape[1] :].numpy(), full_pass(model, part)[0].numpy(), "float64")


# Refusals


def test_caches_that_do_not_fit(model):
    name = cache_name(model)
    _, plain = read(bare("llama"), IDS)
    with pytest.raises(ValueError, match="holds 30 tokens that were read without this model's memory"):
        model(IDS, **{name: plain})
    with pytest.raises(ValueError, match="without this model's memory"):
        model.generate(torch.cat([IDS, IDS], dim=1), max_new_tokens=2, **{name: plain})
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match=r"must be a DynamicCache.*Received: StaticCache"):
        model(IDS, **{name: static})
    for implementation in ("static", "offloaded_static"):
        with pytest.raises(ValueError, match=r"must be a DynamicCache.*leave cache_implementation out"):
            model.generate(IDS, cache_implementation=implementation, max_new_tokens=3)
    _, cache = read(model, IDS)
    with pytest.raises(ValueError, match=r"Received: a cache of 1 rows, a call of 2"):
        model(IDS[:, :2].repeat(2, 1), **{name: cache})
    read(model, IDS[:, :1], cache)  # nothing was half read
    cache.crop(-1)
    other = copy.deepcopy(cache)
    other.states[0].crop(-1)
    with pytest.raises(ValueError, match="30 tokens of attention and 29 of the memory"):
        model(IDS, **{name: other})
    _, other = read(with_memory("llama", chunk_size=4), IDS)
    with pytest.raises(ValueError, match="Received: one of another model"):
        model(IDS, **{name: other})
    _, other = read(with_memory("llama"), IDS[:, :20])
    with pytest.raises(ValueError, match="another model has read"):
        model(IDS[:, 20:], **{name: other})
    with pytest.raises(ValueError, match="keep no cache"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 30]), **{name: DynamicCache()})
    with pytest.raises(ValueError, match="negative integer"):
        cache.crop(3)


@pytest.mark.parametrize("shape", [(1, 1, 30, 30), (1, 29), (2, 30)])
def test_masks_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be 2-D, \[1, 30\]"):
        model(IDS, attention_mask=torch.ones(shape, dtype=torch.long))


def test_packed_rows_that_do_not_fit(model):
    with pytest.raises(ValueError, match="packs sequences into one row"):
        model(IDS.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 60]), use_cache=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": (1, 3)}, ValueError, r"distinct integers from 0 to 2.*layers=\(1, 3\)$"),
        ({"layers": (1, 4)}, ValueError, r"distinct integers from 0 to 2.*layers=\(1, 4\), the default$"),
        ({"layers": 1}, TypeError, r"layers must be a tuple of integers, such as \(1, 4\)\. Received: layers=1"),
        ({"layers": (-1,)}, ValueError, "distinct integers"),
        ({"layers": (1, 1)}, ValueError, "distinct integers"),
        ({"layers": ()}, ValueError, "at least one"),
        ({"layers": (True,)}, ValueError, "distinct integers"),
        ({"slots": 3}, TypeError, "takes no argument 'slots'"),
        ({"top_k": 9}, ValueError, "top_k must be at most num_subkeys"),
        ({"memory_scope": "batch"}, ValueError, "memory_scope must be 'sequence'"),
        ({"usage_weight": 0.5}, ValueError, r"usage_weight must be 0 here: .*usage_weight=0\.5$"),
        ({"undo": 0}, ValueError, "undo must be an integer of at least 1"),
        ({"gated": "no"}, ValueError, "gated"),
        ({"config": {}}, ValueError, "cfg must be an FwPKMConfig"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    model = bare("llama")
    with pytest.raises(error, match=message):
        insert_memory(model, **{"layers": LAYERS, **MEMORY, **arguments})
    assert not memories(model)
    assert not hasattr(model.config, "fwpkm_memory")
    full_pass(model, IDS)


def test_models_that_do_not_fit(model):
    with pytest.raises(ValueError, match=r"has memories already, before decoder layers \[0, 2\]"):
        insert_memory(model, LAYERS, **MEMORY)
    with pytest.raises(ValueError, match=r"must be a PreTrainedModel.*Linear"):
        insert_memory(torch.nn.Linear(2, 2))
    small = {"vocab_size": 9, "n_embd": 8, "n_layer": 2, "n_head": 2}
    with pytest.raises(ValueError, match="cannot be put into a GPT2LMHeadModel: it has no list of decoder layers"):
        insert_memory(GPT2LMHeadModel(GPT2Config(**small)), (0,))
    small = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="cannot be put into a T5"):
        insert_memory(T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=PAD)), (0,))


def test_a_layer_alone_does_not_know_its_call(model):
    with pytest.raises(RuntimeError, match="call the model, not the layer"):
        model.base_model.layers[0](torch.zeros(1, 2, 32, dtype=torch.float64))
    assert isinstance(read(model, IDS)[1], MemoryCache)
