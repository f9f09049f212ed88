"""Training: one optimizer step, held by a CUDA graph where there is one, and the loop around it."""

import concurrent.futures
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from examples.language_model import checkpoint
from examples.language_model.corpus import Corpus
from examples.language_model.facts import check_fit, rows, training_batch
from examples.language_model.interrupt import noted
from examples.language_model.model import Going, mapped
from examples.language_model.settings import Experiment, TrainingSettings
from fwpkm.integrations.distributed import share_initial_memory

WARM_UP = 3  # steps before a CUDA graph takes over
SAVED = 20  # lines of the record from checkpoint to checkpoint
AHEAD = 8  # batches made before they are used


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on a GPU; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def own_rows(batch: int) -> slice:
    """The rows of a batch that this rank takes; all where there is no process group.

    Raises:
        ValueError: they cannot be shared equally.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if batch % ranks:
        raise ValueError(f"training.batch must be a multiple of the {ranks} ranks. Received: {batch}")
    return slice(rank * batch // ranks, (rank + 1) * batch // ranks)


def device_name(device: torch.device) -> str:
    """What a reader of the results would call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Batch(NamedTuple):
    """What a step reads."""

    tokens: np.ndarray
    """``[batch, length + 1]`` uint8"""
    asked: np.ndarray
    """``[batch, length]`` bool: the target is a digit that is asked for."""
    anew: list[bool]
    """which rows begin with the initial memories"""


