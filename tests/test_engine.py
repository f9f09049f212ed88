"""Which engine runs a call of the torch backend: one question, and a reason where the answer is no."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fwpkm import FwPKMConfig
from fwpkm.backends import torch as be
from fwpkm.backends.torch.engine import choose_engine

SERVED = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=2, chunk_size=4)
ODD = FwPKMConfig(key_dim=4, value_dim=16, num_subkeys=4, top_k=2, chunk_size=4)


def choose(implementation, cfg=SERVED, length=1, dtype=torch.float32):
    memory = be.init_memory(cfg)
    return choose_engine(implementation, cfg, memory, torch.zeros(1, length, cfg.key_dim, dtype=dtype))


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("traced", [False, True])
def test_a_call_on_the_cpu_is_eager_and_asks_no_kernel(monkeypatch, implementation, traced):
    monkeypatch.setitem(sys.modules, "fwpkm.kernels", None)  # whose import then fails
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    assert choose(implementation) == "eager"


def test_what_is_traced_stays_in_the_graph_where_kernels_serve_it(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose("triton") == "compiled"
    assert choose("triton", length=0) == "eager"


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"cfg": ODD}, "key_dim must be a multiple of 16"), ({"dtype": torch.float64}, "query must be float32")],
)
def test_triton_says_why_it_cannot(monkeypatch, traced, changed, reason):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    with pytest.raises(ValueError, match=f'implementation="triton" cannot serve this call: {reason}'):
        choose("triton", **changed)


@pytest.mark.parametrize("traced", [False, True])
def test_gpus_of_amd_are_served_eagerly(monkeypatch, traced):
    """Torch built for ROCm calls them "cuda" too, and no kernel was ever tried on one."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 1, 16))
    assert choose_engine(None, SERVED, be.init_memory(SERVED), query) != "eager"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_engine(None, SERVED, be.init_memory(SERVED), query) == "eager"
    with pytest.raises(ValueError, match=r"serve NVIDIA GPUs, and this torch is built for AMD's \(ROCm\)"):
        choose_engine("triton", SERVED, be.init_memory(SERVED), query)


CALLS = {
    "apply": lambda state, x, **options: be.apply(SERVED, state, x, x, **options),
    "flush": lambda state, x, **options: be.flush(SERVED, state, **options),
    "lookup": lambda state, x, **options: be.lookup(SERVED, state.memory, x, **options),
    "chunk_update": lambda state, x, **options: be.chunk_update(SERVED, state.memory, x, x, **options),
    "decode": lambda state, x, **options: be.decode(SERVED, be.start_decoding(state), x, x, **options),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_implementation_that_nobody_knows(call):
    state = be.init_state(SERVED, be.init_memory(SERVED), 1)
    with pytest.raises(ValueError, match=r'None, "triton" or "eager"\. Received: \'cuda\''):
        CALLS[call](state, torch.zeros(1, 1, 16), implementation="cuda")
