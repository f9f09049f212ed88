"""What torch.export, other transforms and quantization do to a layer: served, or refused in words (docs/tools.md)."""

import pytest
import torch
from test_tools_torch import HIDDEN, X, make, same
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import fwpkm
from fwpkm.backends.torch import detach
from fwpkm.backends.torch.exporting import _Read, _read
from fwpkm.backends.torch.flat import flatten

B, T = torch.export.Dim("b"), torch.export.Dim("t")
LONGER = torch.randn(3, 23, HIDDEN, generator=torch.Generator().manual_seed(4))


class ReadOn(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state, mask):
        return self.layer(x, state, mask, return_trace=True)


@pytest.mark.parametrize(("dtype", "strict"), [("float32", True), ("float64", False), ("bfloat16", False)])
def test_an_exported_layer_is_the_layer_at_any_batch_size_and_length(dtype, strict):
    layer = make(dtype=getattr(torch, dtype))
    wide = layer.memory.keys.dtype
    program = torch.export.export(layer, (X.to(wide),), dynamic_shapes={"x": {0: B, 1: T}}, strict=strict).module()
    for x in (X.to(wide), LONGER.to(wide)):
        (y, state), (expected, after) = program(x), layer(x)
        assert torch.equal(y, expected)
        assert torch.equal(state.memory.values, after.memory.values)
        assert torch.equal(state.position, after.position)


def test_an_exported_program_reads_on_from_a_state_under_a_mask_and_from_a_file(tmp_path):
    layer, mask = make(), torch.ones(2, 11, dtype=torch.bool)
    state = detach(layer(X)[1])
    shapes = {"x": {0: B, 1: T}, "state": state.map(lambda _: {0: B}), "mask": {0: B, 1: T}}
    program = torch.export.export(ReadOn(layer), (X, state, mask), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    longer = torch.ones(3, 23, dtype=torch.bool)
    longer[1, 2:9] = False
    before = detach(layer(LONGER[:, :5])[1])
    kept = before.memory.values.clone()
    (y, after, trace), (expected, wanted, record) = (call(LONGER, before, longer) for call in (program, ReadOn(layer)))
    assert torch.equal(y, expected)
    received, results = ((*state.arrays().values(), *trace) for state, trace in ((after, trace), (wanted, record)))
    assert all(torch.equal(a, b) for a, b in zip(received, results, strict=True))
    assert torch.equal(before.memory.values, kept)


def test_exported_packed_sequences():
    layer, ends = make(), torch.tensor([0, 4, 11], dtype=torch.int32)
    shapes = {"x": {1: T}, "cu_seqlens": {0: torch.export.Dim("ends", min=3)}}
    program = torch.export.export(layer, (X[:1],), {"cu_seqlens": ends}, dynamic_shapes=shapes).module()
    ends = torch.tensor([0, 9, 11, 23], dtype=torch.int32)
    assert torch.equal(program(LONGER[:1], cu_seqlens=ends)[0], layer(LONGER[:1], cu_seqlens=ends)[0])


def test_an_exported_program_has_no_gradient_and_says_so():
    program = torch.export.export(make(), (X,)).module()
    with pytest.raises(RuntimeError, match=r"fwpkm.read"):
        program(X)[0].sum().backward()


def test_decode_is_not_exported():
    class Decoding(ReadOn):
        def forward(self, x, state):
            return self.layer.decode(x, state)

    layer = make()
    with pytest.raises(RuntimeError, match=r"decode overwrites its state.*: export calls with T=1 instead"):
        torch.export.export(Decoding(layer), (X[:, :1], layer.init_state(2)))


def test_the_operator_keeps_torchs_rules():
    layer = make()
    tokens, _ = layer._project(X, None, None, None)
    arguments = _Read(layer.config.to_json(), detach(layer(X)[1]), tokens.map(torch.Tensor.detach), None, True)
    torch.library.opcheck(_read, tuple(flatten(arguments)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_other_transforms_are_refused():
    layer = make()
    weights = {name: x.detach() for name, x in layer.named_parameters()}

    def loss(weights):
        return functional_call(layer, weights, (X,))[0].square().sum()

    be, stacked = fwpkm.get_backend("torch"), stack_module_state([make(), make(1)])
    calls = [
        lambda: torch.func.grad(loss)(weights),
        lambda: torch.func.jvp(lambda x: layer(x)[0], (X,), (X,)),
        lambda: vmap(lambda x: layer(x)[0])(X[None]),
        lambda: vmap(lambda weights, buffers: functional_call(layer, (weights, buffers), (X,))[0])(*stacked),
        lambda: vmap(lambda query: be.lookup(layer.config, layer.memory(), query))(torch.ones(2, 1, 3, 8)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"cannot run inside torch.func's transforms"):
            call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="or forward-mode autograd"):
        layer(torch.autograd.forward_ad.make_dual(X, X))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch.jit.trace.*: use torch.export"):
        torch.jit.trace(layer, X)


def test_functional_call_and_data_parallel_are_served():
    layer, other = make(), make(1)
    assert torch.equal(functional_call(layer, other.state_dict(), (X,))[0], other(X)[0])
    assert torch.equal(nn.DataParallel(layer)(X)[0], layer(X)[0])


@pytest.mark.filterwarnings("ignore:.*quant.*:DeprecationWarning", "ignore:.*quant.*:UserWarning")
def test_dynamic_quantization_leaves_the_layer_as_it_is():
    """It looks for nn.Linear itself, and the projections are of a class of their own."""
    layer = make()
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantized[0]) is not nn.Linear
    assert same(quantized[1], layer)
