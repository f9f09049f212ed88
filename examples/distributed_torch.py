"""Train a small model on several cards, with DDP or FSDP2, and go on from its checkpoint on another number of them.

Each row is a text of its own, read in pieces; its memory goes along, and so it stands in the checkpoint. The numbers do
not depend on how many ranks share the rows, nor on DDP or FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/distributed_torch.py --how fsdp --folder run [--steps 8]
"""

import argparse
import datetime
import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fwpkm import State
from fwpkm.backends.torch import FwPKM, detach
from fwpkm.integrations.distributed import ShardedStates, share_initial_memory

VOCABULARY, ROWS, PIECE, PIECES = 32, 8, 32, 4


class Model(nn.Module):
    """Two tokens of context, one memory, one readout."""

    def __init__(self, width: int = 32) -> None:
        """Build the layers."""
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.memory = FwPKM(width, key_dim=32, value_dim=32, num_subkeys=16, chunk_size=16)
        self.readout = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Logits [B, T, V] for tokens [B, T], and where the rows' memories stand."""
        x = self.embed(tokens)
        read, state = self.memory(x, state)
        return self.readout(x + read), state


def texts(number: int) -> Tensor:
    """[ROWS, PIECE * PIECES + 1]: the same on every rank; the second half repeats the first."""
    half = torch.randint(VOCABULARY, (ROWS, PIECE * PIECES // 2), generator=torch.Generator().manual_seed(number))
    return torch.cat([half, half, half[:, :1]], dim=1)


def wrapped(model: Model, how: str, device: torch.device) -> nn.Module:
    """The model under DDP or FSDP2."""
    share_initial_memory(model)  # after weights are drawn, before DDP
    # It does so of every module that ends in nn.Linear. Nothing here overwrites what a module returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    if how == "ddp":
        return DistributedDataParallel(model, static_graph=True)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (model.memory, model):  # from the inside out
        fully_shard(module, mesh=mesh)
    return model


class Training:
    """A model, its optimizer, and the states of this rank's rows."""

    def __init__(self, how: str, device: torch.device):
        """Build everything; the same seed on every rank, as FSDP2 takes each rank's shard from its own weights."""
        torch.manual_seed(0)
        self.model = Model().to(device)
        self.call = wrapped(self.model, how, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.rows = torch.arange(ROWS).chunk(dist.get_world_size())[dist.get_rank()]
        self.state = self.model.memory.init_state(len(self.rows))
        self.device, self.step = device, 0

    def take(self) -> Tensor:
        """One step over one piece; the mean loss of all rows."""
        number, piece = divmod(self.step, PIECES)
        tokens = texts(number)[self.rows, piece * PIECE : (piece + 1) * PIECE + 1].to(self.device)
        logits, state = self.call(tokens[:, :-1], self.state if piece else None)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state, self.step = detach(state), self.step + 1
        everyone = loss.detach()
        dist.all_reduce(everyone)
        return everyone / dist.get_world_size()

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        states = ShardedStates({"memory": self.state}, self.model.memory.config)
        return {"weights": weights, "moments": moments, "states": states}

    def save(self, folder: Path) -> None:
        """In a folder of its own: torch writes ``.metadata`` last, so a folder without it is not whole."""
        dcp.save(self.items(), checkpoint_id=folder / f"step-{self.step}")

    def resume(self, folder: Path) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        whole = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/.metadata")]
        if whole:
            items = self.items()
            dcp.load(items, checkpoint_id=folder / f"step-{max(whole)}")
            set_state_dict(
                self.model, self.optimizer, model_state_dict=items["weights"], optim_state_dict=items["moments"]
            )
            self.step = max(whole)


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, saving after every second piece: in the middle of a text, and at its end."""
    training = Training(options.how, device)
    training.resume(options.folder)
    while training.step < options.steps:
        loss = training.take()
        if training.step % 2 == 0:
            training.save(options.folder)
        if dist.get_rank() == 0:
            print(f"step {training.step}: {loss:.4f} nats per token", flush=True)


def main() -> None:
    """Train as one rank of a process group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which tells each process its rank: --help shows how")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A rank that fails is noticed by the others at once, or after this time: none waits forever.
    dist.init_process_group(timeout=datetime.timedelta(minutes=2))
    train(options, device)
    gc.collect()  # DDP, if it outlives the process group, can wait for a thread of gloo that waits for Python
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