class Trainer:
    """A model, its optimizer, and for each row of the batch memories that go on from step to step.

    Where a process group of torch.distributed stands, each of its ranks takes part of the rows. A step is then what DDP
    does, in the two halves between which ranks meet, so that a CUDA graph can hold each: after the backward pass one
    collective takes the mean of all gradients.
    """

    def __init__(self, experiment: Experiment, device: torch.device):
        """Build everything; nothing is trained yet.

        Raises:
            ValueError: the ranks cannot share the rows of a batch equally.
        """
        self.settings, self.device, self.step = experiment.training, device, 0
        self.rows = own_rows(self.settings.batch)
        self.model = checkpoint.build(experiment, device, memory_scope="sequence")
        self.drawn = checkpoint.tables_of(self.model)
        cuda = device.type == "cuda"
        self.rate = torch.tensor(0.0, device=device)
        named = list(self.model.named_parameters())
        # Rows of a table would decay while nobody reads them.
        decayed = {name for name, p in named if p.ndim >= 2 and ".memory." not in name}
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": self.settings.weight_decay},
            {"params": [p for name, p in named if name not in decayed]},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        batch, length = self.rows.stop - self.rows.start, self.settings.length
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.uint8, device=device)
        self.asked = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.reading = self.model.start(batch)
        self.measured = torch.zeros(4, device=device)
        self._gradients: Tensor | None = None  # all in one, of several ranks
        if dist.is_initialized():
            share_initial_memory(self.model)
            for weight in self.model.parameters():
                dist.broadcast(weight.detach(), src=0)
            self._gradients = torch.zeros(sum(p.numel() for p in self.model.parameters()), device=device)
        self._loss: Callable[..., tuple[Tensor, ...]] = self._losses
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._warmed = 0

    def compile(self) -> None:
        """Let torch.compile fuse each block, each memory's layer and the loss."""
        for module in (*self.model.blocks, *self.model.memories.values()):
            module.compile()
        self._loss = torch.compile(self._losses)

    def save(self, folder: Path, corpus: str) -> None:
        """Replace the checkpoint of a folder; ``corpus`` is the sha256 of what was read."""
        checkpoint.save(folder, self.model, self.optimizer, self.step, corpus, self.drawn)

    def resume(self, folder: Path, corpus: str) -> None:
        """Go on from the checkpoint of a folder. Raises as ``checkpoint.resume`` does."""
        self.step = checkpoint.resume(folder, self.model, self.optimizer, corpus)
        if self.settings.holds(self.step):
            self.model.hold_keys()
        self._begin([True] * len(self.tokens))  # with the keys that were kept

    def take(self, batch: Batch) -> Tensor:
        """One step; of ``batch``, which is whole on every rank, each takes its rows.

        Returns:
            ``[4]``, overwritten by the next step: the loss in nats, the shares of all asked digits and of the first
            ones that came out right, and the gradient's norm.
        """
        for buffer, given in zip((self.tokens, self.asked), batch):
            buffer.copy_(torch.from_numpy(given[self.rows]))
        self.rate.fill_(self.settings.rate(self.step))
        self._begin(batch.anew[self.rows])
        if self._graphs:
            self._take(*[graph.replay for graph in self._graphs])
        elif self.device.type != "cuda":
            self._take(self._backward, self._update)
        elif self._warmed < WARM_UP:
            self._take_aside()
        else:
            self._take(*[self._captured(half) for half in (self._backward, self._update)])
        self.step += 1
        if self.step <= self.settings.hold_after:
            self._follow()
        return self.measured

    def _take(self, backward: Callable[[], None], update: Callable[[], None]) -> None:
        """The halves of a step, and what the ranks do between them."""
        backward()
        if self._gradients is not None:
            dist.all_reduce(self._gradients)
        update()

    def _captured(self, half: Callable[[], None]) -> Callable[[], None]:
        """What captures a half of a step in a CUDA graph, and runs it; both halves share their memory."""

        def run() -> None:
            graph, pool = torch.cuda.CUDAGraph(), self._graphs[0].pool() if self._graphs else None
            # NCCL looks after its work in a thread of its own, which a capture of all threads would forbid.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                half()
            self._graphs.append(graph)
            graph.replay()

        return run

    @torch.no_grad()
    def _follow(self) -> None:
        """Let rows begin with the mean of all rows' keys; after the last of ``hold_after`` steps those stand still."""
        holds = self.settings.holds(self.step)
        for state, layer in zip(self.reading.memories, self.model.memories.values()):
            mean = state.memory.keys.mean(0)
            if self._gradients is not None:
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            layer.memory.keys.copy_(mean)
            if holds:
                state.memory.keys.copy_(mean)
        if holds:
            self.model.hold_keys()
            # What was captured moves keys.
            self._graphs, self._warmed = [], 0

    def _begin(self, anew: list[bool]) -> None:
        """Give rows their initial memories back, in the tables that a CUDA graph knows."""
        if not any(anew):
            return
        for state, layer in zip(self.reading.memories, self.model.memories.values()):
            for table, first in zip(Going.of(state).tensors, Going.of(layer.init_state(1)).tensors):
                for row in np.flatnonzero(anew):
                    table[row].copy_(first[0])

    def _take_aside(self) -> None:
        """A step on a stream of its own, as what warms up for a capture must be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._take(self._backward, self._update)
        torch.cuda.current_stream().wait_stream(stream)
        self._warmed += 1

    def _backward(self) -> None:
        """The gradients of this rank's rows, and their memories after them."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens = self.tokens.long()
        reading = self.reading._replace(memories=mapped(Tensor.detach, self.reading.memories))
        with autocast(self.device):
            # The kernels keep what the backward needs of the rows that they overwrite; plain torch would not.
            hidden, after = self.model(tokens[:, :-1], reading, inplace=self.device.type == "cuda")
            objective, *measured = self._loss(hidden, tokens[:, 1:], self.asked)
        objective.backward()
        # Nothing is pending at a chunk's end.
        for state, new in zip(self.reading.memories, after.memories):
            for table, written in zip(Going.of(state).tensors, Going.of(new).tensors):
                if written.data_ptr() != table.data_ptr():
                    table.copy_(written.detach())
        self.measured[:-1].copy_(torch.stack(measured))
        if self._gradients is not None:
            torch.cat([p.grad.flatten() for p in self.model.parameters()], out=self._gradients)

    def _update(self) -> None:
        """A step of the optimizer, by the mean of all ranks' gradients."""
        if self._gradients is not None:
            parts = (self._gradients / dist.get_world_size()).split([p.numel() for p in self.model.parameters()])
            for p, part in zip(self.model.parameters(), parts):
                p.grad.copy_(part.view_as(p))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.measured[-1].copy_(norm)

    def _losses(self, hidden: Tensor, targets: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        """What is minimised; the mean loss in nats; the shares of asked digits, and of first ones, that came out."""
        logits = self.model.logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weighted = losses * (1 + (self.settings.asked_weight - 1) * asked.flatten())
        first = asked & ~F.pad(asked, (1, -1))
        right = logits.argmax(-1) == targets
        shares = [(right & these).sum() / these.sum().clamp(min=1) for these in (asked, first)]
        return weighted.mean(), losses.detach().mean(), *shares


def batches(corpus: Corpus, settings: TrainingSettings, first: int) -> Iterator[Batch]:
    """The batches from step ``first`` on, made ahead of their use; a step's batch depends on seed and step alone."""
    seed, batch, length, span = settings.seed, settings.batch, settings.length, settings.span

    def make(step: int) -> Batch:
        content, again = settings.content(step)
        read, rng = rows(corpus.train, seed, content, batch, length, span), np.random.default_rng([seed, content])
        made = training_batch(
            corpus.train, read, rng, length, settings.facts, settings.gap, settings.crowd, again=again
        )
        return Batch(*made, [row.anew and not again for row in read])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(make, step) for step in range(first, min(first + AHEAD, settings.steps))]
        for step in range(first, settings.steps):
            yield ahead.pop(0).result()
            if step + AHEAD < settings.steps:
                ahead.append(pool.submit(make, step + AHEAD))


