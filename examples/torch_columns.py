"""A table in columns: each of n processes holds a part of every row of a memory that none has whole.

All ranks read the same tokens. The script trains a few steps, saves the state, each rank its columns, and reads on from
the files; then each process does the same with a whole table, and the numbers agree.

    torchrun --nproc-per-node 2 examples/torch_columns.py [--folder DIR]
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from fwpkm.backends.torch import FwPKM, columns, detach, nbytes

FIELDS = {"key_dim": 32, "value_dim": 64, "num_subkeys": 64, "top_k": 4, "chunk_size": 32}


def train(deal: Callable[[FwPKM], FwPKM], x: Tensor, device: str) -> tuple[FwPKM, list[float], Any]:
    """Four steps of truncated backpropagation on one long text: the layer, its losses and the state."""
    torch.manual_seed(0)  # the same weights on every rank
    layer = deal(FwPKM(64, learn_memory=True, **FIELDS)).to(device)
    table = [layer.memory.values]  # a DTensor: optimizers want it in a group of its own
    others = [p for name, p in layer.named_parameters() if name != "memory.values"]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": table, "weight_decay": 0.0}], lr=1e-2)
    losses, state = [], None
    for piece in x.split(100, dim=1):
        y, state = layer(piece[:, :-1], state)
        loss = (y - piece[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        state = detach(state)
    return layer, losses, state


def main() -> None:
    """Train in columns, save and load the state, and compare with one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fwpkm-columns")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which tells each process its rank: --help shows how")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=timedelta(seconds=120))  # how long a rank waits for one that is gone
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh(device, (ranks,))
    x = torch.rand(2, 401, 64, generator=torch.Generator().manual_seed(1)).to(device)

    layer, losses, state = train(lambda layer: columns.shard(layer, mesh), x[:, :400], device)
    args.folder.mkdir(exist_ok=True)
    columns.save_state(args.folder, state, layer.config)
    again = columns.load_state(args.folder, layer.config, mesh)
    y, _ = layer(x[:, 400:], again)
    print(f"rank {rank} of {ranks}: {nbytes(state):,} bytes of state, columns {state.memory.values.to_local().shape}")

    whole, expected, state = train(lambda layer: layer, x[:, :400], device)  # every rank alone
    expected_y, _ = whole(x[:, 400:], state)
    error = max(abs(a - b) for a, b in zip([*losses, y.norm().item()], [*expected, expected_y.norm().item()]))
    assert error < 1e-4, error
    if rank == 0:
        print(f"losses {' '.join(f'{loss:.4f}' for loss in losses)}, those of one process within {error:.0e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
