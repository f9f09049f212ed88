"""Text byte by byte: prompts of unequal lengths are read in one call, then each byte takes one step, in place.

The model is untrained, so that what it writes is noise: put your own in its place. At the end one call reads all of the
text, and must choose every byte again.

    python examples/torch_generate.py [--bytes 48] [--temperature 0.8]
"""

import argparse

import torch
from torch import Tensor, nn

from fwpkm import State
from fwpkm.backends.torch import FwPKM, start_decoding

PROMPTS = ["To Sherlock Holmes she is always the woman. I have seldom heard him", "It was not that he felt"]


class Model(nn.Module):
    """Bytes, a memory beside a residual, a readout."""

    def __init__(self, width: int = 64) -> None:
        """Draw the weights."""
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.memory = FwPKM(width, key_dim=32, value_dim=64, num_subkeys=32, chunk_size=16)
        self.readout = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 256))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, State]:
        """Logits [B, T, 256] after each of the tokens [B, T] that are there, and where the rows stand then."""
        x = self.embed(tokens)
        read, state = self.memory(x, mask=mask)
        return self.readout(x + read), state

    def step(self, token: Tensor, state: State) -> Tensor:
        """Logits [B, 256] after one more token [B] of each row; the state is overwritten."""
        x = self.embed(token[:, None])
        return self.readout(x + self.memory.decode(x, state))[:, 0]


def choose(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A sample of softmax(logits / temperature), by Gumbel noise [..., 256]; the likeliest at temperature 0."""
    return (logits + temperature * noise).argmax(-1)


def generate(model: Model, tokens: Tensor, mask: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Bytes [B, n] that follow the prompts [B, T], which end in the last column; noise [B, n, 256]."""
    logits, state = model(tokens, mask)
    state = start_decoding(state)  # on the model's device, its position too
    chosen = [choose(logits[:, -1], noise[:, 0], temperature)]
    for i in range(1, noise.shape[1]):
        chosen.append(choose(model.step(chosen[-1], state), noise[:, i], temperature))
    return torch.stack(chosen, 1)


def main() -> None:
    """Generate, print, and compare with one call over everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.8)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([list(prompt.rjust(longest).encode()) for prompt in PROMPTS])
    mask = torch.tensor([[i >= longest - len(prompt) for i in range(longest)] for prompt in PROMPTS])
    noise = -torch.empty(len(PROMPTS), args.bytes, 256).exponential_().log()
    written = generate(model, tokens, mask, noise, args.temperature)
    for prompt, row in zip(PROMPTS, written.tolist()):
        print(prompt, bytes(row))

    logits, _ = model(torch.cat([tokens, written], 1)[:, :-1], nn.functional.pad(mask, (0, args.bytes - 1), value=True))
    assert torch.equal(choose(logits[:, longest - 1 :], noise, args.temperature), written)
    print(f"one call over all of it chooses the same {written.numel()} bytes")


if __name__ == "__main__":
    main()
