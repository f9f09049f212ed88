"""``python -m benchmarks.packed``: what a conversation costs once it is packed, beside its table.

A torch layer of the default configuration, or of 512² slots, 256 wide and untrained, reads tokens of one row: words
of 8,192 drawn by Zipf's law (the i-th with a probability of about 1/i), each with an embedding of its own. Then its
state is packed beside the initial memory, with all bits and with rows in bfloat16, and unpacked again.
"""

import torch

import fwpkm.backends.torch as be
from benchmarks import report
from benchmarks.findings import same_bits
from benchmarks.measure import timed
from fwpkm import FwPKMConfig

CONFIGS = {"128² (default)": FwPKMConfig(), "512²": FwPKMConfig(num_subkeys=512)}
WORDS, HIDDEN = 8192, 256


def measure(cfg: FwPKMConfig, lengths: list[int]) -> list[tuple[str, ...]]:
    """A row of the table for each number of tokens, of one conversation that goes on."""
    torch.manual_seed(0)
    layer, embeddings = be.FwPKM(HIDDEN, cfg).requires_grad_(False), torch.randn(WORDS, HIDDEN)
    words = torch.multinomial(1 / torch.arange(1, WORDS + 1), max(lengths), replacement=True)
    memory, state, rows = layer.memory(), layer.init_state(1), []
    for start, stop in zip([0, *lengths], lengths):
        _, state = layer(embeddings[words[start:stop]][None], state, inplace=True)
        seconds, packed = timed(be.pack, cfg, state, memory)
        again, unpacked = timed(be.unpack, cfg, packed, memory)
        if not same_bits(state.memory, unpacked.memory):
            raise AssertionError("the tables that were unpacked have other bits")
        rounded, table = be.pack(cfg, state, memory, "bfloat16"), be.nbytes(state)
        fractions = (len(packed.slots) / cfg.num_slots, packed.nbytes / table, rounded.nbytes / table)
        sizes = (f"{size / 2**20:.1f}" for size in (table, packed.nbytes, rounded.nbytes))
        rows.append((f"{stop:,}", *sizes, *(f"{100 * x:.1f}%" for x in fractions), _ms(seconds), _ms(again)))
    return rows


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def main() -> None:
    """Print the table."""
    parser = report.parser("packed", __doc__, "markdown")
    parser.add_argument("--tokens", type=report.count, nargs="+", default=[4096, 20480], help="numbers of tokens")
    args = parser.parse_args()
    rows = [(name, *row) for name, cfg in CONFIGS.items() for row in measure(cfg, sorted(args.tokens))]
    sizes = ("state, MiB", "packed, MiB", "bfloat16, MiB")
    fractions = ("rows that differ", "packed of state", "bfloat16 of state")
    columns = ("table", "tokens", *sizes, *fractions, "pack, ms", "unpack, ms")
    report.show(["one run of each"], [report.Table("A packed conversation", columns, rows)], markdown=args.markdown)


if __name__ == "__main__":
    main()
