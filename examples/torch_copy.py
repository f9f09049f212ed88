"""Train a tiny model that must remember: random tokens, then the same tokens again.

Only the memory can carry the first half to the second. The gradient reaches the first half's queries and values through
the tables that they wrote; with the state detached in between, nothing is learned.

    python examples/torch_copy.py [--steps 100]
"""

import argparse
import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fwpkm.backends.torch import FwPKM

VOCABULARY, HALF = 32, 64


class Model(nn.Module):
    """Two tokens of context, one memory, one readout."""

    def __init__(self, width: int = 64) -> None:
        """Build the layers."""
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.context = nn.Conv1d(width, width, kernel_size=2)
        self.memory = FwPKM(width, key_dim=32, value_dim=64, num_subkeys=32, chunk_size=16, write_scale="normalized")
        self.readout = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T-1, V] for tokens [B, T]: each position sees two tokens, and the rest through the memory."""
        x = self.context(self.embed(tokens).mT).mT
        read, _ = self.memory(x)
        return self.readout(x + read)


def main() -> None:
    """Train, printing the loss of both halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print(f"nats per token by chance: {math.log(VOCABULARY):.2f}")
    for step in range(1, steps + 1):
        half = torch.randint(VOCABULARY, (16, HALF))
        tokens = torch.cat([half, half], dim=1)
        logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 2:], reduction="none").mean(0)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps:
            print(f"step {step}: first reading {losses[: HALF - 2].mean():.2f}, second {losses[HALF:].mean():.2f}")


if __name__ == "__main__":
    main()
