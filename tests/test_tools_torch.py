"""What PyTorch's tools do to a layer: each is served with the right numbers, or refused in words (docs/tools.md)."""

import copy
import io
import pickle

import pytest
import torch
from asserting import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import fwpkm
from fwpkm.backends.torch import FwPKM, detach

HIDDEN = 6
SMALL = {"key_dim": 4, "value_dim": 3, "num_heads": 2, "num_subkeys": 4, "top_k": 2, "chunk_size": 4}
X = torch.randn(2, 11, HIDDEN, generator=torch.Generator().manual_seed(2))


def make(seed=0, **options):
    """A layer whose weights are large enough that every term matters."""
    torch.manual_seed(seed)
    layer = FwPKM(HIDDEN, **SMALL | {"learning_rate": 0.1} | options)
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return layer


def same(layer, other, x=X):
    return torch.equal(layer(x)[0], other(x)[0])


# Dtypes


@pytest.mark.parametrize(
    ("default", "tables"), [("float64", "float64"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_a_default_dtype_is_that_of_the_weights_and_tables_never_narrow(default, tables):
    torch.set_default_dtype(getattr(torch, default))
    try:
        layer = FwPKM(HIDDEN, **SMALL)
        y, state = layer(torch.randn(2, 11, HIDDEN))
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == layer.query_proj.weight.dtype == getattr(torch, default)
    found = {layer.memory.keys.dtype, layer.memory.values.dtype, state.memory.values.dtype, state.pending_gate.dtype}
    assert found == {getattr(torch, tables)}


@pytest.mark.parametrize("dtype", [torch.int32, "float32", torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_no_weights_can_have_are_named(dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32, .* Received: "):
        FwPKM(HIDDEN, **SMALL, dtype=dtype)


def test_a_default_dtype_does_not_change_a_layer_that_is_there():
    layer = make()
    expected, state = layer(X)
    further, _ = layer(X, state)
    torch.set_default_dtype(torch.float64)
    try:
        y, state = layer(X)
        assert torch.equal(y, expected)
        assert torch.equal(layer(X, state)[0], further)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, lambda x: x.type(torch.float16)], ids=["half", "bfloat16", "type"]
)
def test_casts_leave_the_tables_their_bits(cast, learn):
    layer = make(learn_memory=learn)
    before = layer.memory.values.detach().clone()
    cast(nn.ModuleDict({"inside": layer}))
    assert layer.query_proj.weight.element_size() == 2
    assert torch.equal(layer.memory.values.detach(), before)
    assert isinstance(layer.memory.values, nn.Parameter) == learn
    assert layer(X.to(layer.query_proj.weight.dtype))[1].memory.values.dtype == torch.float32


def test_a_file_in_float64_is_not_rounded_into_float32(tmp_path):
    wide, narrow = make(dtype=torch.float64), make(1)
    before = copy.deepcopy(narrow.state_dict())
    fwpkm.save(tmp_path / "wide", wide)
    with pytest.raises(ValueError, match=r"memory.keys.* would lose digits. Expected: float32, as the layer holds"):
        fwpkm.load(tmp_path / "wide", narrow)
    assert all(torch.equal(x, before[name]) for name, x in narrow.state_dict().items())
    fwpkm.save(tmp_path / "narrow", narrow)
    fwpkm.load(tmp_path / "narrow", wide)
    assert torch.equal(wide.memory.values.float(), narrow.memory.values)


# Initialisation


def by_each_part(layer):
    for part in layer.modules():
        if part is not layer and hasattr(part, "reset_parameters"):
            part.reset_parameters()


@pytest.mark.parametrize("draw", [FwPKM.reset_parameters, by_each_part])
def test_what_is_made_on_the_meta_device_is_drawn_as_the_constructor_draws(draw):
    torch.manual_seed(3)
    expected = FwPKM(HIDDEN, **SMALL).state_dict()
    layer = FwPKM(HIDDEN, **SMALL, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    draw(layer)
    assert all(torch.equal(x, expected[name]) for name, x in layer.state_dict().items())


def test_a_walk_over_all_modules_draws_the_distributions_of_the_specification():
    layer = FwPKM(64, key_dim=64, value_dim=48, num_subkeys=32, device="meta").to_empty(device="cpu")
    layer.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    for name in ("query_proj", "value_proj", "output_proj"):
        assert getattr(layer, name).weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not getattr(layer, name).bias.any()
    assert layer.memory.values.std().item() == pytest.approx(48**-0.5, rel=0.1)


def test_a_device_that_is_not_there_is_named():
    state = make()(X)[1]
    for call in (
        lambda: FwPKM(HIDDEN, **SMALL, device="cuda"),
        lambda: make().init_state(2, "cuda"),
        lambda: fwpkm.get_backend("torch").to_device(state, "cuda"),
    ):
        if not torch.cuda.is_available():
            with pytest.raises(
                ValueError, match=r"^(position_)?device must be one that torch finds here.* Received: 'cuda'"
            ):
                call()


def test_a_state_without_numbers_is_not_saved(tmp_path):
    layer = FwPKM(HIDDEN, **SMALL, device="meta")
    with pytest.raises(ValueError, match="a tensor on the meta device holds no numbers: "):
        fwpkm.save_state(tmp_path / "state", layer.init_state(2), layer.config)
    assert not list(tmp_path.iterdir())


# Checkpointing


def twice(layer, x, cut, reentrant=None):
    """Σ y² of two calls, of which the second reads on; the first is checkpointed if told."""
    y, state = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    return y.square().sum() + layer(x, detach(state) if cut else state)[0].square().sum()


@pytest.mark.parametrize(("reentrant", "cut"), [(False, False), (False, True), (True, True)])
def test_checkpointed_calls_have_the_same_gradients(reentrant, cut):
    layer = make(dtype=torch.float64)
    expected, x = X.double().requires_grad_(), X.double().requires_grad_()
    twice(layer, expected, cut).backward()
    weights = [weight.grad.clone() for weight in layer.parameters()]
    layer.zero_grad()
    twice(layer, x, cut, reentrant).backward()
    for weight, gradient in zip(layer.parameters(), weights):
        assert_close(weight.grad.numpy(), gradient.numpy(), "float64", "gradient", "weight")
    assert_close(x.grad.numpy(), expected.grad.numpy(), "float64", "gradient", "x")


def test_a_reentrant_checkpoint_that_would_lose_a_gradient_is_refused():
    layer, x = make(), X.clone().requires_grad_()
    refused = pytest.raises(RuntimeError, match="passes no gradient through a state: call it with use_reentrant=False")
    with refused:
        twice(layer, x, cut=False, reentrant=True)
    _, state = layer(x)
    with refused:
        checkpoint(layer, x, state, use_reentrant=True)
    _, state = checkpoint(layer, x, use_reentrant=True)
    with torch.no_grad():
        assert torch.equal(layer(x, state)[0], layer(x, layer(x)[1])[0])  # where nobody wants one, it is served


# Adapters and parametrizations


class Adapter(nn.Module):
    """As of LoRA: a projection, and a product of two thin ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(HIDDEN, 1), nn.Linear(1, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "put_on", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_a_file_holds_what_a_parametrized_part_computes_with(tmp_path, put_on):
    layer, other = make().eval(), make(1)
    put_on(layer.value_proj)
    fwpkm.save(tmp_path / "file", layer)
    fwpkm.load(tmp_path / "file", other)
    assert not torch.equal(make().value_proj.weight, make(1).value_proj.weight)
    assert_close(other(X)[0].detach().numpy(), layer(X)[0].detach().numpy(), "float32")
    before = layer.query_proj.weight.clone()
    with pytest.raises(ValueError, match=r"value_proj.weight has a parametrization.*: load first and parametrize then"):
        fwpkm.load(tmp_path / "file", layer)
    assert torch.equal(layer.query_proj.weight, before)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("table", ["keys", "values"])
def test_a_table_that_cannot_be_parametrized_stays(table, learn):
    layer = make(learn_memory=learn)
    expected, names = layer(X)[0], [*layer.state_dict()]
    with pytest.raises(ValueError, match=f"memory.{table} takes no parametrization: torch keeps the names"):
        parametrizations.weight_norm(layer.memory, table)
    assert [*layer.state_dict()] == names
    assert torch.equal(layer(X)[0], expected)
    assert type(layer.memory) is type(make().memory)


def test_a_trained_table_is_pruned_and_restored():
    layer = make(learn_memory=True)
    names = {*layer.state_dict()}
    for table in ("keys", "values"):
        prune.l1_unstructured(layer.memory, table, amount=0.5)
    pruned = layer(X)[0]
    for table in ("keys", "values"):
        assert (getattr(layer.memory(), table) == 0).float().mean() == 0.5
        prune.remove(layer.memory, table)
    assert {*layer.state_dict()} == names
    assert torch.equal(layer(X)[0], pruned)


def replaced(part, module):
    return lambda layer: setattr(layer, part, module(getattr(layer, part)))


def patched(layer):
    layer.value_proj.forward = lambda x: 2 * nn.functional.linear(x, layer.value_proj.weight, layer.value_proj.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("query_proj", Adapter), "query_proj must be a Linear, .* Received: a Adapter"),
        (replaced("value_norm", lambda _: nn.LayerNorm(HIDDEN)), "value_norm must be a RMSNorm, .* a LayerNorm"),
        (patched, "value_proj must be a Linear.* whose forward was replaced"),
        (lambda layer: setattr(layer, "forward", lambda x: (2 * x, None)), "FwPKM whose forward was replaced"),
        (lambda layer: setattr(layer.output_norm, "eps", 0.1), "output_norm.eps must be 1e-05, .* Received: 0.1"),
        (replaced("query_proj", lambda p: nn.Linear(*p.weight.T.shape, False)), "query_proj.bias must be there, since"),
        (lambda layer: prune.random_unstructured(layer.value_proj, "weight", 0.5), "value_proj.weight is computed"),
        pytest.param(
            lambda layer: weight_norm(layer.query_proj), "query_proj.weight is computed by a hook",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
        ),
    ],
)  # fmt: skip
def test_what_a_file_could_not_hold_is_neither_saved_nor_filled(tmp_path, change, message):
    layer = make()
    fwpkm.save(tmp_path / "plain", layer)
    change(layer)
    layer(X)
    with pytest.raises(ValueError, match=message):
        fwpkm.save(tmp_path / "file", layer)
    assert not (tmp_path / "file").exists()
    with pytest.raises(ValueError, match=message):
        fwpkm.load(tmp_path / "plain", layer)


@pytest.mark.parametrize("how", ["wrapped", "its forward", "itself"])
def test_a_compiled_layer_is_saved_and_filled(tmp_path, how):
    def compiled(layer):
        if how == "wrapped":
            return torch.compile(layer, backend="eager")
        layer.forward = torch.compile(layer.forward, backend="eager") if how == "its forward" else layer.forward
        return layer

    layer, other = compiled(make()), compiled(make(1))
    fwpkm.save(tmp_path / "file", layer)
    fwpkm.load(tmp_path / "file", other)
    assert torch.equal(other.query_proj.weight, make().query_proj.weight)


def test_tied_weights_take_a_file_that_holds_one_tensor_for_both(tmp_path):
    layer, tied = make(num_heads=1, value_dim=4), make(1, num_heads=1, value_dim=4)
    fwpkm.save(tmp_path / "two", layer)
    tied.query_proj.weight = tied.value_proj.weight
    fwpkm.save(tmp_path / "one", tied)
    before = tied.query_proj.bias.clone()
    with pytest.raises(ValueError, match=r"query_proj\.weight and value_proj\.weight are one weight here, and "):
        fwpkm.load(tmp_path / "two", tied)
    assert torch.equal(tied.query_proj.bias, before)
    fwpkm.load(tmp_path / "one", tied)


def test_adapters_train_and_merge_into_a_file(tmp_path):
    layer, other = make(), make(1)
    adapter = Adapter(layer.query_proj)
    layer.query_proj = adapter
    layer(X)[0].square().sum().backward()
    assert adapter.up.weight.grad.any()
    expected = layer(X)[0]
    with torch.no_grad():
        adapter.base.weight += adapter.up.weight @ adapter.down.weight
        adapter.base.bias += adapter.up(adapter.down.bias)
    layer.query_proj = adapter.base
    fwpkm.save(tmp_path / "file", layer)
    fwpkm.load(tmp_path / "file", other)
    assert_close(other(X)[0].detach().numpy(), expected.detach().numpy(), "float32")


# Copies


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved], ids=["deepcopy", "pickle", "save"]
)
def test_copies_are_equal_and_share_nothing(copied):
    layer = make()
    other = copied(layer)
    assert same(other, layer)
    own = {x.data_ptr() for x in layer.state_dict().values()}
    assert own.isdisjoint(x.data_ptr() for x in other.state_dict().values())
    state = detach(layer(X)[1])
    again = copied(state)
    assert isinstance(again, fwpkm.State)
    assert again.memory.values.data_ptr() != state.memory.values.data_ptr()
    assert torch.equal(layer(X, again)[0], layer(X, state)[0])


@pytest.mark.parametrize("learn", [False, True])
def test_an_average_of_weights_is_a_layer(tmp_path, learn):
    layer = make(learn_memory=learn)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    first = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for x in layer.state_dict().values():
            x += 1
    average.update_parameters(layer)
    for name, x in average.module.state_dict().items():
        torch.testing.assert_close(x, first[name] + 0.5)
    fwpkm.save(tmp_path / "average", average.module)
    with pytest.raises(
        ValueError, match=r"layer must be an FwPKM layer of one of the backends. Received: AveragedModel"
    ):
        fwpkm.save(tmp_path / "average", average)


def test_a_call_in_place_leaves_the_initial_memory_alone():
    layer = make()
    before = layer.memory.values.clone()
    with torch.no_grad():
        state = layer.init_state(2)
        layer(X, state, inplace=True)
        one = layer.init_state(1)
        for token in X[:1].split(1, dim=1):
            layer.decode(token, one)
    assert torch.equal(layer.memory.values, before)
    assert not torch.equal(state.memory.values[0], before)


def test_a_state_from_before_a_call_without_a_write_shares_its_tables():
    """Which is why ``inplace`` needs a copy of what is kept: SPEC.md §5."""
    layer = make()
    with torch.no_grad():
        _, kept = layer(X[:, :1])
        _, state = layer(X[:, :1], kept)
        assert state.memory.values is kept.memory.values
        copied = kept.map(torch.clone)
        layer(X, state, inplace=True)
        fresh = layer(X, layer(X[:, :1])[1])[0]
        assert torch.equal(layer(X, copied)[0], fresh)
        assert not torch.equal(layer(X, kept)[0], fresh)
