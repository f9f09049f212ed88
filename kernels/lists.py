"""The tokens that chose a sub-key, from its list of bits, in ascending order: what every sum over them runs through."""

import triton
import triton.language as tl

from fwpkm.kernels.lookup import PROBABILITY_UNIT, softmax_rows, sub_scores


@triton.jit
def count_bits(x):
    """How many bits of each int32 are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def listed(word, counts, reached, wanted):
    """The positions of the bits number ``wanted`` [E] among the bits of ``word`` [W], counts and their running sum."""
    before = reached[None, :] <= wanted[:, None]
    at = tl.sum(before.to(tl.int32), 1)
    rest = wanted - tl.sum(tl.where(before, counts[None, :], 0), 1)
    index = tl.arange(0, word.shape[0])
    mine = tl.sum(tl.where(index[None, :] == at[:, None], word[None, :], 0), 1)
    bits = (mine[:, None] >> tl.arange(0, 32)[None, :]) & 1
    position = tl.sum((tl.cumsum(bits, 1) <= rest[:, None]).to(tl.int32), 1)
    return at * 32 + position


@triton.jit
def words_of(bits, row, words, w0, WORDS: tl.constexpr):
    """WORDS words of a sub-key's list from ``w0`` on: their bits, how many, the running sum, and the total."""
    w = w0 + tl.arange(0, WORDS)
    word = tl.load(bits + row * words + w, mask=w < words, other=0)
    number = count_bits(word)
    return word, number, tl.cumsum(number, 0), tl.sum(number, 0)


@triton.jit
def members(word, number, reached, total, e0, w0, ENTRIES: tl.constexpr):
    """ENTRIES tokens of these words from number ``e0`` on, and which of them there are."""
    wanted = e0 + tl.arange(0, ENTRIES)
    known = wanted < total
    return tl.where(known, w0 * 32 + listed(word, number, reached, wanted), 0), known


@triton.jit
def slope(share, count):
    """a_i = log(p̄_i + 1e-8) + p̄_i / (p̄_i + 1e-8), from the sum of probabilities in its unit (§4)."""
    mean = share.to(tl.float32) / (PROBABILITY_UNIT * count)
    return tl.log(mean + 1e-8) + mean / (mean + 1e-8)


@triton.jit
def pull_of(
    ids, ranks, share, at, known, counted, group, count,
    SUBKEYS: tl.constexpr, K: tl.constexpr, IDW: tl.constexpr, EPSILON: tl.constexpr, WEIGHT: tl.constexpr,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """Of the tokens whose choices begin at ``at`` [E]: the sub-keys chosen, their scores s, p, a, and c (§4).

    All [E, CHOICES]; c is the factor of (q - K), or of q, in α ∇L_addr.
    """
    choice = tl.arange(0, CHOICES)
    picked = (choice < K)[None, :]
    use = known[:, None] & picked
    chosen = tl.load(ids + at[:, None] + choice[None, :], mask=use, other=-1)
    score = sub_scores(tl.load(ranks + at[:, None] + choice[None, :], mask=use, other=0.0), EPSILON, IDW)
    p = softmax_rows(tl.where(picked, score, -float("inf")))
    a = slope(tl.load(share + group.to(tl.int64) * SUBKEYS + chosen, mask=use, other=0), count)
    mean = tl.sum(tl.where(picked, p * a, 0.0), 1)
    pull = tl.where(use & counted[:, None], WEIGHT / count * p * (a - mean[:, None]), 0.0)
    if IDW:
        pull = 2 * pull * tl.exp(score)
    return chosen, score, p, a, pull
