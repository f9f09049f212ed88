"""Adapters of peft on models with memory, and weights that accelerate offloads."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from asserting import assert_close
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import LAYERS, MEMORY, bare, cache_name, full_pass, memories, prompt, read, with_memory
from transformers import AutoModelForCausalLM

import fwpkm
from fwpkm.integrations.transformers import cache_from_states, insert_memory

IDS = torch.cat([prompt(20, 1), prompt(20, 2)]).repeat(1, 2)
ANSWER = {"max_new_tokens": 12, "do_sample": False}
ATTENTION = ["q_proj", "v_proj"]

pytestmark = [
    # peft asks models for this by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]


def lora(model, **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def trained(model, steps=2):
    """After a few steps, each of which changes all that is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


def names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ATTENTION}),
        ("qwen3", {"target_modules": ATTENTION, "modules_to_save": ["fwpkm"]}),
        ("llama", {"target_modules": ["query_proj", "value_proj", "gate_proj", "output_proj"], "use_dora": True}),
        ("qwen3", {"target_modules": "all-linear"}),
    ],
    ids=["attention", "memories saved", "memories adapted", "all linear"],
)
def test_adapters_are_wrapped_trained_saved_and_merged(family, options, tmp_path):
    base = with_memory(family)
    base.save_pretrained(tmp_path / "base")
    before = full_pass(base, IDS)
    model = lora(base, **options).eval()
    assert_close(full_pass(model, IDS).numpy(), before.numpy(), "float64")
    ours = [name for name in names(model) if ".fwpkm." in name]
    assert bool(ours) == (options != {"target_modules": ATTENTION})
    trained(model)
    after = full_pass(model, IDS)
    assert not torch.allclose(after, before)
    answers = model.generate(input_ids=IDS, **ANSWER)
    assert torch.equal(answers, model.generate(input_ids=IDS, use_cache=False, **ANSWER))
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(full_pass(loaded, IDS), after)
    with model.disable_adapter():
        assert_close(full_pass(model, IDS).numpy(), before.numpy(), "float64")
    merged = model.merge_and_unload()
    assert_close(full_pass(merged, IDS).numpy(), after.numpy(), "float64")
    assert torch.equal(merged.generate(IDS, **ANSWER), answers)


def test_saved_memories_take_their_tables_along(tmp_path):
    """A base in which memories were inserted anew has other tables, until the adapter brings its own."""
    model = trained(lora(with_memory("llama"), target_modules=ATTENTION, modules_to_save=["fwpkm"]))
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    base = insert_memory(bare("llama"), LAYERS, **MEMORY)
    torch.manual_seed(99)
    for memory in memories(base):
        memory.reset_parameters()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(full_pass(loaded, IDS), full_pass(model, IDS))


def test_memories_go_on_from_states_under_adapters():
    model = trained(lora(with_memory("llama"), target_modules=ATTENTION, modules_to_save=["fwpkm"]))
    before = read(model.get_base_model(), IDS)[1].named_states()

    def answer(model):
        cache = cache_from_states(model, before)
        return model.generate(input_ids=prompt(9).repeat(2, 1), **{cache_name(model.base_model): cache}, **ANSWER)

    answers = answer(model)
    assert torch.equal(answers, answer(model.merge_and_unload()))
    assert not torch.equal(answers, model.generate(input_ids=prompt(9).repeat(2, 1), **ANSWER))


def test_names_that_the_memories_share_with_mlps():
    shared = lora(with_memory("llama"), target_modules=["gate_proj", "up_proj", "down_proj"])
    assert any(".fwpkm.gate_proj." in name for name in names(shared))
    told = lora(with_memory("llama"), target_modules=r".*mlp\.(gate|up|down)_proj")
    assert names(told)
    assert not any(".fwpkm." in name for name in names(told))


def test_what_peft_cannot_do_with_memories():
    with pytest.raises(ValueError, match=r"of peft's: insert into the base model first.*PeftModelForCausalLM"):
        insert_memory(lora(bare("llama"), target_modules=ATTENTION), LAYERS, **MEMORY)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(ValueError, match=r"holds 5 tokens.*prefix tuning makes one of its own: take LoRA"):
        get_peft_model(with_memory("llama"), prefix)(input_ids=IDS)


# Weights that accelerate brings when a part is called


@pytest.mark.parametrize(
    ("family", "offload_buffers", "learn_memory"),
    [("llama", False, False), ("qwen3", True, False), ("qwen3", False, True)],
)
def test_offloaded_weights_are_read(family, offload_buffers, learn_memory):
    model = with_memory(family, learn_memory=learn_memory)
    expected, answers = full_pass(model, IDS), model.generate(IDS, **ANSWER)
    before = read(model, IDS)[1].named_states()
    from_states = model.generate(IDS, **{cache_name(model): cache_from_states(model, before)}, **ANSWER)
    cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(full_pass(model, IDS), expected)
    assert torch.equal(model.generate(IDS, **ANSWER), answers)
    cache = cache_from_states(model, before)
    assert torch.equal(model.generate(IDS, **{cache_name(model): cache}, **ANSWER), from_states)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_layer_alone_is_read_and_its_files_refused(tmp_path, offload_buffers):
    layer = memories(with_memory("llama"))[0]
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    expected, state = layer(x)
    cpu_offload(layer, torch.device("cpu"), offload_buffers=offload_buffers)
    first, half = layer(x[:, :9])
    second, received = layer(x[:, 9:], half)
    assert_close(torch.cat([first, second], dim=1).detach().numpy(), expected.detach().numpy(), "float64")
    assert_close(received.memory.values.detach().numpy(), state.memory.values.detach().numpy(), "float64")
    with pytest.raises(ValueError, match="whose forward was replaced"):
        fwpkm.save(tmp_path / "layer", layer)


def test_weights_on_disk_are_read_and_saved(tmp_path):
    model = with_memory("llama")
    expected, answers = full_pass(model, IDS), model.generate(IDS, **ANSWER)
    model.save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, device_map=where, offload_folder=tmp_path / "off"
    ).eval()
    assert memories(loaded)[1].query_proj.weight.is_meta
    assert torch.equal(full_pass(loaded, IDS), expected)
    assert torch.equal(loaded.generate(IDS, **ANSWER), answers)


def test_memory_is_not_inserted_into_layers_whose_weights_are_away(tmp_path):
    model = bare("llama")
    where = {"model": "cpu", "lm_head": "cpu"}
    insert_memory(dispatch_model(model, where), LAYERS, **MEMORY)  # all are here
    model = bare("llama")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"accelerate has offloaded some.*save_pretrained, and load that with device_map"
    ):
        insert_memory(model, LAYERS, **MEMORY)
    assert not hasattr(model.config, "fwpkm_memory")
    with torch.device("meta"):  # nothing was taken away: weights are still to come
        insert_memory(type(model)(bare("llama").config), LAYERS, **MEMORY)