def train(
    experiment: Experiment, corpus: Corpus, out: Path, device: torch.device, *,
    compile: bool = False, seconds: float | None = None, every: int = 50, side_by_side: int = 1,
) -> Path:  # fmt: skip
    """Train an experiment to its end, going on from the checkpoint in ``out`` if there is one.

    Args:
        experiment: the model and its training.
        corpus: what it reads.
        out: a folder; receives the settings, the checkpoint, and a record with a line for every ``every`` steps.
        device: of the model.
        compile: use torch.compile.
        seconds: stop with a checkpoint after so many; the same call then goes on, with the initial memories.
        every: steps between lines of the record.
        side_by_side: trainings that share the device, for the record: its speed is then no model's own.

    Returns:
        the checkpoint.

    Raises:
        ValueError: ``out`` holds another experiment, or a damaged checkpoint; facts, tables or sequences do not fit; or
            torchrun started more than one process.
        FloatingPointError: the loss or its gradient is not finite; the last checkpoint stays.
        KeyboardInterrupt: Ctrl-C; after the first a step is taken to its end and saved, the same call then goes on.
    """
    began, settings = time.monotonic(), experiment.training
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "one process trains one experiment: several would write the same folder. For several at once there is run. "
            f"Received: WORLD_SIZE={os.environ['WORLD_SIZE']}"
        )
    # What does not fit is said before the folder is claimed.
    check_fit(settings.length, settings.facts, settings.gap)
    rows(corpus.train, 0, 0, 1, settings.length, settings.span)
    _check_room(experiment, device)
    checkpoint.claim(out, experiment)
    checkpoint.mend(out / checkpoint.RECORD)
    trainer = Trainer(experiment, device)
    if (out / checkpoint.WEIGHTS).exists():
        trainer.resume(out, corpus.sha256)
    if compile:
        trainer.compile()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        Progress(*columns) as progress,
        (out / checkpoint.RECORD).open("a") as record,
        noted(progress.console.print) as interrupted,
    ):
        begins = "the first steps take longest" if trainer.step < settings.steps else "already trained"
        bar = progress.add_task(begins, total=settings.steps, completed=trainer.step)
        sums, count, clock = torch.zeros(4, device=device), 0, time.monotonic()
        for batch in batches(corpus, settings, trainer.step):
            sums += trainer.take(batch)
            count += 1
            over = interrupted() or (seconds is not None and time.monotonic() - began > seconds)
            if trainer.step % every == 0 or over or trainer.step == settings.steps:
                line = _line(trainer.step, (sums / count).tolist(), count / (time.monotonic() - clock))
                record.write(json.dumps({**line, "device": device_name(device), "side_by_side": side_by_side}) + "\n")
                record.flush()
                if trainer.step % (SAVED * every) == 0:
                    trainer.save(out, corpus.sha256)
                text = f"{line['bits_per_byte']:.3f} bits a byte, {line['digits_right']:.0%} of asked digits"
                progress.update(bar, completed=trainer.step, description=text)
                sums, count, clock = torch.zeros_like(sums), 0, time.monotonic()
            if over:
                break
        trainer.save(out, corpus.sha256)
    if interrupted() and trainer.step < settings.steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.step}; the same command goes on from here")
    return out / checkpoint.WEIGHTS


def _check_room(experiment: Experiment, device: torch.device) -> None:
    """Refuse tables that do not fit: a system without memory stops the process, and says nothing."""
    config, model = experiment.model.memory_config(), experiment.model
    number = experiment.training.batch * len(model.memories) * model.writes
    if device.type == "cuda":
        copies, room = 1, torch.cuda.get_device_properties(device).total_memory
    else:  # where a step writes copies
        copies, room = 2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = copies * number * config.num_slots * config.value_dim * 4
    if needed > room:
        raise ValueError(
            f"the {number} tables of this experiment (training.batch times model.memories) need {needed / 2**30:.1f} "
            f"GiB, and the {device_name(device)} has {room / 2**30:.1f}. Take a device with more, a smaller "
            f"training.batch or a smaller model.memory.num_subkeys"
        )


def _line(step: int, means: list[float], speed: float) -> dict[str, float]:
    """A line of the record."""
    loss, right, first, norm = means
    if not math.isfinite(loss + norm):
        raise FloatingPointError(
            f"the loss is {loss} and the gradient's norm {norm} at step {step}: try a lower learning_rate"
        )
    return {
        "step": step, "bits_per_byte": loss / math.log(2), "digits_right": right, "first_right": first,
        "norm": norm, "steps_per_second": speed,
    }  # fmt: skip
