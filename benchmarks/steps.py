"""The steps of the torch backend that are timed, by its public functions alone: they run on older commits too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Inputs, Workload, make_memory
from fwpkm import FwPKMConfig, State
from fwpkm.backends import torch as be


class TorchSteps:
    """The torch backend at one workload. A step in place leaves the tables rewritten, so nothing else may hold them."""

    def __init__(self, workload: Workload, device: str = "cpu", **options: Any) -> None:
        """Draw the tables; ``options`` are those of ``apply``."""
        self.workload, self.config, self.options = workload, workload.config, options
        memory = make_memory(workload, device=device)
        self.state: State = be.init_state(workload.config, memory, batch_size=workload.batch)
        self.slots: Tensor

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Read all tokens and rewrite the tables."""
        output, self.state, trace = be.apply(self.config, self.state, *inputs.tokens, inplace=True, **self.options)
        self.slots = trace.slots
        return (output,)

    def train(self, inputs: Inputs, inplace: bool = True) -> tuple[Tensor, ...]:
        """Outputs and gradients of query, value and gate; functional, also the new tables, and the old ones stay."""
        output, state, _ = be.apply(self.config, self.state, *inputs.tokens, inplace=inplace, **self.options)
        results = output, *torch.autograd.grad(output, inputs.tokens, inputs.cotangent)
        if not inplace:
            return *results, *state.memory
        self.state = be.detach(state)
        return results

    @torch.no_grad()
    def by_token(self, tokens: Sequence[Tensor], number: int) -> Tensor:
        """``apply`` of that many tokens, one by one; the last output."""
        for t in range(number):
            token: Any = [x[:, t : t + 1] for x in tokens]
            output, self.state, _ = be.apply(self.config, self.state, *token, inplace=True, **self.options)
        return output


class Decoder:
    """One ``decode`` of static buffers, captured in a CUDA graph where the state is on a GPU."""

    def __init__(self, cfg: FwPKMConfig, state: State, tokens: Sequence[Tensor]) -> None:
        """Capture at the state, which is left as it was; ``tokens`` are query, value and gate of tokens to come."""
        widths = [x.shape[2] if x.ndim == 3 else 1 for x in tokens]
        # One row a token, so that one copy brings the next.
        self.rows = torch.cat([x.reshape(*x.shape[:2], -1) for x in tokens], dim=2).transpose(0, 1).contiguous()
        self.buffer = self.rows[0].clone()
        query, value, gate = (x.unsqueeze(1) for x in self.buffer.split(widths, dim=1))
        self.config, self.token, self.state = cfg, (query, value, gate[..., 0]), be.start_decoding(state)
        self.step = self._eager
        if self.buffer.is_cuda:
            arrays = [*self.state.memory, *(x for name, x in self.state._asdict().items() if name != "memory")]
            before = [x.clone() for x in arrays]
            self.step = capture(self._eager)[0].replay
            for x, y in zip(arrays, before, strict=True):  # forget the tokens that warmed up
                x.copy_(y)
            torch.cuda.synchronize()

    def __call__(self, t: int) -> Tensor:
        """The output ``[B, 1, Dv]`` of token t, which must be the next; valid until the next call."""
        self.buffer.copy_(self.rows[t % len(self.rows)])
        self.step()
        return self.output

    @torch.no_grad()
    def _eager(self) -> None:
        self.output: Tensor = be.decode(self.config, self.state, *self.token)


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a CUDA graph, after calls that warm up; and what it returned, which every replay rewrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
