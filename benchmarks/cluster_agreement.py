"""Whether several cards give what one gives, before their speed counts: ``python -m benchmarks.cluster_agreement``.

*Sharded weights*: a model under FSDP2 with a bfloat16 policy reads token by token, beside one card whose weights are
rounded alike. *Columns*: a layer trains on rows whose tables lie in columns, together larger than a card with the sizes
that are given by default; its first step's gradients, and outputs and tables of the first row to the end, are those
of one card that has whole tables, a row at a time. On the CPU ranks are processes of one thread each.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks import ranks, report
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.backends.torch import FwPKM, columns, detach, nbytes
from fwpkm.integrations.distributed import share_initial_memory

_ROUNDS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
_OVER = "error over its bound"
"""What ends so must be below 1."""
_AT_A_TIME = 1
"""Rows whose whole tables a card has beside its columns."""
OPTIONS: dict[str, tuple[int | None, str]] = {
    "width": (512, "of queries, values and hidden states"),
    "num_subkeys": (2048, "of the tables in columns"),
    "rows": (18, "whose tables lie in columns"),
    "length": (1024, "tokens of a training step"),
    "steps": (4, "of training"),
    "tokens": (600, "read one by one under FSDP2"),
}


class Model(nn.Module):
    """Words, a memory beside a residual, words."""

    def __init__(self, width: int):
        """Draw the same weights on every rank."""
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, width)
        self.memory = FwPKM(width, key_dim=width, value_dim=width, num_subkeys=64, chunk_size=128)
        self.readout = nn.Linear(width, 256)

    def forward(self, words: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits and the state after the words."""
        x = self.embed(words)
        y, state = self.memory(x, state)
        return self.readout(x + y), state


@torch.no_grad()
def sharded_weights(rank: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """What is printed, by name."""
    mesh = init_device_mesh(device.type, (options.ranks,))
    model, alone = Model(options.width).to(device), Model(options.width).to(device, torch.bfloat16)
    for module in (model.memory, model):
        fully_shard(module, mesh=mesh, mp_policy=_ROUNDS)
    share_initial_memory(model)
    generator = torch.Generator().manual_seed(1 + rank)  # each rank reads texts of its own
    words = torch.randint(256, (_AT_A_TIME, options.tokens), generator=generator).to(device)
    state = expected = None
    found, wanted = [], []
    for word in words.split(1, dim=1):
        y, state = model(word, state)
        z, expected = alone(word, expected)
        found.append(y)
        wanted.append(z)
    logits, others = (torch.cat(x, 1).float() for x in (found, wanted))
    return {
        f"logits, {_OVER}": _error(logits, others) / BOUNDS["bfloat16"].forward,
        f"tables, {_OVER}": _error(state.memory.values, expected.memory.values) / BOUNDS["float32"].forward,
        "tokens of which another is the likeliest": float((logits.argmax(-1) != others.argmax(-1)).float().mean()),
    }


def tables_in_columns(rank: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """What is printed, by name."""
    mesh, width = init_device_mesh(device.type, (options.ranks,)), options.width
    fields = {"key_dim": width, "value_dim": width, "num_subkeys": options.num_subkeys, "chunk_size": 256}
    torch.manual_seed(0)
    alone = FwPKM(width, **fields).to(device)
    layer = columns.shard(copy.deepcopy(alone), mesh)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    shape = (options.rows, options.steps * options.length, width)
    x, targets = (torch.randn(shape, generator=generator) for _ in range(2))
    state, expected, worst, seconds = None, None, [], []
    for step in range(options.steps):
        here = slice(step * options.length, (step + 1) * options.length)
        piece, target = x[:, here].to(device), targets[:, here].to(device)
        began = _now(device)
        optimizer.zero_grad()
        state = layer.init_state(options.rows) if state is None else detach(state)
        y, state = layer(piece, state, inplace=True)
        _loss(y, target).backward()
        found = y[:_AT_A_TIME].detach()
        seconds.append(_now(device) - began)
        if step == 0:
            _accumulate(alone, piece, target)
            worst += [_error(p.grad, q.grad) / BOUNDS["float32"].gradient for p, q in _pairs(layer, alone)]
        with torch.no_grad():
            y, expected = alone(piece[:_AT_A_TIME], expected, inplace=expected is not None)
        worst.append(_error(found, y) / BOUNDS["float32"].forward)
        optimizer.step()
        with torch.no_grad():
            for p, q in _pairs(layer, alone):
                q.copy_(p)
    assert state is not None
    own = state.memory.values.to_local()
    part = slice(rank * own.shape[2], (rank + 1) * own.shape[2])
    worst.append(_error(own[:_AT_A_TIME].detach(), expected.memory.values[..., part]) / BOUNDS["float32"].forward)
    return {
        f"worst of outputs, gradients and tables, {_OVER}": max(worst),
        "bytes of all tables": float(state.memory.values.numel() * state.memory.values.element_size()),
        "bytes of state on a card": float(nbytes(state)),
        "bytes of a card": float(torch.cuda.get_device_properties(device).total_memory)
        if device.type == "cuda"
        else 0.0,
        "milliseconds of the last step": 1e3 * seconds[-1],
    }


def _accumulate(layer: FwPKM, piece: Tensor, target: Tensor) -> None:
    """Gradients of all rows, read in turn, each from the initial memory."""
    for some, wanted in zip(piece.split(_AT_A_TIME), target.split(_AT_A_TIME)):
        y, _ = layer(some, layer.init_state(len(some)), inplace=True)
        (_loss(y, wanted) * (len(some) / len(piece))).backward()


def _loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def _pairs(layer: FwPKM, alone: FwPKM) -> Any:
    return zip(layer.parameters(), alone.parameters(), strict=True)


def _error(found: Tensor, expected: Tensor) -> float:
    return relative_error(found.double().cpu().numpy(), expected.double().cpu().numpy())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compare(
    rank: int, device: torch.device, options: argparse.Namespace, join: Callable[[], None]
) -> dict[str, float]:
    """On every rank: the worst that any of them found."""
    join()
    found = {}
    for title, part in (("FSDP2, bfloat16", sharded_weights), ("columns", tables_in_columns)):
        everyone: list[Any] = [None] * options.ranks
        dist.all_gather_object(everyone, part(rank, options, device))
        found |= {f"{title}: {name}": max(one[name] for one in everyone) for name in everyone[0]}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print, judge: 1 if an error is over its bound."""
    options = ranks.parser("cluster_agreement", __doc__, **OPTIONS).parse_args(arguments)
    found = ranks.run(_compare, options)
    rows = [(name, f"{x:.2g}" if x < 10 else f"{x:,.0f}") for name, x in found.items()]
    sizes = ", ".join(f"{name.replace('_', '-')} {getattr(options, name)}" for name in OPTIONS)
    table = report.Table("Several cards beside one", ("", "worst rank"), rows)
    report.show((ranks.where(options), sizes), [table], markdown=options.markdown)
    return int(any(not x < 1 for name, x in found.items() if name.endswith(_OVER)))


if __name__ == "__main__":
    sys.exit(main())
