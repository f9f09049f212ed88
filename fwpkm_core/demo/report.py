"""What the demo prints: plain ASCII, at most 80 columns, with a progress bar where a terminal can show one."""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fwpkm.config import FwPKMConfig
from fwpkm.demo.contexts import CONTEXT
from fwpkm.demo.recall import MAX_SUBKEYS, Asked, Round
from fwpkm.demo.text import Text

HEADER = """\
          next-token recall
pass  memory  rate 0  shuffled  dictionary | slots used  collisions  tokens/s"""
ROW = (
    "{number:>4}  {memory:.4f}  {frozen:.4f}    {shuffled:.4f}      {dictionary:.4f} "
    "| {slots:>10,}  {collisions:>10.1%}  {speed:>8,.0f}"
)
ASKED = """\
asked once more, nothing written   memory  dictionary  falling back
the text as it was                 {plain.memory:.4f}      {plain.dictionary:.4f}        {plain.falling_back:.4f}
one token in twenty replaced       {other.memory:.4f}      {other.dictionary:.4f}        {other.falling_back:.4f}"""
LEGEND = """\
memory      fraction of tokens whose successor is the nearest code to what was
            read, before the write; always guessing the commonest: {chance:.4f}
rate 0      the same memory with learning_rate 0: nothing is written
shuffled    written with targets in shuffled order, judged by the true ones
dictionary  the baseline, a dictionary from the last {context} tokens to the next;
            falling back: on the last {shorter} ... 1, where it does not know all {context}
collisions  fraction of reads of slots that contexts with another next token
            read too; each context reads {top_k} slots, so the rest outvote them"""


class Report:
    """Prints to standard output as the demo goes on."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Look whether standard output is a terminal; with ``quiet`` nothing is printed."""
        self._console = Console(highlight=False, markup=False, emoji=False, quiet=quiet)

    def line(self, text: str = "") -> None:
        """Print ``text`` as it is, above the progress bar if there is one."""
        self._console.print(text, soft_wrap=True)

    def introduce(self, text: Text, cfg: FwPKMConfig, backend: str, device: str) -> None:
        """Say what is read, by what."""
        s = cfg.num_subkeys
        self.line(f"text     {text.title}")
        self.line(f"         {len(text.ids):,} tokens, {len(text.vocabulary):,} different")
        self.line(f"memory   untrained, {s} x {s} = {cfg.num_slots:,} slots, written every {cfg.chunk_size:,} tokens")
        self.line(f"         and after the last; asked with {CONTEXT} tokens, it should name the next one")
        self.line(f"backend  {backend} on {device}")
        self.line()

    @contextmanager
    def progress(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """A bar over this many tokens, moved by the function it yields; nothing where the output is no terminal."""
        columns = (
            TextColumn("reading"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        hidden = self._console.quiet or not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as bar:
            task = bar.add_task("reading", total=tokens)
            yield lambda count: bar.advance(task, count)

    def header(self) -> None:
        """The head of the table."""
        self.line(HEADER)

    def row(self, number: int, round_: Round) -> None:
        """One pass: recall of the memory and its controls, then the memory's slots and speed."""
        memory = round_.memory
        recalls = {name: getattr(round_, name).recall for name in Round._fields}
        speed = (memory.hits.size + 1) / memory.seconds
        self.line(
            ROW.format(number=number, **recalls, slots=memory.slots_used, collisions=memory.collisions, speed=speed)
        )

    def conclude(
        self, text: Text, cfg: FwPKMConfig, rounds: Sequence[Round], plain: Asked, other: Asked, picture: str
    ) -> None:
        """Show what was asked once more, explain the columns, name the picture, and say what it all means."""
        self.line()
        self.line(ASKED.format(plain=plain, other=other))
        self.line()
        chance = commonest_share(text)
        self.line(LEGEND.format(chance=chance, top_k=cfg.top_k, context=CONTEXT, shorter=CONTEXT - 1))
        self.line()
        self.line(f"picture  {picture}")
        said = meaning(rounds), beside_the_dictionary(rounds, plain, other), larger_table(text, cfg, rounds)
        for paragraph in filter(None, said):
            self.line()
            self.line(paragraph)


def commonest_share(text: Text) -> float:
    """Recall of always answering with the token that most often follows another."""
    return float(np.bincount(text.ids[1:]).max() / (len(text.ids) - 1))


def meaning(rounds: Sequence[Round]) -> str:
    """One sentence on what the last pass shows."""
    last = rounds[-1]
    if len(rounds) == 1:
        return (
            "A first reading can recall little but phrases that occur twice; with --passes 2\n"
            "the memory is asked about what it has read."
        )
    before = {2: "once", 3: "twice"}.get(len(rounds), f"{len(rounds) - 1} times")
    control = max(last.frozen.recall, last.shuffled.recall)
    if last.memory.recall <= control:
        return (
            f"Having read the text {before}, the memory gave the right next token for {last.memory.recall:.2%}\n"
            f"of its contexts, a control without writing, or with shuffled targets, for {control:.2%}:\n"
            "this text does not show what writes store. Try a longer one, of more words."
        )
    return (
        f"Having read the text {before}, with no training, the memory gave the right next\n"
        f"token for {last.memory.recall:.2%} of its contexts; without writing it gave {last.frozen.recall:.2%}, "
        f"with\nshuffled targets {last.shuffled.recall:.2%}: what it recalls is what its writes stored."
    )


def beside_the_dictionary(rounds: Sequence[Round], plain: Asked, other: Asked) -> str:
    """What the baseline does better and worse, in figures of this run."""
    last = rounds[-1]

    def than(mine: float, theirs: float) -> str:
        return "as much as" if mine == theirs else "more than" if mine > theirs else "less than"

    return textwrap.fill(
        f"Beside the baseline: of the text as it was the memory gives {plain.memory:.2%}, {than(*plain[:2])} the "
        f"dictionary's {plain.dictionary:.2%}, which is exact, and read the text in {last.dictionary.seconds:.2f} s "
        f"where the memory took {last.memory.seconds:.2f} s. With one token in twenty replaced the memory gives "
        f"{other.memory:.2%}, {than(*other[:2])} the dictionary's {other.dictionary:.2%}, which knows only contexts "
        f"that are whole, and {than(other.memory, other.falling_back)} the {other.falling_back:.2%} of one that falls "
        f"back on fewer tokens. A text is a dictionary's home: its keys come again exactly. The memory needs no equal "
        f"key, holds any vector, and has a table of one size however much it reads.",
        80,
    )


def larger_table(text: Text, cfg: FwPKMConfig, rounds: Sequence[Round]) -> str:
    """Advice where the table is too small for the text, else ""."""
    wanted = min(MAX_SUBKEYS, 2 ** math.ceil(math.log2(2 * math.sqrt(len(text.ids)))))  # four slots a token
    if len(rounds) == 1 or rounds[-1].memory.recall >= 0.9 or wanted <= cfg.num_subkeys:
        return ""
    return f"The text is long for this table: --num-subkeys {wanted} gives it four slots a token."
