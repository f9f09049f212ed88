"""The PyTorch module against SPEC.md §7: its mathematics, its precision, and what PyTorch users expect of a module."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fwpkm
from fwpkm import FwPKMConfig, Memory, agreement
from fwpkm.backends.torch import FwPKM, detach, flush
from fwpkm.backends.torch.layer import zscore

HIDDEN = 6
SMALL = {"key_dim": 8, "value_dim": 5, "num_heads": 2, "num_subkeys": 5, "top_k": 2, "chunk_size": 4}


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    layer = FwPKM(HIDDEN, **SMALL | options, dtype=dtype)
    with torch.no_grad():  # weights large enough that every term matters, norms and biases that are not 1 and 0
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return layer


def inputs(length=11, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, length, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def error(actual, expected):
    return agreement.relative_error(actual.detach().numpy(), expected.detach().numpy())


def by_hand(layer, x, gated=True, normalised=True):
    """§7 in NumPy, with the reference as the memory."""
    w = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    x = x.numpy()

    def project(name, z):
        normed = z / np.sqrt(np.square(z).mean(-1, keepdims=True) + 1e-5) * w[f"{name}_norm.weight"]
        return normed @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"]

    q, v = project("query", x), project("value", x)
    if normalised:
        v = (v - v.mean(-1, keepdims=True)) / (v.std(-1, ddof=1, keepdims=True) + 1e-6)
    be, cfg = fwpkm.reference, layer.config
    state = be.init_state(cfg, Memory(w["memory.keys"][None], w["memory.values"][None]), len(x))
    g = 1 / (1 + np.exp(-project("gate", x)[..., 0])) if gated else None
    read, state, _ = be.apply(cfg, state, q, v, g)
    o = g[..., None] * read + (1 - g[..., None]) * v if gated else read + v
    return project("output", o), state


@pytest.mark.parametrize(
    ("options", "gated", "normalised"),
    [({}, True, True), ({"gated": False}, False, True), ({"value_norm": None}, True, False)],
)
def test_the_layer_is_what_section_7_says(options, gated, normalised):
    layer, x = make(**options), inputs()
    y, state = layer(x)
    expected, expected_state = by_hand(layer, x, gated, normalised)
    bound = agreement.BOUNDS["float64"].forward
    assert agreement.relative_error(y.detach().numpy(), expected) < bound
    assert agreement.relative_error(state.memory.values.detach().numpy(), expected_state.memory.values) < bound
    assert agreement.relative_error(state.memory.keys.detach().numpy(), expected_state.memory.keys) < bound
    assert any("gate" in name for name in layer.state_dict()) == gated


def test_pieces_equal_the_whole_and_nothing_leaks_between_calls():
    layer, x = make(), inputs()
    whole, final = layer(x)
    again, _ = layer(x)
    assert torch.equal(whole, again)
    state, pieces = None, []
    for piece in x.split([3, 1, 5, 2], dim=1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert error(torch.cat(pieces, dim=1), whole) < 1e-10
    for a, b in zip(state.memory, final.memory):
        assert error(a, b) < 1e-10
    frozen, same = layer(x, state, update=False)
    assert same is state
    assert not torch.equal(frozen, whole)


def test_in_place_a_state_gives_its_table_up_for_the_same_numbers():
    layer, x = make(), torch.randn(2, 16, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x[:, :6])
        expected, copied = layer(x[:, 6:], state)
        before, table = state.memory.values.clone(), state.memory.values.data_ptr()
        assert copied.memory.values.data_ptr() != table
        received, written = layer(x[:, 6:], state, inplace=True)
    assert torch.equal(received, expected)
    assert torch.equal(written.memory.values, copied.memory.values)
    assert written.memory.values.data_ptr() == table
    assert not torch.equal(state.memory.values, before)


def test_padding_and_a_default_state_change_nothing_else():
    layer, x, bound = make(), inputs(), agreement.BOUNDS["float64"].forward
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 6:] = False  # in the middle of a chunk, which is written with two of these in it
    padded = x.clone()
    padded[:, 6:] = 100.0
    y, state = layer(padded, mask=mask)
    other, other_state = layer(x, mask=mask)
    assert torch.equal(y[:, :6], other[:, :6])
    # Another length may round otherwise: the last few of an array, which fill no vector, have a sigmoid of their own.
    short, short_state = layer(x[:, :6])
    assert error(y[:, :6], short) < bound
    ends = (flush(layer.config, each)[0].memory for each in (state, other_state, short_state))
    for a, b, c in zip(*ends):
        assert torch.equal(a, b)
        assert error(a, c) < bound
    assert torch.equal(layer(x, layer.init_state(2))[0], layer(x)[0])


@pytest.mark.parametrize("keep", [True, False])
def test_rows_padded_anywhere_or_packed_are_read_as_each_alone(keep):
    """With gradients, and without a state too; what stands at masked tokens is no matter."""
    layer, x, bound = make(learn_memory=True), inputs().requires_grad_(), agreement.BOUNDS["float64"]
    rows = [x[0, :10], x[1, 2:7]]
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [0, *range(3, 12)]] = mask[1, 7:] = True
    padded = torch.full((2, 12, HIDDEN), torch.nan, dtype=x.dtype).masked_scatter(mask[..., None], torch.cat(rows))
    packed = torch.cat([*rows, padded[0, 1:2].detach()])[None]
    ends = torch.tensor([0, 10, 10, 15], dtype=torch.int32)
    alone = [layer(row[None]) for row in rows]
    expected = torch.cat([y[0] for y, _ in alone])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    y, state = layer(padded, mask=mask, return_state=keep)
    z, packed_state = layer(packed, cu_seqlens=ends, return_state=keep)
    assert y[~mask].eq(0).all()
    assert z[:, 15:].eq(0).all()
    for received in (y[mask], z[0, :15]):
        assert error(received, expected) < bound.forward
        gradients = torch.autograd.grad(received.square().sum(), [x, *layer.parameters()])
        assert all(error(a, b) < bound.gradient for a, b in zip(gradients, wanted))
    assert (state is None) == (packed_state is None) == (not keep)
    if keep:
        for i, (_, own) in enumerate(alone):
            for received in (state.memory.values[i], packed_state.memory.values[2 * i]):
                assert error(received, own.memory.values[0]) < bound.forward
        assert state.position.tolist() == [10, 5]
        assert packed_state.position.tolist() == [10, 0, 5]


def test_gradients_reach_every_parameter_through_the_writes():
    layer, x = make(learn_memory=True), inputs().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: layer(z)[0][:, -2:], x, atol=1e-6)
    layer(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert {"memory.keys", "memory.values"} < {name for name, _ in layer.named_parameters()}


def test_a_fixed_memory_is_a_buffer_that_no_step_changes():
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    assert set(before) == {"memory.keys", "memory.values"}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(inputs())[0].square().sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())


def test_a_carried_state_trains_once_it_is_detached():
    layer, x = make(), inputs()
    _, state = layer(x)
    layer(x, detach(state))[0].sum().backward()
    assert layer.query_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_stay_float32_when_a_model_is_cast(dtype):
    layer, x = make(torch.float32), inputs(dtype=torch.float32)
    model = nn.Sequential(layer).to(dtype)
    assert model[0].memory.values.dtype == model[0].memory.keys.dtype == torch.float32
    assert model[0].query_proj.weight.dtype == dtype
    y, state = model(x.to(dtype))
    assert y.dtype == dtype
    assert state.memory.values.dtype == state.pending_query.dtype == torch.float32
    y.sum().backward()
    assert layer.query_proj.weight.grad.isfinite().all()


def test_a_learned_memory_stays_float32_too_and_double_is_double():
    layer = make(torch.float32, learn_memory=True).to(torch.bfloat16)
    assert isinstance(layer.memory.values, nn.Parameter)
    assert layer.memory.values.dtype == torch.float32
    assert layer.double().memory.values.dtype == torch.float64
    assert layer(inputs())[1].memory.values.dtype == torch.float64
    assert layer.half().memory.values.dtype == torch.float32


def test_autocast_changes_neither_the_tables_precision_nor_their_dtype():
    layer, x = make(torch.float32), inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
        again, _ = layer(x.bfloat16())
    assert y.dtype == again.dtype == torch.bfloat16
    assert state.memory.values.dtype == torch.float32
    y.float().sum().backward()
    be, (q, v) = fwpkm.get_backend("torch"), torch.randn(2, 2, 9, 16).split(1)
    fresh = be.init_state(layer.config, be.init_memory(layer.config), 2)
    plain, *_ = be.apply(layer.config, fresh, q[0], v[0, ..., :5].contiguous())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, *_ = be.apply(layer.config, fresh, q[0], v[0, ..., :5].contiguous())
    assert torch.equal(plain, cast)


def test_meta_device_then_real():
    layer = FwPKM(HIDDEN, **SMALL, device="meta")
    y, state = layer(torch.empty(2, 11, HIDDEN, device="meta"))
    assert y.shape == (2, 11, HIDDEN)
    assert y.is_meta
    assert state.memory.values.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(inputs(dtype=torch.float32))[0].isfinite().all()


def test_initial_numbers():
    torch.manual_seed(0)
    layer = FwPKM(64, key_dim=64, value_dim=48, num_subkeys=32)
    keys, values = layer.memory.keys, layer.memory.values
    assert keys.shape == (1, 2, 32, 32)
    assert 0.95 * 64**-0.5 < keys.abs().max() <= 64**-0.5
    assert values.std().item() == pytest.approx(48**-0.5, rel=0.02)
    assert layer.query_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.eq(0).all() for name, p in layer.named_parameters() if name.endswith("bias"))
    assert all(p.eq(1).all() for name, p in layer.named_parameters() if "norm" in name)
    assert not torch.equal(values, FwPKM(64, layer.config).memory.values)  # stacked layers differ
    before = values.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.memory.values)


def test_state_dict_has_the_canonical_names_and_round_trips():
    layer, x = make(), inputs()
    names = [f"{part}_{name}" for part in ("query", "value", "gate", "output") for name in ("norm.weight", "proj.bias")]
    names += [f"{part}_proj.weight" for part in ("query", "value", "gate", "output")]
    assert set(layer.state_dict()) == {*names, "memory.keys", "memory.values"}
    other = FwPKM(HIDDEN, **SMALL, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x)[0], layer(x)[0])


def test_saved_layer_and_half_read_state_go_on_bit_for_bit(tmp_path):
    layer, x = make(torch.float32), inputs(dtype=torch.float32)
    fwpkm.save(tmp_path / "layer.safetensors", layer)
    _, state = layer(x[:, :6])
    fwpkm.save_state(tmp_path / "state.safetensors", state, layer.config)
    other = FwPKM(HIDDEN, **SMALL)
    assert fwpkm.load(tmp_path / "layer.safetensors", other) is None
    loaded = fwpkm.load_state(tmp_path / "state.safetensors", layer.config, "torch")
    assert torch.equal(other(x[:, 6:], loaded)[0], layer(x[:, 6:], state)[0])


def test_a_file_of_another_layer_fills_nothing(tmp_path):
    fwpkm.save(tmp_path / "layer.safetensors", make(torch.float32))
    other = FwPKM(HIDDEN, **SMALL | {"learning_rate": 0.5})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="learning_rate"):
        fwpkm.load(tmp_path / "layer.safetensors", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="to_empty"):
        fwpkm.load(tmp_path / "layer.safetensors", FwPKM(HIDDEN, **SMALL, device="meta"))


def test_a_bfloat16_layer_is_saved_without_loss(tmp_path):
    layer = make(torch.float32).to(torch.bfloat16)
    fwpkm.save(tmp_path / "layer.safetensors", layer)
    other = FwPKM(HIDDEN, **SMALL).to(torch.bfloat16)
    fwpkm.load(tmp_path / "layer.safetensors", other)
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    layer, x = make(), inputs().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    y, _ = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_hooks_see_every_submodule_called_and_what_a_backward_needs():
    """What sharding and offloading build on."""
    layer, x, called = make(), inputs().requires_grad_(), []
    for name, module in layer.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    names = [f"{part}_{kind}" for part in ("query", "value", "gate", "output") for kind in ("norm", "proj")]
    assert sorted(called) == sorted([*names, "memory"])
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda array: array):
        y, _ = layer(x)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("learn", [False, True])
def test_learn_memory_is_chosen_when_the_layer_is_made(learn):
    """Later it would say what the tables are not; tables that are trained freeze and thaw as any parameters."""
    layer = make(learn_memory=learn)
    for value in (False, True):
        with pytest.raises(AttributeError, match=r"learn_memory is chosen when a layer is made: FwPKM\(\.\.\., learn_"):
            layer.learn_memory = value
    assert copy.deepcopy(layer).learn_memory is learn
    assert f"learn_memory={learn}" in repr(layer)
    other = make(learn_memory=True)
    other.load_state_dict(layer.state_dict())
    x = inputs()
    for frozen in (True, False):
        other.memory.requires_grad_(not frozen)
        other.zero_grad()
        other(x)[0].sum().backward()
        assert (other.memory.values.grad is None) == frozen
        assert other.query_proj.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_not_rounded_on_its_way_into_a_layer(dtype):
    """Who only reads rounds nothing that lasts; a state narrower than its layer keeps its dtype."""
    layer, wide = make(dtype), make()
    x, token = inputs(5, dtype=dtype), inputs(1, dtype=dtype)
    for state in (layer.init_state(2).to(torch.float64), wide(inputs(5))[1]):
        for call, read in ((layer, x), (layer, token), (layer.decode, token)):
            with pytest.raises(ValueError, match=r"state must not hold float64 tables.*Received: float64 tables, and"):
                call(read, state)
        assert layer(x, state, update=False)[1] is state
        assert layer(x, state.to(torch.float32))[1].memory.values.dtype == torch.float32
    assert wide(inputs(5), layer.init_state(2))[1].memory.values.dtype == torch.float32
    with pytest.raises(ValueError, match=r"memory must be a fwpkm.Memory"):
        layer(x, layer.init_state(2)._replace(memory=None))


# torch's own tracing looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_gradients():
    layer, x = make(torch.float32), inputs(dtype=torch.float32).requires_grad_()
    y, _ = layer(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(layer, backend="aot_eager")
    z, _ = compiled(x)
    z.square().sum().backward()
    assert error(z, y) < 1e-6
    assert error(x.grad, expected) < 1e-5


def test_compile_of_single_tokens():
    layer, x = make(torch.float32), inputs(dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        y, _ = layer(x)
        state, tokens = None, []
        for t in range(x.shape[1]):
            token, state = compiled(x[:, t : t + 1], state)
            tokens.append(token)
    assert error(torch.cat(tokens, dim=1), y) < 1e-6


def test_a_constant_row_of_values_gives_zero_and_no_gradient():
    z = torch.tensor([[0.1] * 7, [0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7]], requires_grad=True)
    out = zscore(z)
    out.mul(torch.arange(7.0)).sum().backward()
    assert out[:2].eq(0).all()
    assert z.grad[:2].eq(0).all()
    assert z.grad[2].abs().sum() > 0
    assert out[2].detach().numpy() == pytest.approx((np.arange(7) - 3) / np.std(np.arange(7), ddof=1), rel=1e-5)
    assert zscore(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wild", [float("nan"), float("inf"), 1e300])
def test_a_token_that_is_not_finite_spoils_neither_others_nor_gradients(masked, wild):
    layer, x = make(), inputs()
    spoiled = x.clone()
    spoiled[0, 6] = wild
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 6] = not masked
    y, _ = layer(spoiled.requires_grad_(), mask=mask)
    hidden = torch.ones(2, 11, dtype=torch.bool)
    hidden[0, 6] = False
    others = hidden[..., None].expand_as(y)
    if masked:
        assert torch.equal(y, layer(x, mask=hidden)[0])
        assert y[0, 6].eq(0).all()
    elif wild != 1e300:  # finite in float64
        assert y[0, 6].isnan().all()
        with np.errstate(invalid="ignore"):
            expected = torch.from_numpy(by_hand(layer, spoiled.detach())[0])  # where it takes its position, as here
        assert error(y[others], expected[others]) < agreement.BOUNDS["float64"].forward
    assert y[others].isfinite().all()
    y[others].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert spoiled.grad[others[..., :1].squeeze(-1)].isfinite().all()


def test_printing_shows_the_configuration():
    assert "hidden_size=6, gated=True" in repr(make())
    assert "num_subkeys=5" in repr(make())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1. Received: hidden_size=0"),
        ({"value_norm": "batch"}, "value_norm must be 'zscore' or None. Received: value_norm='batch'"),
        ({"value_dim": 1}, "value_dim must be at least 2"),
        ({"key_dim": 3}, "key_dim must be even"),
        ({"gated": "no"}, "gated must be True or False. Received: 'no'"),
        ({"learn_memory": 1}, "learn_memory must be True or False. Received: 1"),
        ({"config": {"key_dim": 4}}, "cfg must be an FwPKMConfig. Received: dict"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FwPKM(**{"hidden_size": 4} | arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 11, 5), r"x must have shape \[B, T, hidden_size=6\]. Received: shape \(2, 11, 5\)"),
        (torch.zeros(11, 6), r"x must have shape \[B, T, hidden_size=6\]"),
        (torch.zeros(2, 3, 6, dtype=torch.int64), "x must have a floating dtype. Received: dtype int64"),
        (np.zeros((2, 3, 6)), "x must be a torch.Tensor. Received: ndarray"),
        (torch.zeros(0, 3, 6), r"x must have at least one row \(B >= 1\). Received: shape \(0, 3, 6\)"),
        (torch.zeros(2, 3, 6, device="meta"), "x must be on the layer's device, cpu: .* Received: x on meta"),
    ],
)
def test_wrong_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        make(torch.float32)(x)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.RMSNorm(6, eps=1e-5, elementwise_affine=False)], ids=str)
def test_a_norm_without_a_weight_is_served(norm):
    layer, x = make(torch.float32), torch.randn(2, 3, 6)
    layer.query_norm = norm
    assert layer(x.double())[0].dtype == torch.float32
    with torch.autocast("cpu"):
        assert layer(x.bfloat16())[0].isfinite().all()


def test_a_part_is_not_taken_away():
    layer = make(torch.float32)
    with pytest.raises(ValueError, match=r"query_proj must be a module\. Received: None"):
        layer.query_proj = None
    with pytest.raises(ValueError, match=r"Identity\(\) leaves its input as it is, and FwPKM\(..., value_norm=None\) "):
        layer.value_norm = None
    layer(torch.ones(2, 3, 6))


@pytest.mark.parametrize("flag", ["update", "return_state", "inplace"])
def test_a_switch_of_a_call_is_true_or_false(flag):
    layer, x = make(torch.float32), torch.ones(2, 3, 6)
    with pytest.raises(ValueError, match=rf"{flag} must be True or False\. Received: 'no'"):
        layer(x, layer.init_state(2), **{flag: "no"})
    if flag != "inplace":  # of no use without a state
        with pytest.raises(ValueError, match=rf"{flag} must be True or False\. Received: 'no'"):
            layer(x, **{flag: "no"})


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.ones(3).bool(), r"mask must have shape \[B=2, T=3\]"), (torch.ones(2, 3), "dtype bool")],
)
def test_a_wrong_mask_is_named_whatever_x_holds(mask, message, nonfinite):
    x = torch.ones(2, 3, 6)
    x[0, 0, 0] = torch.nan if nonfinite else 1
    with pytest.raises(ValueError, match=message):
        make(torch.float32)(x, mask=mask)


def test_fields_override_a_config_and_unknown_ones_are_refused():
    layer = FwPKM(4, FwPKMConfig(**SMALL), chunk_size=7)
    assert layer.config == dataclasses.replace(FwPKMConfig(**SMALL), chunk_size=7)
    with pytest.raises(TypeError, match="chunk_sice"):
        FwPKM(4, chunk_sice=7)
