"""No kernel stores outside of its tensors: each lies alone, between numbers that nobody may touch."""

import pytest
import torch
from interpreter import SMALL
from torch import Tensor

from fwpkm import FwPKMConfig
from fwpkm.backends import torch as be
from fwpkm.kernels.runtime import launch

pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:{x}:RuntimeWarning" for x in ("invalid value", "divide by zero", "overflow"))
)
CONFIGS = {
    "plain": {},
    "all at once": {
        "score": "dot_product", "num_heads": 2, "grad_clip": 0.05, "weight_decay": 0.1, "usage_weight": 0.5,
        "boundary": "wait",
    },
    "keys at rest": {"addressing_weight": 0.0, "usage_weight": 0.5},
    "one memory": {"memory_scope": "batch", "lookahead": 2},
}  # fmt: skip
WAYS = [(name, how) for name in CONFIGS for how in ("apply", "from a memory", "packed", "decode")]
WAYS.remove(("one memory", "packed"))  # packed sequences have a memory each
_BETWEEN, _MARK = 1024, 0x5A
"""Bytes on either side of a tensor."""


def guarded(launches: launch.Launches, tensors: list[Tensor | None]) -> list[str]:
    """Make launches one by one, each on copies of its tensors that lie apart; what was found stored elsewhere."""
    found = []
    for number, grid, integers in launches.launches:
        kernel, indices, _, constants = launches.kernels[number]
        apart = {}
        for i in indices:
            if (x := tensors[i]) is not None:
                whole = torch.full((x.nbytes + 2 * _BETWEEN,), _MARK, dtype=torch.uint8)
                apart[i] = whole, whole[_BETWEEN : _BETWEEN + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        kernel[grid](*(apart[i][1] if i in apart else None for i in indices), *integers, **constants)
        for i, (whole, inside) in apart.items():
            if (torch.cat([whole[:_BETWEEN], whole[-_BETWEEN:]]) != _MARK).any():
                found.append(f"{kernel.fn.__name__} beside {launches.sources[i][0]}")
            if inside.numel():  # of tensors that share memory only one is stored into
                old, new = (x.flatten().view(torch.uint8) for x in (tensors[i], inside))
                if (changed := old != new).any():  # else autograd would take it for overwritten
                    old[changed] = new[changed]
    return found


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_no_kernel_stores_outside_of_its_tensors(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, found = FwPKMConfig(**SMALL | CONFIGS[name]), []
    assert launch.INTERPRETED  # what a GPU launches goes another way: compute-sanitizer is for that
    monkeypatch.setattr(launch.Launches, "interpret", lambda *given: found.extend(guarded(*given)))
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 10, 16 * cfg.num_heads), (2, 10, 16), (2, 10)
    inputs = [(torch.rand(shape, generator=draw) - 0.5).requires_grad_() for shape in shapes]
    memory = be.init_memory(cfg, seed=1)
    options = {}
    if how == "packed":
        inputs = [x.detach().flatten(0, 1)[None].requires_grad_() for x in inputs]
        options = {"cu_seqlens": torch.tensor([0, 6, 6, 15, 17, 19], dtype=torch.int32)}
    if how == "decode":
        state = be.start_decoding(be.init_state(cfg, memory, batch_size=2))
        expected = be.apply(cfg, be.init_state(cfg, memory, batch_size=2), *inputs, implementation="eager")[0]
        parts = [
            be.decode(cfg, state, *(x.detach()[:, t : t + 1] for x in inputs), implementation="triton")
            for t in range(10)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected.detach(), rtol=1e-4, atol=1e-5)
    else:
        begin = be.init_state(cfg, memory, batch_size=2) if how == "apply" else memory
        output, _, _ = be.apply(cfg, begin, *inputs, **options, implementation="triton")
        torch.autograd.grad(output.square().sum(), inputs)
    assert not found
